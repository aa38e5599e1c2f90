"""Every command of the experiments: its help, and the place of its `main()`."""

import ast
import importlib

import pytest
from places import ROOT

GUARD = "__name__ == '__main__'"


def module(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def guards(tree):
    """Indices of the `if __name__ == "__main__"` among a module's statements."""
    tests = [getattr(statement, "test", None) for statement in tree.body]
    return [i for i, test in enumerate(tests) if test and ast.unparse(test) == GUARD]


TREES = {
    module(path): ast.parse(path.read_bytes())
    for path in sorted((ROOT / "experiments").rglob("*.py"))
}
COMMANDS = [name for name, tree in TREES.items() if guards(tree)]


def test_main_is_called_once_all_functions_are_there():
    last = {name: len(TREES[name].body) - 1 for name in COMMANDS}
    assert COMMANDS and all(guards(TREES[name]) == [i] for name, i in last.items())


@pytest.mark.parametrize("name", COMMANDS)
def test_help_says_what_is_written_where(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module(name).main(["--help"])
    assert stopped.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    assert f"usage: python -m {name} " in said
    assert "--out" in said or name == "experiments.tasks.prepare"
