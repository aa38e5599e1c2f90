"""Options of a command: those of the chosen methods, help that fits, nearest names."""

import dataclasses
import json

import pytest

from experiments import ablate, compare, fgvc, vtab
from experiments.config import command_line, options, presets, run_config
from experiments.config.cluster import Cluster
from experiments.config.images import ImageConfig
from experiments.methods.snella import Snella
from experiments.names import unknown

KNOBS = [
    *("metric", "every", "settled", "exponent", "floor", "floor_every"),
    *("beta_rate", "beta1", "beta2", "power", "undropped", "centred", "start"),
]


def parse(*words):
    words = ["--config", "quickstart", *words]
    return command_line.parse("vtab", presets.VTAB, words, "vtab1k")[1]


def refusal(*words):
    with pytest.raises(SystemExit) as error:
        parse(*words)
    return str(error.value)


def shown(main, *words, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as end:
        main([*words])
    assert not end.value.code
    return capsys.readouterr().out


@pytest.mark.parametrize("main", [vtab.main, fgvc.main])
def test_the_help_fits_and_names_what_explains_a_method(main, capsys, monkeypatch):
    text = shown(main, "--help", capsys=capsys, monkeypatch=monkeypatch)
    lines = text.splitlines()
    assert len(lines) <= 80 and max(map(len, lines)) <= 100
    assert "--help METHOD" in text
    assert all(f"{panel} options" in text for panel in ImageConfig.panels)
    for panel in ImageConfig.panels.values():
        for field in dataclasses.fields(panel):
            assert f"--{field.name}" in text
    assert not any(f".{knob}" in text for knob in KNOBS)
    assert "source" not in text and "dora." not in text
    assert "--snella.lr" in text and "--linear.strengths" in text


@pytest.mark.parametrize("main", [fgvc.main, compare.main])
def test_the_help_of_workers_has_all_of_their_options(main, capsys, monkeypatch):
    text = shown(main, "--help", "workers", capsys=capsys, monkeypatch=monkeypatch)
    for field in dataclasses.fields(Cluster):
        assert f"--{field.name}" in text
    assert "--epochs" not in text and "--run." not in text


@pytest.mark.parametrize("name", ["snella", "linear", "noah"])
def test_the_help_of_a_method_has_all_of_its_options(name, capsys, monkeypatch):
    text = shown(vtab.main, "--help", name, capsys=capsys, monkeypatch=monkeypatch)
    fields = dataclasses.fields(ImageConfig().method(name))
    for field in fields:
        assert f"--{name}.{field.name}" in text
    assert "--epochs" not in text


def test_the_help_of_studies_has_their_runs_options(capsys, monkeypatch):
    how = {"capsys": capsys, "monkeypatch": monkeypatch}
    text = shown(compare.main, "--help", "--methods", "lora", "--controls", **how)
    assert "--run.lora.lr .weight_decay .rank" in text and "snella." not in text
    assert "--run.epochs" in text and "--run.seed" not in text
    text = shown(ablate.main, "--help", **how)
    assert "--studies" in text and "--run.snella.lr" in text
    text = shown(ablate.main, "--help", "snella", **how)
    assert "--run.snella.beta1" in text


def test_only_chosen_methods_take_options():
    config = parse("--methods", "dora", "--dora.rank", "3")
    assert config.methods == ("dora",) and config.settings["dora"].rank == 3
    said = refusal("--dora.rank", "3")
    assert "--dora.rank is an option of dora" in said
    assert "not among --methods linear lora snella" in said
    with pytest.raises(SystemExit, match="not among --methods lora linear full"):
        compare.main(["--methods", "lora", "--run.dora.rank=3"])


def test_knobs_are_accepted_and_kept(tmp_path):
    words = ["--snella.metric", "magnitude", "--snella.beta1", "0.5"]
    words += ["--snella.floor-every", "2", "--snella.no_learn_piece_coeff"]
    config = parse(*words)
    expected = Snella(
        metric="magnitude", beta1=0.5, floor_every=2, learn_piece_coeff=False
    )
    assert config.settings["snella"] == expected
    path = tmp_path / "config.json"
    path.write_text(json.dumps(run_config.as_dict(config)), "utf-8")
    words = ["--config", str(path), "--methods", "lora"]
    again = command_line.parse("x", presets.VTAB, words)[1]
    assert again == dataclasses.replace(config, methods=("lora",))


def test_a_files_source_is_kept_and_no_option(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"source": "a paper", "lora": {"rank": 3}}), "utf-8")
    _, config = command_line.parse("x", presets.VTAB, ["--config", str(path)])
    assert config.source == "a paper" and config.settings["lora"].rank == 3
    assert "no option is called '--source'" in refusal("--source", "mine")


