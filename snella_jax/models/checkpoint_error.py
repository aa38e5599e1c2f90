"""The error of a checkpoint that cannot be loaded."""

from pathlib import Path


class CheckpointError(ValueError):
    """Names the file and says what is wrong with it."""

    def __init__(self, path: Path, reason: str):
        super().__init__(f"{path}: {reason}.")
