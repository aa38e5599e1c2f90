"""A run folder: what makes it new, and what a killed write leaves in it."""

import os

import pytest

from experiments import files
from experiments.runs import folder


@pytest.mark.parametrize("name, new", [
    (None, True), (folder.LOCK, True), (".config.json.abcdefgh/config.json", True),
    ("config.json", False), ("figures/curves.png", False),
])  # fmt: skip
def test_a_folder_is_new_without_files_that_are_not_hidden(name, new, tmp_path):
    if name:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    if new:
        folder.check_new(tmp_path)
    else:
        with pytest.raises(SystemExit, match="is not empty: name another folder"):
            folder.check_new(tmp_path)


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file_whole(call, tmp_path, monkeypatch):
    def full(*_):
        raise OSError("No space left on device")

    files.write(tmp_path / "results.json", {"lora": 1})
    monkeypatch.setattr(os, call, full)
    with pytest.raises(OSError, match="No space left"):
        files.write(tmp_path / "results.json", {"lora": 1, "snella": 2})
    monkeypatch.undo()
    assert files.read(tmp_path / "results.json") == {"lora": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]
