"""Cells that processes share: who does which, what is left, and what failed."""

import os
import time

import filelock
import pytest
from rich.console import Console

from experiments.runs import cells
from experiments.runs.cells import Cell

QUIET = Console(quiet=True)


@pytest.fixture
def three(tmp_path):
    return [Cell(name, tmp_path / name) for name in "abc"]


def lock(path):
    path.parent.mkdir(exist_ok=True)
    other = filelock.FileLock(path)
    other.acquire()
    return other


def test_a_cell_whose_process_dies_is_taken_over(three, tmp_path, monkeypatch):
    """It waits, with its note of the dead; others come first."""
    other, done = lock(three[1].place / cells.LOCK), []
    (three[1].place / cells.NOTE).write_text(
        '{"worker": "dead", "launch": "x"}', "utf-8"
    )
    monkeypatch.setattr(time, "sleep", lambda _: other.release())

    def tried(cell):
        done.append(cell.name)
        note = cell.note()
        assert note["pid"] == os.getpid() and note["worker"] != "dead"

    assert cells.work(tmp_path, three, tried, QUIET) == []
    assert done == ["a", "c", "b"]
    assert [cell.note() for cell in three] == [None] * 3


def test_one_process_waits_for_the_others(three, tmp_path, capsys):
    others = [lock(three[0].place / cells.LOCK), lock(tmp_path / ".waits")]
    done = []
    cells.work(tmp_path, three, lambda cell: done.append(cell.name), Console())
    assert done == ["b", "c"] and "Other processes are at a." in capsys.readouterr().out
    for other in others:
        other.release()


def test_what_failed_is_tried_once_by_the_workers_of_a_launch(
    three, tmp_path, monkeypatch
):
    done = []

    def tried(cell):
        done.append(cell.name)
        return "b diverged" if cell.name == "b" else None

    def worker(launch):
        monkeypatch.setenv(cells.LAUNCH, launch)
        return cells.work(tmp_path, three[1:], tried, QUIET)

    assert worker("1") == worker("1") == worker("2") == ["b diverged"]
    assert done == ["b", "c", "c", "b", "c"]
    assert three[1].note()["failed"] == "b diverged"


def test_an_interrupted_cell_is_free_and_has_no_note(three, tmp_path):
    def interrupt(cell):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cells.work(tmp_path, three, interrupt, QUIET)
    assert three[0].note() is None
    lock(three[0].place / cells.LOCK).release()


def test_a_file_system_that_does_not_lock_is_refused(tmp_path, monkeypatch):
    cells.check_locks(tmp_path)
    monkeypatch.setattr(cells, "SECOND", "")  # a second process that gets the lock
    with pytest.raises(OSError, match="a second process took a lock that the first"):
        cells.check_locks(tmp_path)

    def acquire(*_, **__):
        raise NotImplementedError("no flock")

    monkeypatch.setattr(filelock.FileLock, "acquire", acquire)
    with pytest.raises(OSError, match="file system without locks: no flock"):
        cells.check_locks(tmp_path)
