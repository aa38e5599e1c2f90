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


@pytest.mark.parametrize(
    ("method", "options", "folder", "sketch"),
    [
        ("lora", "", "h100_vit_b16_batch64_sketch4", 1),
        ("full", "", "h100_vit_b16_batch64_sketch4", 1),
        ("snella", "--memory lean", "h100_vit_b16_batch64_lean", 1),
    ],
)
def test_memory_of_what_was_compiled(method, options, folder, sketch):
    rows = json.loads((advice.MEASURED / folder / "memory.json").read_text("utf-8"))
    (row,) = (r for r in rows if (r["method"], r["sketch"]) == (method, sketch))
    situation = dataclasses.replace(VIT_B, weights=row["parameters"])
    found = advice.gib(situation, method, options) * advice.GIB
    assert found == pytest.approx(row["total_bytes"], rel=0.01)


def test_memory_of_another_model():
    """A ViT-H/14 at batch 8, which was compiled with all three, within a fifth."""
    folder = advice.MEASURED / "h100_vit_h14_batch8_sketch4_lean_gelu2"
    rows = json.loads((folder / "memory.json").read_text("utf-8"))
    (row,) = (r for r in rows if r["method"] == "snella")
    huge = Situation(1, 1, row["parameters"], 1280, 8 * 257 * 1280 * 32, half=True)
    *_, options = advice.COMPILED
    found = advice.gib(huge, "snella", options) * advice.GIB
    assert found == pytest.approx(row["total_bytes"], rel=0.2)


def test_what_fits_a_device():
    """Of what fits, the first: each takes less than those before."""
    texts = {
        device: advice.advised(dataclasses.replace(VIT_B, device=device))[-1].text
        for device in (8, 4, 3, 2)
    }
    assert texts[8].endswith("snella fits as it comes.")
    assert texts[4].endswith("snella fits with --memory lean (3 GiB).")
    assert "gelu2 --snella.sketch 4 (2.4 GiB)" in texts[3]
    assert "no option fits 2 GiB: a smaller --batch" in texts[2]
    usual = advice.gib(VIT_B, "snella")
    assert advice.gib(dataclasses.replace(VIT_B, half=False), "snella") == 2 * usual


def test_every_source_is_a_section_of_the_docs():
    kinds = [VIT_B, dataclasses.replace(VIT_B, keep_abilities=True)]
    kinds += [dataclasses.replace(VIT_B, width=None, outputs=None)]
    for own in [own for kind in kinds for own in advice.advised(kind)]:
        page, _, anchor = own.source.partition("#")
        text = (ROOT / "docs" / page).read_text("utf-8")
        titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
        anchors = {re.sub(r"[^\w -]", "", t).lower().replace(" ", "-") for t in titles}
        assert not anchor or anchor in anchors, own.source


def test_a_run_is_not_begun(capsys):
    words = ["--suggest", "--config", "quickstart", "--keep_abilities"]
    assert vtab.main([*words, "--device_memory", "2"]) is None
    text = capsys.readouterr().out
    assert "800 images of 10 classes" in text.replace("\n", " ")
    assert "snella fits as it comes" in " ".join(text.split())
    assert "target_density 0.1" in text


@pytest.mark.parametrize(
    ("main", "words", "message"),
    [
        (vtab.main, ["--device_memory", "2"], "are of --suggest: add it"),
        (fgvc.main, ["--keep_abilities"], "are of --suggest: add it"),
        (
            vtab.main,
            ["--suggest", "--config", "quickstart", "--device_memory", "-1"],
            r"device_memory=-1\.0: expected a positive number",
        ),
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
