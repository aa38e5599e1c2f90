"""What blocks may keep: every choice beside the others, for a ViT and a LLaMA."""

import json

import pytest
from places import RESULTS

from experiments.benchmarks import choices, memory

FIELDS = ("memory", "activation", "remat")


@pytest.fixture
def compiled(monkeypatch):
    """The settings that would be compiled."""
    found = []

    def row(setting, target, where):
        found.append(setting)
        own = {name: getattr(setting, name) for name in FIELDS}
        shared = {"batch": setting.batch, "dtype": "bfloat16", "target": target}
        shared |= {"model": setting.model, "frozen_dtype": setting.frozen_dtype}
        return own | shared | {
            "method": setting.method,
            "sketch": setting.sketch,
            "total_bytes": len(found) << 30,
            "matmul_flops": 1e12 * len(found),
        }  # fmt: skip

    monkeypatch.setattr(memory, "row", row)
    return found


def test_every_choice_is_compiled_and_shown(compiled, tmp_path, capsys):
    rows = choices.main(["--sketch", "1", "4", "--out", str(tmp_path)])
    assert json.loads((tmp_path / "choices.json").read_text("utf-8")) == rows
    assert (tmp_path / "choices.png").stat().st_size > 10_000
    assert len(rows) == len(compiled) == 4 * len(choices.CHOICES)
    kept = [(s.memory, s.activation, s.remat) for s in compiled[::4]]
    assert len({*kept}) == len(kept) and ("usual", None, "none") in kept
    assert {s.method for s in compiled} == {"lora", "snella"}
    text = capsys.readouterr().out
    assert all(name in text for name in choices.CHOICES)
    assert f"{len(rows)}.00" in text  # the last row's GiB


def test_a_llama_keeps_its_blocks_and_has_silu2(compiled, tmp_path):
    argv = ["--model", "smollm2_135m", "--batch", "1", "--method", "lora"]
    rows = choices.main([*argv, "--out", str(tmp_path)])
    assert [s.remat for s in compiled] == ["none"] * 7 + ["blocks"]
    assert {s.activation for s in compiled} == {None, "silu2"}
    assert [row["choice"] for row in rows if row["activation"]] == [
        "silu2",
        "lean, silu2",
    ]


@pytest.mark.parametrize(
    "name", ["vit_b16_batch64", "vit_h14_batch8", "llama3_8b_batch1"]
)
def test_what_the_docs_say_of_the_choices(name):
    """SNELLA takes at most 1.07 of LoRA's memory; lean computes no matmul twice."""
    path = RESULTS / "memory" / f"h100_{name}_choices" / "choices.json"
    rows = json.loads(path.read_text("utf-8"))
    found = {(r["choice"], r["method"]): r for r in rows if r["sketch"] == 1}
    for choice in {choice for choice, _ in found}:
        lora, ours = (found[choice, method] for method in ("lora", "snella"))
        assert ours["total_bytes"] < 1.07 * lora["total_bytes"]
    for method in ("lora", "snella"):
        usual, lean, blocks = (
            found[choice, method] for choice in ("as it comes", "lean", "blocks")
        )
        assert usual["matmul_flops"] == lean["matmul_flops"] < blocks["matmul_flops"]
        assert usual["total_bytes"] > lean["total_bytes"] > blocks["total_bytes"]
