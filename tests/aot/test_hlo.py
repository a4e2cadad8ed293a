# SPDX-License-Identifier: Apache-2.0
"""Collectives and cycles read from the text of compiled programs."""

import pytest

from balpoe_jax.aot.hlo import Collective, collectives, estimated_cycles

# In the words of the TPU compiler: a combined all-reduce with layouts and an index comment, a loop
# with one inside, an asynchronous one, a wrapped one, and cycles.
TPU = """\
HloModule jit_step, is_scheduled=true, entry_computation_layout={(f32[4]{0})->f32[4]{0}}

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%fused (p: f32[4]) -> f32[4] {
  %p = f32[4]{0} parameter(0)
  ROOT %inner = f32[4]{0} negate(%p), backend_config={"window_config":{"estimated_cycles":"999"}}
}

%body (s: (s32[], f32[4])) -> (s32[], f32[4]) {
  %s = (s32[], f32[4]{0}) parameter(0)
  %x = f32[4]{0} get-tuple-element(%s), index=1
  %r = f32[4]{0:T(128)S(1)} all-reduce(%x), channel_id=1, replica_groups={{0,1}}, to_apply=%add
  %f.1 = f32[4]{0} fusion(%r), kind=kLoop, calls=%fused, backend_config={"window_config":{"estimated_cycles":"10"}}
  ROOT %t = (s32[], f32[4]{0}) tuple(%i, %f.1)
}

%condition (s: (s32[], f32[4])) -> pred[] {
  %s = (s32[], f32[4]{0}) parameter(0)
  ROOT %c = pred[] compare(%i, %n), direction=LT
}

%wrapped (q: bf16[8]) -> bf16[2] {
  %q = bf16[8]{0} parameter(0)
  ROOT %rs = bf16[2]{0} reduce-scatter(%q), dimensions={0}, to_apply=%add
}

ENTRY %main (param.1: f32[4], /*index=5*/param.2: bf16[8]) -> f32[4] {
  %param.1 = f32[4]{0} parameter(0)
  %w = (s32[], f32[4]{0}) while(%init), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %all-reduce.7 = (f32[2,3]{1,0:T(2,128)S(1)}, bf16[5]{0}, /*index=2*/pred[7]{0}) all-reduce(%u, %v, %z), channel_id=2, to_apply=%add
  %ag = (f32[4]{0}, f32[16]{0}) all-gather-start(%param.1), dimensions={0}
  %agd = f32[16]{0} all-gather-done(%ag)
  %as = ((bf16[8]{0}), bf16[2]{0}, u32[]) async-start(%param.2), calls=%wrapped
  %ad = bf16[2]{0} async-done(%as), calls=%wrapped
  ROOT %f.2 = f32[4]{0} fusion(%agd), kind=kLoop, calls=%fused, backend_config={"window_config":{"estimated_cycles":"100"}}
}
"""  # noqa: E501


def test_collectives_by_kind_with_loops_and_asynchronous_ones() -> None:
    assert collectives(TPU) == [
        Collective("all-reduce", 3 + 1, 3 * 16 + (24 + 10 + 7)),
        Collective("all-gather", 1, 64),
        Collective("reduce-scatter", 1, 4),
    ]


def test_cycles_count_a_fusion_once_and_a_loop_as_often_as_it_runs() -> None:
    assert estimated_cycles(TPU) == 3 * 10 + 100


def test_a_loop_that_tells_its_length_by_its_condition_alone() -> None:
    untold = TPU.replace('"known_trip_count":{"n":"3"}', "")
    limit = "  %n = s32[]{:T(128)} constant(7), metadata={}\n  ROOT %c = pred[]"
    assert estimated_cycles(untold.replace("  ROOT %c = pred[]", limit)) == 7 * 10 + 100


def test_a_loop_of_unknown_length_counts_once() -> None:
    unknown = TPU.replace('"known_trip_count":{"n":"3"}', "")
    assert estimated_cycles(unknown) == 110
    assert collectives(unknown)[0] == Collective("all-reduce", 2, 16 + 41)


def test_a_program_without_estimates_or_collectives() -> None:
    lines = [line for line in TPU.splitlines() if "cycles" not in line and "all-" not in line]
    text = "\n".join(line for line in lines if "async" not in line and "while" not in line)
    assert estimated_cycles(text) is None
    assert collectives(text) == []


@pytest.mark.parametrize(
    ("kind", "size"),
    [("f32[2,3]{1,0}", 24), ("f32[]", 4), ("s8[5]", 5), ("f8e4m3fn[6]", 6), ("c64[2]", 16)],
)
def test_sizes_of_types(kind: str, size: int) -> None:
    text = f"ENTRY %main (x: f32[]) -> f32[] {{\n  %r = {kind} all-reduce(%x), to_apply=%add\n}}\n"
    assert collectives(text) == [Collective("all-reduce", 1, size)]
