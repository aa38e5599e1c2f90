"""Fine-tunes a pre-trained model on fine-grained classification (FGVC, five tasks).

    python -m experiments.fgvc --config cub --data_dir DATA --model ViT-B_16.npz
    python -m experiments.fgvc --config fgvc --data_dir DATA --model ViT-B_16.npz

Trains on the whole training set with random crops, flips and colour jitter, keeps a
running mean of the weights, and tests both. `--resume FOLDER` resumes a run that was
killed.
"""

from typing import Any

from experiments.config import presets
from experiments.runs import advice, cli, images


def main(argv: list[str] | None = None) -> dict[str, Any] | None:
    """Runs, and returns the content of `summary.json`."""
    program = "python -m experiments.fgvc"
    words = advice.main(program, presets.FGVC, argv, "fgvc")
    if words is None:
        return None
    return cli.main(program, presets.FGVC, images.prepared, words, "fgvc")


if __name__ == "__main__":
    main()
