"""Fine-tunes Stable Diffusion 3 to draw a concept, and measures its pictures.

    python -m experiments.dreambooth --config toy --subject dog --data_dir DATA
    python -m experiments.dreambooth --config sd3 --subject dog --data_dir DATA
    python -m experiments.dreambooth --config sd3 --subject FOLDER --class_name mug

`DATA/dreambooth` has DreamBooth's 30 subjects (`git clone
https://github.com/google/dreambooth`), `FOLDER` a few photographs of one thing. `toy`
is a small model of emoji whose weights are here; `sd3` needs those of Stable Diffusion
3 medium, which are gated, CLIP's and DINOv2's. A run writes a folder
(`experiments.runs.folder`) with the pictures of every method, `figures/sheet.png`,
`report.md` and files of what SNELLA changed; one that was killed, in training or in
drawing, is resumed by

    python -m experiments.dreambooth --resume FOLDER

and ends with the same pictures as one that was not.
"""

from typing import Any

from experiments.config.dreambooth import DREAMBOOTH
from experiments.runs import cli, dreambooth


def main(argv: list[str] | None = None) -> dict[str, Any] | None:
    """Runs, and returns the content of `summary.json`."""
    program = "python -m experiments.dreambooth"
    return cli.main(program, DREAMBOOTH, dreambooth.prepared, argv)


if __name__ == "__main__":
    main()
