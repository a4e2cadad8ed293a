# SPDX-License-Identifier: Apache-2.0
"""Kernels, bytes and launches read from what the CUDA compiler writes, and a real compilation."""

import importlib.util

import jax
import pytest

from balpoe_jax.aot import examine, gpus
from balpoe_jax.aot.kernels import Kernels, count_launches, kernels, launches
from balpoe_jax.config import resolve
from balpoe_jax.errors import UserError
from tests.helpers.config_files import get_config

# In the words of the compiler: a fusion that takes two slices of an array, one with a reduction, a
# convolution with its workspace, a matrix product, a copy, an all-reduce, and a loop.
GPU = """\
HloModule jit_step, is_scheduled=true, entry_computation_layout={(f32[100]{0})->f32[4]{0}}

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%fused_slices (p.0: f32[100], p.1: f32[]) -> (f32[4], f32[4]) {
  %p.0 = f32[100]{0} parameter(0)
  %p.1 = f32[] parameter(1)
  %s.0 = f32[4]{0} slice(%p.0), slice={[0:4]}
  %s.1 = f32[4]{0} slice(%p.0), slice={[4:8]}
  %m = f32[4]{0} broadcast(%p.1), dimensions={}
  ROOT %t = (f32[4]{0}, f32[4]{0}) tuple(%s.0, %s.1)
}

%fused_reduce (p.2: f32[100]) -> f32[] {
  %p.2 = f32[100]{0} parameter(0)
  %zero = f32[] constant(0)
  ROOT %r = f32[] reduce(%p.2, %zero), dimensions={0}, to_apply=%add
}

%body (s: (s32[], f32[4])) -> (s32[], f32[4]) {
  %s = (s32[], f32[4]{0}) parameter(0)
  %x = f32[4]{0} get-tuple-element(%s), index=1
  %y = f32[4]{0} copy(%x)
  ROOT %u = (s32[], f32[4]{0}) tuple(%i, %y)
}

%condition (s: (s32[], f32[4])) -> pred[] {
  %s = (s32[], f32[4]{0}) parameter(0)
  ROOT %c = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (v: f32[100], k: bf16[2,2]) -> f32[4] {
  %v = f32[100]{0} parameter(0), sharding={replicated}
  %k = bf16[2,2]{1,0} parameter(1)
  %n = f32[] fusion(%v), kind=kInput, calls=%fused_reduce
  %f = (f32[4]{0}, f32[4]{0}) fusion(%v, %n), kind=kLoop, calls=%fused_slices
  %g = f32[4]{0} get-tuple-element(%f), index=0
  %conv.1 = (bf16[8]{0}, u8[0]{0}) custom-call(%k), custom_call_target="__cudnn$convForward"
  %gemm = bf16[2,2]{1,0} custom-call(%k, %k), custom_call_target="__cublas$gemm"
  %ar = f32[4]{0} all-reduce-start(%g), channel_id=1, to_apply=%add
  %ard = f32[4]{0} all-reduce-done(%ar)
  %w = (s32[], f32[4]{0}) while(%init), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  ROOT %z = f32[4]{0} bitcast(%ard)
}
"""  # noqa: E501

SEQUENCE = """\
000: kCommandBuffer [source       | next=003 (1)]
    001: kCopy         [source       | next=002 (1)] kCopy
    002: kCustomKernel [prev=001 (1) | sink        ] loop_select_fusion_1 grid: [1, 1, 1]
003: kConvolution  [prev=000 (1) | next=004 (1)] kConvolution
004: kCustomKernel [prev=003 (1) | sink        ] input_reduce_fusion_17 grid: [256, 1, 1]
"""

needs_cuda = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None, reason="no compiler for GPUs"
)


def test_kernels_by_kind_with_the_bytes_that_they_move() -> None:
    assert kernels(GPU) == Kernels(
        kinds={
            "convolutions": 1,
            "products": 1,
            "reductions": 1,
            "copies": 3,
            "collectives": 1,
            "others": 1,
        },
        # Of the slices 2 x 16 are read and written, and the scalar.
        bytes=(400 + 4) + (32 + 4 + 32) + (8 + 16) + (3 * 8) + 3 * 32 + 32,
    )
    assert kernels(GPU).count == 8


def test_an_array_that_is_also_read_as_a_whole_counts_as_a_whole() -> None:
    whole = GPU.replace("broadcast(%p.1)", "add(%p.0, %p.0)")
    assert kernels(whole).bytes == kernels(GPU).bytes + 400 - 32


def test_convolutions_that_the_compiler_fused() -> None:
    text = GPU.replace("ROOT %r = f32[] reduce(", "ROOT %r = f32[] convolution(")
    assert kernels(text).kinds["convolutions"] == 2


def test_a_graph_is_one_launch(tmp_path) -> None:
    assert count_launches(SEQUENCE) == 3
    assert launches(tmp_path) is None
    (tmp_path / "module_1.thunk_sequence_after_thunk_passes.txt").write_text(SEQUENCE)
    assert launches(tmp_path) == 3


def test_without_the_plugin_one_sentence_says_what_to_install(monkeypatch) -> None:
    def missing(name: str) -> str:
        raise gpus.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(gpus.importlib.metadata, "version", missing)
    with pytest.raises(UserError, match=r"jax-cuda13-plugin of .*not installed; .*pip"):
        gpus.compile_only_devices("h100")
    monkeypatch.setattr(gpus.importlib.metadata, "version", lambda name: "0.1.2")
    with pytest.raises(UserError, match=r"which is 0\.1\.2 here; install it with"):
        gpus.compile_only_devices("h100")


def test_without_the_assembler_or_with_an_old_one_a_sentence_says_so(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(gpus.importlib.metadata, "version", lambda name: jax.__version__)
    monkeypatch.setattr(gpus.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="ptxas, which is not on the PATH; install"):
        gpus.compile_only_devices("h100")
    old = tmp_path / "ptxas"
    old.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 11.8, V11.8.89'\n")
    old.chmod(0o755)
    with pytest.raises(UserError, match="ptxas of CUDA 13 or later, got CUDA 11"):
        gpus.compile_only_devices("h100")


@needs_cuda
def test_a_step_compiled_for_an_absent_gpu() -> None:
    found = examine.examine(resolve(get_config("digits_lt", "method=balpoe")), "h100")
    assert (found["devices"], found["expert_map"]) == (1, "stacked")
    counted = found["train"]["kernels"]
    assert counted["kinds"]["convolutions"] > 3 * 7
    assert counted["launches"] < counted["count"] == sum(counted["kinds"].values()) < 300
    assert counted["kinds"]["copies"] < 10
    assert "launches" in examine.as_text(found)
