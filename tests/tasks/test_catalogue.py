"""The catalogue of tasks: what is not there, how it is prepared, and the listing."""

import pytest
import tensorflow_datasets as tfds
from rich.console import Console

from experiments.tasks import catalogue, fgvc, prepare, vtab


@pytest.mark.parametrize("name", [*vtab.TASKS, *fgvc.TASKS])
def test_what_is_not_there_says_how_to_get_it(name, tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        catalogue.load(name, tmp_path)
    said = str(error.value)
    row = vtab.TASKS.get(name) or fgvc.TASKS[name]
    assert str(tmp_path) in said
    if row.builder is None:
        assert "unpack" in said
    else:
        assert row.builder.name in said and row.builder.versions[-1] in said
        assert f"experiments.tasks.prepare --task {name} --data_dir {tmp_path}" in said
        assert row.builder.manual in said


def test_a_name_that_is_none(tmp_path):
    with pytest.raises(ValueError, match=r"called 'cifar'; did you mean cifar100 or"):
        catalogue.load("cifar", tmp_path)


def test_tasks_that_share_a_builder_prepare_it_once():
    config = prepare.PrepareConfig(task=("clevr_count", "dtd", "clevr_dist"))
    names = [builder.name for builder in prepare._builders(config)]
    assert names == ["clevr", "dtd"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--task is missing: expected caltech101"),
        (["--task", "cifar"], "'cifar' is no task of TFDS: expected caltech101"),
        (["--task", "nabirds"], "TFDS cannot get nabirds: unpack nabirds.tar.gz"),
    ],
)
def test_prepare_says_what_it_expected(arguments, message):
    with pytest.raises(SystemExit, match=message):
        prepare.main(arguments)


def test_prepare_asks_for_the_version_of_the_table(tmp_path, monkeypatch):
    """Without TensorFlow and a network: what it asks TFDS for."""
    asked = {}

    class Made:
        def download_and_prepare(self, download_config):
            asked["manual_dir"] = download_config.manual_dir

    def builder(name, **options):
        asked.update(options, name=name)
        return Made()

    monkeypatch.setattr(tfds, "builder", builder)
    eurosat = vtab.TASKS["eurosat"].builder
    prepare.prepare(eurosat, tmp_path, tmp_path / "by hand")
    assert asked == {
        "name": "eurosat/rgb:2.0.0",
        "data_dir": tmp_path,
        "file_format": "array_record",
        "manual_dir": tmp_path / "by hand",
    }


def test_listing_names_every_task_and_its_licence():
    console = Console(width=200, record=True)
    console.print(catalogue.listing())
    text = console.export_text()
    for name, entry in catalogue.ENTRIES.items():
        assert name in text and entry.licence in text
