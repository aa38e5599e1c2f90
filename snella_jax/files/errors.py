"""The error of a checkpoint that cannot be loaded."""

from pathlib import Path


class CheckpointError(ValueError):
    """Names the file and says what is wrong with it."""

    def __init__(self, path: Path, reason: str):
        super().__init__(f"{path}: {reason}.")

    @classmethod
    def damaged(cls, path: Path, error: Exception) -> "CheckpointError":
        """For what a reader raised: on a damaged file it can be nearly anything."""
        return cls(path, f"damaged ({type(error).__name__}: {error})")
