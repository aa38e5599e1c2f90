"""Figures that runs draw are laid out once for each function that draws one."""

from quick_figures import quick_figures

__all__ = ["quick_figures"]
