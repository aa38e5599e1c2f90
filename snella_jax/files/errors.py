"""Errors of files that cannot be loaded."""

from pathlib import Path


class CheckpointError(ValueError):
    """Error of a file that cannot be loaded: names it and says what is wrong."""

    def __init__(self, path: Path, reason: str):
        super().__init__(f"{path}: {reason}.")

    @classmethod
    def damaged(cls, path: Path, error: Exception) -> "CheckpointError":
        """Makes the error of what a reader raised, on damage nearly anything."""
        return cls(path, f"damaged ({type(error).__name__}: {error})")
