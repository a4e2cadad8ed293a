# SPDX-License-Identifier: Apache-2.0
"""The parts of a program compiled for a GPU: kernels, launches and memory traffic.

Kernels and bytes come from the text of the optimised HLO module, launches from the sequence of
"thunks" that XLA dumps: a CUDA graph is one thunk with thunks inside.
"""

import collections
import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

from balpoe_jax.aot import hlo

# Instructions that only name memory, or wait.
_FREE = (
    *("parameter", "get-tuple-element", "tuple", "bitcast", "constant", "after-all"),
    *("partition-id", "replica-id", "optimization-barrier", "async-update"),
)
_TARGET = re.compile(r'custom_call_target="([^"]+)"')
_OPERAND = re.compile(r"%([^\s,()]+)")
_PARAMETER = re.compile(r"(\d+)\)")

KINDS = ("convolutions", "products", "reductions", "copies", "collectives", "others")

# The end of the name of the file that XLA dumps the sequence to.
_SEQUENCE = "thunk_sequence_after_thunk_passes.txt"


@dataclasses.dataclass(frozen=True)
class Kernels:
    """Kernels of one run of a program, those inside loops as often as the loop runs.

    Attributes:
        kinds: Number of kernels of each of `KINDS`.
        bytes: Bytes that all of them read and write; an array that two kernels read counts twice.
    """

    kinds: dict[str, int]
    bytes: int

    @property
    def count(self) -> int:
        """Number of all kernels."""
        return sum(self.kinds.values())


def kernels(text: str) -> Kernels:
    """The kernels of a program by its text, see `compiled.as_text()`."""
    computations, entry = hlo.parse(text)
    kinds = dict.fromkeys(KINDS, 0)
    total = 0
    for kind, size, times in _visit(computations, entry, 1):
        kinds[kind] += times
        total += size * times
    return Kernels(kinds, total)


def launches(dump: Path) -> int | None:
    """Number of launches by the host in a run of the one program that XLA dumped to a folder.

    A CUDA graph counts once, and so does a kernel outside of all graphs. None without a dump.
    """
    sequences = sorted(dump.glob(f"*{_SEQUENCE}"))
    if len(sequences) != 1:
        return None
    return count_launches(sequences[0].read_text(encoding="utf-8"))


def count_launches(sequence: str) -> int:
    """Number of a dumped sequence's outermost thunks, whose lines are not indented."""
    return sum(line[:1].isdigit() for line in sequence.splitlines())


def _visit(computations: hlo.Computations, name: str, times: int) -> Iterator[tuple[str, int, int]]:
    """Kind, bytes and number of runs of every kernel in a computation."""
    results = {each.name: each.result for each in computations.get(name, ())}
    for instruction in computations.get(name, ()):
        opcode = instruction.opcode
        if opcode in _FREE or opcode.endswith("-done"):
            continue
        if opcode in ("while", "call", "conditional"):
            runs = times * hlo.trip_count(computations, instruction)
            for inner in hlo.called(instruction):
                yield from _visit(computations, inner, runs)
        else:
            read = _bytes_read(computations, instruction, results)
            yield (
                _kind(computations, instruction),
                read + hlo.array_bytes(instruction.result),
                times,
            )


def _kind(computations: hlo.Computations, instruction: hlo.Instruction) -> str:
    opcodes = {instruction.opcode} | {
        inner.opcode
        for name in hlo.called(instruction)
        for inner in computations.get(name, ())
        if instruction.opcode in ("fusion", "async-start")
    }
    target = _TARGET.search(instruction.attributes)
    called = target[1].lower() if target else ""
    if "convolution" in opcodes or "conv" in called:
        return "convolutions"
    if "dot" in opcodes or "gemm" in called or "cublas" in called:
        return "products"
    if any(opcode.removesuffix("-start") in hlo.COLLECTIVES for opcode in opcodes):
        return "collectives"
    if "reduce" in opcodes:
        return "reductions"
    return "copies" if instruction.opcode in ("copy", "copy-start") else "others"


def _bytes_read(
    computations: hlo.Computations, instruction: hlo.Instruction, results: dict[str, str]
) -> int:
    """The bytes of the operands, or of the slices of an operand that a fusion only slices."""
    operands = _OPERAND.findall(_bracket(instruction.attributes))
    sizes = [hlo.array_bytes(results.get(name, "")) for name in operands]
    if instruction.opcode == "fusion":
        for name in hlo.called(instruction):
            for index, size in _sliced(computations.get(name, [])).items():
                if index < len(sizes):
                    sizes[index] = min(sizes[index], size)
    return sum(sizes)


def _sliced(computation: list[hlo.Instruction]) -> dict[int, int]:
    """The bytes of all slices of parameters that are only sliced, by the parameter's index."""
    parameters: dict[str, int] = {}
    for instruction in computation:
        index = _PARAMETER.match(instruction.attributes)
        if instruction.opcode == "parameter" and index:
            parameters[instruction.name] = int(index[1])
    sizes: collections.Counter[int] = collections.Counter()
    whole = set()
    for instruction in computation:
        for name in set(_OPERAND.findall(_bracket(instruction.attributes))) & parameters.keys():
            if instruction.opcode in ("slice", "dynamic-slice"):
                sizes[parameters[name]] += hlo.array_bytes(instruction.result)
            else:
                whole.add(parameters[name])
    return {index: size for index, size in sizes.items() if index not in whole}


def _bracket(text: str) -> str:
    """The text up to the bracket that closes one which was opened before the text."""
    depth = 0
    for position, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth < 0:
            return text[:position]
    return text
