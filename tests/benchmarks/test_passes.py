"""Passes over a weight, counted in a program written by hand."""

import pytest

from experiments.benchmarks import passes

# A weight of 4 x 6: a fusion with two results and one operand twice, a matmul, a copy,
# a loop of five turns, and arrays of other sizes.
HLO = """HloModule jit_layer, is_scheduled=true

%fused (p: f32[4,6]) -> (f32[4,6], u32[4,6]) {
  %p = f32[4,6]{1,0} parameter(0)
  %double = f32[4,6]{1,0} add(%p, %p)
  %bits = u32[4,6]{1,0} bitcast-convert(%double)
  ROOT %both = (f32[4,6]{1,0}, u32[4,6]{1,0}) tuple(%double, %bits)
}

%turn (state: (s32[], u32[4,6])) -> (s32[], u32[4,6]) {
  %state = (s32[], u32[4,6]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %pattern = u32[4,6]{1,0} get-tuple-element(%state), index=1
  %counts = s32[4]{0} fusion(%pattern), kind=kInput, calls=%counted
  %count = s32[] fusion(%counts), kind=kInput, calls=%counted
  ROOT %next = (s32[], u32[4,6]{1,0}) tuple(%count, %pattern)
}

%more (state.1: (s32[], u32[4,6])) -> pred[] {
  %state.1 = (s32[], u32[4,6]{1,0}) parameter(0)
  ROOT %less = pred[] custom-call(%state.1)
}

ENTRY %main (x: bf16[5,4], w: bf16[4,6], d: f32[4,6]) -> bf16[5,6] {
  %x = bf16[5,4]{1,0} parameter(0)
  %w = bf16[4,6]{1,0} parameter(1)
  %d = f32[4,6]{1,0} parameter(2)
  %two = (f32[4,6]{1,0}, u32[4,6]{1,0}) fusion(%d, %d), kind=kLoop, calls=%fused
  %delta = f32[4,6]{1,0} get-tuple-element(%two), index=0
  %pattern.1 = u32[4,6]{1,0} get-tuple-element(%two), index=1
  %zero = s32[] constant(0)
  %start = (s32[], u32[4,6]{1,0}) tuple(%zero, %pattern.1)
  %search = (s32[], u32[4,6]{1,0}) while(%start), condition=%more, body=%turn, \
backend_config={"known_trip_count":{"n":"5"}}
  %tau = s32[] get-tuple-element(%search), index=0
  %merged = bf16[4,6]{1,0} fusion(%delta, %w, %tau), kind=kLoop, calls=%merge
  %pair = f32[2,4,6]{2,1,0} broadcast(%delta), dimensions={1,2}
  ROOT %y = bf16[5,6]{1,0} custom-call(%x, %merged)
}
"""


def test_passes_of_a_text():
    """Reads and writes by dtype; halves for bfloat16, the loop's times five."""
    found = passes.of(HLO, 4 * 6)
    assert found["search"] == {
        "passes": 5.0,
        "by_dtype": {"u32": {"reads": 5.0, "writes": 0.0}},
    }
    assert found["others"]["by_dtype"] == {
        "f32": {"reads": 3.0, "writes": 3.0},
        "u32": {"reads": 0.0, "writes": 1.0},
        "bf16": {"reads": 2.0, "writes": 1.0},
    }
    assert found["others"]["passes"] == 7 + 3 / 2


def test_a_loop_of_unknown_length():
    text = HLO.replace("known_trip_count", "unknown")
    with pytest.raises(ValueError, match="search: it does not say how often"):
        passes.of(text, 4 * 6)


@pytest.mark.parametrize(
    "message, change",
    {
        "m=6: expected a multiple of chips=4": {"chips": 4},
        "tokens=12: expected a number for which": {"tokens": 12},
    }.items(),
)
def test_settings_that_cannot_be_counted(message, change):
    config = passes.PassesConfig(**({"n": 4, "m": 6, "tokens": 5} | change))
    with pytest.raises(ValueError, match=message):
        passes.compiled(config, [])
