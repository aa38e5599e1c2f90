"""A table's cells among processes: what waits for another cell, and what took over."""

import time

import filelock
import pytest

from experiments.runs import cells
from experiments.studies.table_store import Store, awaited

BASE = ("digits", "base")


def test_who_waits_for_a_process_that_dies_does_its_cell(tmp_path, monkeypatch):
    store = Store(tmp_path, {}, {})
    place = store.cell(*BASE).place
    place.mkdir(parents=True)
    other = filelock.FileLock(place / cells.LOCK)
    other.acquire()
    monkeypatch.setattr(time, "sleep", lambda _: other.release())

    def do():
        assert not other.is_locked
        store.keep(*BASE, {"chosen": {"lr": 0.1}})

    assert awaited(store, BASE, ["chosen"], do) == {"lr": 0.1}
    assert awaited(store, BASE, ["chosen", "lr"], pytest.fail) == 0.1
    assert store.is_finished(*BASE, ()) and not store.is_finished(*BASE, (0,))


def test_a_cell_that_failed_is_not_done_again_for_those_that_wait(tmp_path):
    store, tried = Store(tmp_path, {}, {}), []

    def do():
        tried.append(1)
        return "the loss is nan"

    for _ in range(2):
        with pytest.raises(RuntimeError, match="digits, base: it was not finished"):
            awaited(store, BASE, ["chosen"], do)
    assert tried == [1]
