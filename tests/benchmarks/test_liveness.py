"""Live bytes along a schedule that was written by hand."""

import pytest
from places import RESULTS

from experiments import files
from experiments.benchmarks import memory_curve
from experiments.benchmarks.liveness import live_bytes

# Arguments of 400 (given back in its place) and 40 bytes; arrays of 40 if not said.
HLO = """HloModule jit_step, is_scheduled=true, \
input_output_alias={ {0}: (0, {}, may-alias) }

%turn (state: (s32[], f32[10], f32[30])) -> (s32[], f32[10], f32[30]) {
  %state = (s32[], f32[10]{0}, f32[30]{0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %one = f32[10]{0} get-tuple-element(%state), index=1
  %all = f32[30]{0} get-tuple-element(%state), index=2
  %inner = f32[50]{0} custom-call(%one)
  %carried = f32[10]{0} custom-call(%inner)
  %stack = f32[30]{0} fusion(%all, %carried, %i), kind=kLoop, calls=%updated
  %j = s32[] custom-call(%i)
  ROOT %next = (s32[], f32[10]{0}, f32[30]{0}) tuple(%j, %carried, %stack)
}

%more (state.1: (s32[], f32[10], f32[30])) -> pred[] {
  %state.1 = (s32[], f32[10]{0}, f32[30]{0}) parameter(0)
  ROOT %less = pred[] custom-call(%state.1)
}

%small (p: f32[10]) -> f32[10] {
  %p = f32[10]{0} parameter(0)
  ROOT %same = f32[10]{0} copy(%p)
}

%large (q: f32[10]) -> f32[10] {
  %q = f32[10]{0} parameter(0)
  %wide = f32[20]{0} custom-call(%q)
  ROOT %narrow = f32[10]{0} custom-call(%wide)
}

ENTRY %main (w: f32[100], x: f32[10]) -> (f32[100], f32[]) {
  %w = f32[100]{0} parameter(0)
  %x = f32[10]{0} parameter(1)
  %zero = s32[] constant(0)
  %start = s32[] copy(%zero)
  %h = f32[10]{0} fusion(%x), kind=kLoop, calls=%small
  %act = f32[10]{0} fusion(%h), kind=kLoop, calls=%small
  %room = f32[30]{0} fusion(), kind=kLoop, calls=%empty
  %state.2 = (s32[], f32[10]{0}, f32[30]{0}) tuple(%start, %act, %room)
  %loop = (s32[], f32[10]{0}, f32[30]{0}) while(%state.2), condition=%more, body=%turn
  %last = f32[10]{0} get-tuple-element(%loop), index=1
  %kept = f32[30]{0} get-tuple-element(%loop), index=2
  %two = (f32[10]{0}, s8[200]{0}) custom-call(%last)
  %product = f32[10]{0} get-tuple-element(%two), index=0
  %chosen = f32[10]{0} conditional(%start, %product, %product), \
branch_computations={%small, %large}
  %added = f32[10]{0} custom-call(%chosen, %product), \
output_to_operand_aliasing={{}: (1, {})}
  %grad = f32[100]{0} custom-call(%added, %kept)
  %new = f32[100]{0} fusion(%w, %grad), kind=kLoop, calls=%adam
  %loss = f32[] custom-call(%h)
  ROOT %out = (f32[100]{0}, f32[]) tuple(%new, %loss)
}
"""
GIVEN = 440
BY_HAND = {
    "start": GIVEN + 4,
    "h": GIVEN + 4 + 40,
    "act": GIVEN + 4 + 80,  # h is read by the loss
    "room": GIVEN + 4 + 80 + 120,
    "inner": GIVEN + 4 + 80 + 120 + 200,
    "carried": GIVEN + 4 + 80 + 120 + 200,  # where the loop's state lies
    "stack": GIVEN + 4 + 80 + 120,
    "j": GIVEN + 4 + 80 + 120,
    "two": GIVEN + 4 + 80 + 120 + 240,
    "wide": GIVEN + 4 + 40 + 120 + 40 + 40 + 80,
    "narrow": GIVEN + 4 + 40 + 120 + 40 + 40 + 80,  # the result lies outside
    "chosen": GIVEN + 4 + 40 + 120 + 40 + 40,
    "added": GIVEN + 40 + 120 + 40 + 40,  # in the place of the product
    "grad": GIVEN + 40 + 120 + 40 + 400,
    "new": GIVEN + 40 + 400,  # in the place of w
    "loss": GIVEN + 40 + 4,
}


def test_live_bytes_by_hand():
    assert live_bytes(HLO) == list(BY_HAND.values())


def test_a_fusion_writes_over_an_operand_that_is_not_read_again():
    """Without its second reader h makes room for act, and the loss is out of it."""
    text = HLO.replace("custom-call(%h)", "custom-call(%new)")
    act = list(BY_HAND).index("act")
    assert live_bytes(text)[act] == GIVEN + 4 + 40
    text = text.replace("fusion(%h), kind=kLoop", "fusion(%h), kind=kInput")
    assert live_bytes(text)[act] == GIVEN + 4 + 80


def test_programs_that_it_cannot_follow():
    with pytest.raises(ValueError, match="no is_scheduled=true"):
        live_bytes(HLO.replace("is_scheduled=true", ""))
    text = HLO.replace("%h = f32[10]{0} fusion(", "%h = f32[10]{0} copy-start(")
    with pytest.raises(ValueError, match="h overlaps others"):
        live_bytes(text)


def test_what_is_kept_of_a_schedule():
    sizes = [1, 2, 9, 4, 9, 3, 2, 1]
    assert memory_curve.summary(sizes, points=4) == {
        "instructions": 8,
        "peak_bytes": 9,
        "peak_at": 0.25,
        "curve": [2, 9, 9, 2],
    }
    assert memory_curve.summary(sizes)["curve"] == sizes


def test_the_committed_curves():
    """Their highest points are the compiler's bytes within 3%, as the docs say."""
    where = RESULTS / "memory" / "h100_vit_b16_batch8_curve"
    rows = {row["method"]: row for row in files.read(where / "memory_curve.json")}
    for row in rows.values():
        assert row["peak_bytes"] == max(row["curve"])
        assert row["peak_bytes"] == pytest.approx(row["compiler_bytes"], rel=0.03)
    full, snella, stored = (r["peak_bytes"] for r in rows.values())
    assert snella < 0.45 * full and stored > 0.9 * full
    start = {name: row["curve"][0] / row["peak_bytes"] for name, row in rows.items()}
    assert start["full"] > 0.6 and start["snella"] < 0.3
