"""Fine-tunes a pre-trained model under the VTAB-1k protocol.

    python -m experiments.vtab --config quickstart
    python -m experiments.vtab --config cifar100 --data_dir DATA --model ViT-B_16.npz
    python -m experiments.vtab --config vtab1k --data_dir DATA --model ViT-B_16.npz
    python -m experiments.vtab --config elpv --search

`quickstart` is scikit-learn's handwritten digits (no VTAB task) with the small ViT that
`experiments/pretrained/pretrain.py` pre-trained on Fashion-MNIST; `--task` and
`--model` put yours in their place. `vtab1k` is all 19 tasks. A run leaves a folder
(`run.py`); one that was killed goes on with

    python -m experiments.vtab --resume FOLDER

and ends with the numbers of one that was not.
"""

from typing import Any

from experiments.config import presets
from experiments.runs import cli


def main(argv: list[str] | None = None) -> dict[str, Any] | None:
    """Parses the command line, runs, and returns what `summary.json` holds."""
    return cli.main("python -m experiments.vtab", presets.VTAB, "vtab1k", argv)


if __name__ == "__main__":
    main()
