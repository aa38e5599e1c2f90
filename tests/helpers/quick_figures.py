"""Figures of runs, most of them without a layout: its search takes most of the time."""

import sys

import pytest

from experiments import plotting

_LAID_OUT = set()  # functions of which a figure was laid out in this process


def _save(figure, path, dpi=130, *, save=plotting.save):
    """Writes a figure as a PNG; lays out the first of each function that draws one."""
    drawer = sys._getframe(1).f_code
    if drawer in _LAID_OUT:
        figure.set_layout_engine(None)
    _LAID_OUT.add(drawer)
    save(figure, path, dpi)


@pytest.fixture(scope="module", autouse=True)
def quick_figures():
    """Figures are laid out once for each function that draws them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plotting, "save", _save)
        yield
