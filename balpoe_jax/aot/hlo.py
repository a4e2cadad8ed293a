# SPDX-License-Identifier: Apache-2.0
"""The text of a compiled program, read for its collectives and its estimated time.

The text is that of an optimised HLO module (`compiled.as_text()`): computations in braces, an
instruction a line. Only what is needed here is read; nothing else is assumed of it.
"""

import dataclasses
import math
import re
from collections.abc import Iterator

COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
)

# These start with a result that holds their operand, too.
_START_HOLDS_OPERAND = ("all-gather-start", "collective-permute-start")

_COMPUTATION = re.compile(r"^(ENTRY )?%?([^\s(]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?(\S+) = (.*?) ([a-z][a-z0-9-]*)\((.*)$")
_CALLED = re.compile(r"\b(?:calls|body|to_apply|\w+_computations?)=(\{[^}]*\}|%?[^\s,]+)")
_TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CONDITION = re.compile(r"\bcondition=%?([^\s,]+)")
_INTEGER = re.compile(r"(\d+)\)")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_ARRAY = re.compile(r"\b([a-z]+)(\d*)[a-z0-9]*\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Collective:
    """Collectives of one kind in one run of a program.

    Attributes:
        kind: Kind, one of `COLLECTIVES`.
        count: Number of runs; several arrays that travel together count once.
        bytes: Bytes of all results on one device.
    """

    kind: str
    count: int
    bytes: int


@dataclasses.dataclass(frozen=True)
class Instruction:
    """A line of a computation.

    Attributes:
        name: Name without the leading "%".
        opcode: Operation, such as "fusion".
        result: Type of the result.
        attributes: Rest of the line after the opening bracket, operands first.
    """

    name: str
    opcode: str
    result: str
    attributes: str


Computations = dict[str, list[Instruction]]


def collectives(text: str) -> list[Collective]:
    """The collectives of a program by kind, those inside loops as often as the loop runs."""
    return _add_up(
        (kind, count, count * array_bytes(_communicated(instruction)))
        for kind, count, instruction in _find_collectives(text)
    )


def estimated_cycles(text: str) -> int | None:
    """The cycles that the TPU compiler expects of a program; None for a platform without estimates.

    It is the sum over the instructions, which a core runs one after the other. Transfers meanwhile,
    such as collectives, have no estimate and do not count.
    """
    computations, entry = parse(text)
    if _CYCLES.search(text) is None:
        return None
    return _cycles(computations, entry)


def _cycles(computations: Computations, name: str) -> int:
    total = 0
    for instruction in computations.get(name, ()):
        estimate = _CYCLES.search(instruction.attributes)
        if estimate:  # a fusion has one as a whole
            total += int(estimate[1])
        else:
            inside = sum(_cycles(computations, name) for name in called(instruction))
            total += trip_count(computations, instruction) * inside
    return total


def _find_collectives(text: str) -> Iterator[tuple[str, int, Instruction]]:
    computations, entry = parse(text)

    def visit(name: str, times: int) -> Iterator[tuple[str, int, Instruction]]:
        for instruction in computations.get(name, ()):
            kind = instruction.opcode.removesuffix("-start")
            if kind in COLLECTIVES:
                yield kind, times, instruction
            else:
                for inner in called(instruction):
                    yield from visit(inner, times * trip_count(computations, instruction))

    return visit(entry, 1)


def _add_up(found: Iterator[tuple[str, int, int]]) -> list[Collective]:
    totals: dict[str, tuple[int, int]] = {}
    for kind, count, size in found:
        before = totals.get(kind, (0, 0))
        totals[kind] = before[0] + count, before[1] + size
    return [Collective(kind, *totals[kind]) for kind in COLLECTIVES if kind in totals]


def parse(text: str) -> tuple[Computations, str]:
    """The instructions of every computation by its name, and the name of the first to run."""
    computations: Computations = {}
    entry, current = "", []
    for line in text.splitlines():
        header = _COMPUTATION.match(line)
        if header:
            current = computations.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        elif found := _INSTRUCTION.match(line):
            current.append(Instruction(found[1], found[3], found[2], found[4]))
    return computations, entry


def called(instruction: Instruction) -> list[str]:
    """The computations that run as part of an instruction."""
    if instruction.opcode in ("async-update", "async-done"):  # of what async-start called
        return []
    found = _CALLED.findall(instruction.attributes)
    return [name.strip(" %") for names in found for name in names.strip("{}").split(",")]


def trip_count(computations: Computations, instruction: Instruction) -> int:
    """Number of runs of a loop's body; 1 if it is unknown, and for what is no loop.

    A CPU's compiler writes it down. In the text of a TPU's it is the one constant that a counter is
    compared with, since the loops of `lax.scan` count up from 0.
    """
    known = _TRIP_COUNT.search(instruction.attributes)
    if known:
        return int(known[1])
    condition = _CONDITION.search(instruction.attributes)
    if instruction.opcode != "while" or condition is None:
        return 1
    tests = computations.get(condition[1], [])
    below = [test for test in tests if "direction=LT" in test.attributes]
    limits = [_INTEGER.match(test.attributes) for test in tests if test.opcode == "constant"]
    if len(below) == len(limits) == 1 and limits[0]:
        return int(limits[0][1])
    return 1


def _communicated(instruction: Instruction) -> str:
    """The type of a collective's result on a device."""
    if instruction.opcode not in _START_HOLDS_OPERAND:
        return instruction.result
    return _elements(instruction.result)[1]


def _elements(tuple_type: str) -> list[str]:
    """The outermost elements of a tuple's type."""
    elements, depth = [""], 0
    for character in tuple_type.strip()[1:-1]:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            elements.append("")
        else:
            elements[-1] += character
    return elements


def array_bytes(type_text: str) -> int:
    """The memory of all arrays in a type such as `(f32[2,3]{1,0}, bf16[])`, without padding."""
    total = 0
    for kind, bits, dimensions in _ARRAY.findall(type_text):
        size = math.prod(int(length) for length in dimensions.split(",") if length)
        total += size * (1 if kind == "pred" else int(bits or 0) // 8)
    return total
