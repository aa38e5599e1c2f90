"""Fine-tunes a pre-trained model under the VTAB-1k protocol.

    python -m experiments.vtab --config quickstart
    python -m experiments.vtab --config cifar100 --data_dir DATA --model ViT-B_16.npz
    python -m experiments.vtab --config vtab1k --data_dir DATA --model ViT-B_16.npz
    python -m experiments.vtab --config elpv --search

`quickstart` is scikit-learn's handwritten digits (not a VTAB task) with a small ViT,
pre-trained on Fashion-MNIST by `experiments.pretrained.pretrain`; `--task` and
`--model` take your own data and model. `vtab1k` is all 19 tasks. A run writes a folder
(`experiments.runs.folder`); a run that was killed is resumed by

    python -m experiments.vtab --resume FOLDER

and ends with the same numbers as one that was not. `--suggest` trains nothing and says
what to start with, for the task, the model and `--device_memory` GiB.
"""

from typing import Any

from experiments.config import presets
from experiments.runs import advice, cli, images


def main(argv: list[str] | None = None) -> dict[str, Any] | None:
    """Runs, and returns the content of `summary.json`."""
    program = "python -m experiments.vtab"
    words = advice.main(program, presets.VTAB, argv, "vtab1k")
    if words is None:
        return None
    return cli.main(program, presets.VTAB, images.prepared, words, "vtab1k")


if __name__ == "__main__":
    main()
