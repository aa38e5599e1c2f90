"""Advice on a task: memory against compiled rows, sources against the docs."""

import dataclasses
import json
import re

import pytest
from places import ROOT

from experiments import fgvc, vtab
from experiments.runs import advice
from experiments.runs.advice import Situation

VIT_B = Situation(1000, 10, 85_875_556, 768, advice.OUTPUTS, half=True)


def row(folder, method, sketch=None, model=None):
    rows = json.loads((advice.MEASURED / folder / "memory.json").read_text("utf-8"))
    (found,) = (
        r for r in rows
        if r["method"] == method and sketch in (None, r.get("sketch"))
        if model in (None, r["model"]) and r["path"] in (None, "merged")
    )  # fmt: skip
    return found


@pytest.mark.parametrize("method", ["full", "lora", "snella"])
@pytest.mark.parametrize(
    ("model", "width", "depth", "tokens"),
    [("vit_b16", 768, 12, 197), ("vit_l16", 1024, 24, 197), ("vit_h14", 1280, 32, 257)],
)
def test_memory_is_near_what_was_compiled(model, width, depth, tokens, method):
    """Frozen weights in float32, batch 8, before norms kept less: those are above."""
    own = row("h100_batch8_frozen_float32", method, model=model)
    outputs = 8 * tokens * width * depth
    situation = Situation(1, 1, own["parameters"], width, outputs, half=True)
    ratio = advice.gib(situation, method) * advice.GIB / own["total_bytes"]
    assert 0.6 < ratio < 1.1


@pytest.mark.parametrize("method", ["lora", "snella"])
def test_frozen_weights_count_four_bytes(method):
    """They were compiled with two; all else is the row's to the byte."""
    own = row("h100_vit_b16_batch64_sketch4", method, 1)
    situation = dataclasses.replace(VIT_B, weights=own["parameters"])
    parts = own["argument_bytes"] + own["temporary_bytes"] + 2 * own["parameters"]
    assert advice.gib(situation, method) * advice.GIB == pytest.approx(parts)


def test_what_fits_a_device():
    """Of what fits, the first: each takes less than those before."""
    texts = {
        device: advice.advised(dataclasses.replace(VIT_B, device=device))[-1].text
        for device in (8, 5, 3.5, 2)
    }
    assert texts[8].endswith("snella fits so.")
    assert texts[5].endswith("snella fits with --memory lean (3 GiB).")
    assert "gelu2 --snella.sketch 4 (2.3 GiB) (half a point on digits" in texts[3.5]
    assert "no option fits 2 GiB: a smaller --batch, --accumulate." in texts[2]
    whole = dataclasses.replace(VIT_B, half=False, device=2)
    assert advice.advised(whole)[-1].text.endswith("or --dtype bfloat16.")
    assert advice.gib(whole, "snella") > 1.8 * advice.gib(VIT_B, "snella")


def test_every_source_is_a_section_of_the_docs():
    kinds = [VIT_B, dataclasses.replace(VIT_B, keep_abilities=True)]
    kinds += [dataclasses.replace(VIT_B, width=None, outputs=None)]
    for own in [own for kind in kinds for own in advice.advised(kind)]:
        page, _, anchor = own.source.partition("#")
        text = (ROOT / "docs" / page).read_text("utf-8")
        titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
        anchors = {re.sub(r"[^\w -]", "", t).lower().replace(" ", "-") for t in titles}
        assert not anchor or anchor in anchors, own.source


def test_a_run_is_not_begun(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["--suggest", "--config", "quickstart", "--keep_abilities"]
    assert vtab.main([*words, "--device_memory", "2"]) is None
    text = capsys.readouterr().out
    text = " ".join(text.split())
    assert "797 images, 10 classes" in text and "snella fits so" in text
    assert "none is shown to keep more" in text and "2e-2 for snella" in text
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("model", ["swin_b", "convnext_b"])
def test_models_without_tokens_of_one_width(model, capsys):
    words = ["--suggest", "--config", "quickstart", "--random_weights"]
    assert vtab.main([*words, "--model", model, "--image_size", "64"]) is None
    text = " ".join(capsys.readouterr().out.split())
    assert "measure it: python -m experiments.benchmarks.memory" in text
    assert "only a ViT-S was searched" in text


def test_published_settings_come_first():
    known = dataclasses.replace(VIT_B, source="the released code: SNELLA-32")
    assert advice.advised(known)[0].topic == "settings"


@pytest.mark.parametrize(
    ("main", "words", "message"),
    [
        (vtab.main, ["--device_memory", "2"], "need --suggest: add it"),
        (fgvc.main, ["--keep_abilities"], "need --suggest: add it"),
        (
            vtab.main,
            ["--suggest", "--config", "quickstart", "--device_memory", "-1"],
            r"device_memory=-1\.0: expected a positive number",
        ),
        (vtab.main, ["--suggest", "--config", "vtab1k"], "is for one task"),
        (vtab.main, ["--suggest", "--resume", "runs/a"], "is for one task"),
        (
            vtab.main,
            ["--suggest", "--config", "quickstart", "--task", "nowhere"],
            "nowhere",
        ),
    ],
)
def test_words_that_do_not_fit(main, words, message):
    with pytest.raises(SystemExit, match=message):
        main(words)