@pytest.mark.parametrize("method", ["lora", "dora", "full", "snella"])
def test_a_file_of_before_sketches_is_read(tmp_path, method):
    config = parse("--methods", method)
    fields = json.loads(json.dumps(run_config.as_dict(config)))
    for name in ("sketch", "sketch_kind", "keep_rows"):
        del fields[method][name]
    assert run_config.differing(fields, config) == []
    sketching = parse("--methods", method, f"--{method}.sketch", "4")
    assert len(run_config.differing(fields, sketching)) == 1
    path = tmp_path / "config.json"
    path.write_text(json.dumps(fields), "utf-8")
    again = command_line.parse("vtab", presets.VTAB, ["--config", str(path)])[1]
    assert again == config


def test_a_files_unknown_fields_are_all_named(tmp_path):
    path = tmp_path / "mine.json"
    fields = {"epochs": 3, "speed": 1, "no_search": True, "lora": {"ranks": [1]}}
    path.write_text(json.dumps(fields), "utf-8")
    with pytest.raises(SystemExit) as error:
        command_line.parse("x", presets.VTAB, ["--config", str(path)])
    said = str(error.value)
    assert f"{path} has fields" in said and "epochs" not in said
    guesses = {"speed": "seed", "no_search": "search", "lora.ranks": "lora.rank"}
    assert all(f"{n} (did you mean {near}?)" in said for n, near in guesses.items())


def test_an_error_of_a_methods_option_names_the_method():
    said = refusal("--snella.beta1", "2")
    assert said.startswith("vtab: snella: beta1")


@pytest.mark.parametrize(
    ("words", "near", "where"),
    [
        (["--lerning", "1"], "", "vtab --help"),
        (["--warmup", "1"], "--warmup_epochs", "vtab --help"),
        (["--snella.ranks", "1"], "--snella.rank", "vtab --help snella"),
        (["--methods", "snela"], "snella or snell", "vtab --help"),
        (["--help", "lorra"], "lora", "vtab --help"),
        (["--config", "cifar10"], "cifar100", "vtab --help"),
    ],
)
def test_what_is_nearest_comes_first(words, near, where):
    said = refusal(*words)
    assert f"did you mean {near}" in said if near else "did you mean" not in said
    assert said.endswith(f"{where}` lists all.") and len(said) < 250


def test_at_most_three_names_are_offered():
    names = [f"task{number}" for number in range(200)]
    assert unknown("task", "task", names, "list").count("task1") <= 3
    assert unknown("task", "x", names, "list") == (
        "no task is called 'x': `list` lists all."
    )


def test_every_option_has_a_text():
    config = ImageConfig()
    for option in command_line.of_run(config, ImageConfig.names()):
        assert len(option.text) > 10, option.flag
    flags = [option.flag for option in command_line.of_run(config, ImageConfig.names())]
    assert len(flags) == len(set(flags))


@dataclasses.dataclass(frozen=True)
class Inner:
    x: int = 1
    """First
    line."""


@dataclasses.dataclass(frozen=True)
class Outer:
    inner: Inner = dataclasses.field(default_factory=Inner)
    y: bool = False
    """Second."""
    z: int = 3


def test_options_of_nested_dataclasses():
    found = list(options.of(Outer(), "own", "p.", hidden=("y",), skip=("z",)))
    assert [(o.flag, o.default, o.text, o.hidden) for o in found] == [
        ("p.inner.x", 1, "First line.", False), ("p.y", False, "Second.", True),
    ]  # fmt: skip
    values, rest = options.parse("x", found, ["--p.inner.x", "4", "--p.y", "--q"])
    assert (values, rest) == ({"p.inner.x": 4, "p.y": True}, ["--q"])
    assert options.replaced(Outer(), values, "p.") == Outer(Inner(4), True)
