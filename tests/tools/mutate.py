# SPDX-License-Identifier: Apache-2.0
"""Makes twenty mistakes in important code, one at a time, and reports whether a test notices each.

    python tests/tools/mutate.py [NUMBER ...]

It works on a copy of the files that git tracks, with this Python. A mutation replaces one text in
one file. The tests named with it run on the copy, first without any mutation. The outcome is
written to `mutations.md` next to this file; with numbers, only their rows are.
"""

import dataclasses
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = Path(__file__).parent / "mutations.md"
HEAD = (
    "# Mutations",
    "",
    "Written by `python tests/tools/mutate.py`.",
    "",
    "| | file | mistake | tests | outcome |",
    "| --- | --- | --- | --- | --- |",
)
CACHE = ROOT / ".pytest_cache" / "jax"
SECONDS = 900  # after which the tests count as failed


@dataclasses.dataclass(frozen=True)
class Mutation:
    """One mistake.

    Attributes:
        file: Path of the mutated file below `balpoe_jax`.
        old: Text that occurs once in it.
        new: Text that replaces it.
        tests: Path below `tests` of the tests that should fail, or a pytest id with `::`.
        mistake: Description of the mistake.
    """

    file: str
    old: str
    new: str
    tests: str
    mistake: str


LOSSES, OPTIM, SAMPLERS = "test_losses.py", "test_optim.py", "data/batches/test_samplers.py"
MIXING, PHASES = "data/batches/test_mixing.py", "experiment/test_phases.py"

MUTATIONS = (
    Mutation("losses.py", "bias = taus *", "bias = -taus *", LOSSES, "the bias has the other sign"),
    Mutation(
        "losses.py",
        "log_prior, taus).mean(axis=0)",
        "log_prior, taus).sum(axis=0)",
        LOSSES,
        "the loss is a sum over experts",
    ),
    Mutation(
        "losses.py",
        "* e / (num_experts - 1)",
        "* e / num_experts",
        LOSSES,
        "the last tau is not the upper end",
    ),
    Mutation(
        "optim.py",
        "sum(epoch >= boundary",
        "sum(epoch > boundary",
        OPTIM,
        "the rate decays an epoch late",
    ),
    Mutation(
        "optim.py",
        "(1 - warmup_start) * (1 + epoch) / warmup_epochs",
        "(1 - warmup_start) * epoch / warmup_epochs",
        OPTIM,
        "the warm-up begins at nothing",
    ),
    Mutation(
        "step.py",
        "jax.tree.map(lambda x: x / count, total)",
        "total",
        "test_accumulation.py::test_microbatches_make_the_step_of_the_large_batch",
        "gradients of microbatches are a sum",
    ),
    Mutation(
        "step.py",
        '"learns" if phase.trainable(path) else "frozen"',
        '"learns"',
        PHASES,
        "weight decay moves what a phase freezes",
    ),
    Mutation(
        "step.py",
        "return new if counts_steps else jnp.where(keep, new, old)",
        "return jnp.where(keep, new, old)",
        "run/test_non_finite.py::test_a_skipped_step_changes_nothing_but_the_counts",
        "a skipped step is not counted",
    ),
    Mutation(
        "experiment/phases.py",
        "(step - 1 - self.first_step)",
        "(step - self.first_step)",
        PHASES,
        "the logged rate changes a step early",
    ),
    Mutation(
        "experiment/phases.py",
        "if step <= plan.last_step)",
        "if step < plan.last_step)",
        PHASES,
        "the last step of a phase is the next one's",
    ),
    Mutation(
        "data/batches/samplers.py",
        "turn // self._num_classes * self._run +",
        "turn // self._num_classes +",
        SAMPLERS,
        "examples of a class come again before their turn",
    ),
    Mutation(
        "data/batches/samplers.py",
        "(sizes / sizes.max()) ** exponent",
        "(sizes / sizes.max()) ** (exponent / 2)",
        SAMPLERS,
        "classes are drawn by another power of their sizes",
    ),
    Mutation(
        "data/batches/mixing.py",
        "return partners[self._rows] - self._rows.start",
        "return partners[self._rows]",
        MIXING,
        "the second host mixes with rows that it does not have",
    ),
    Mutation(
        "data/batches/mixing.py",
        "(counts >= kappa * other_counts) & (weight < threshold)",
        "(counts > kappa * other_counts) & (weight < threshold)",
        MIXING,
        "Remix leaves out the ratio that it should begin at",
    ),
    Mutation(
        "data/randomness.py",
        "seed >> 31 & 0x7FFFFFFF",
        "0",
        "data/test_pipeline.py::test_every_bit_of_a_seed_counts",
        "seeds that differ above 31 bits are one",
    ),
    Mutation(
        "run/checkpoint.py",
        'r"0|[1-9]\\d*", name))[::-1]',
        'r"0|[1-9]\\d*", name))',
        "run/test_integrity.py",
        "a run resumes from its oldest checkpoint",
    ),
    Mutation(
        "evaluation/priors.py",
        "prior = (expected + pseudocount) / total",
        "prior = expected / expected.sum()",
        "evaluation/test_priors.py",
        "the estimate leans to nothing",
    ),
    Mutation(
        "evaluation/scoring.py",
        "weight = concentration(len(target.indices), ",
        "weight = concentration(num_examples, ",
        "evaluation/test_scoring.py",
        "the strength follows the whole test set",
    ),
    Mutation(
        "metrics/accuracy.py",
        "ShotGroups(counts > high,",
        "ShotGroups(counts >= high,",
        "metrics/test_metrics.py",
        "a class at the threshold has many shots, too",
    ),
    Mutation(
        "data/long_tail.py",
        "int(max_count * factor ** (rank / last))",
        "round(max_count * factor ** (rank / last))",
        "data/test_long_tail.py",
        "counts are rounded and not cut",
    ),
)


def copy_tree(folder: Path) -> None:
    """Copies the files that git tracks, with their content in the checkout."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True)
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file() and not name.startswith("results/"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)


def passes(folder: Path, tests: str) -> bool:
    """Whether tests of the copy pass, without slow ones."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-m", "not slow", "-n", "0"]
    try:
        done = subprocess.run(
            [*command, f"tests/{tests}"],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(folder), "JAX_COMPILATION_CACHE_DIR": str(CACHE)},
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
    except subprocess.TimeoutExpired:
        return False
    if done.returncode not in (0, 1):
        raise RuntimeError(f"{tests} did not run:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.returncode == 0


def survives(folder: Path, mutation: Mutation) -> bool:
    """Whether the tests pass with a mistake; the file is restored afterwards."""
    path = folder / "balpoe_jax" / mutation.file
    text = path.read_text()
    if text.count(mutation.old) != 1:
        raise ValueError(f"{mutation.file} should hold {mutation.old!r} once")
    try:
        path.write_text(text.replace(mutation.old, mutation.new))
        return passes(folder, mutation.tests)
    finally:
        path.write_text(text)


def main(numbers: list[int]) -> None:
    """Tries the mutations of these numbers, or all, and writes the outcome."""
    chosen = numbers or list(range(1, len(MUTATIONS) + 1))
    rows = rows_of(PAGE) if numbers else {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        copy_tree(folder)
        for tests in dict.fromkeys(MUTATIONS[number - 1].tests for number in chosen):
            if not passes(folder, tests):
                raise RuntimeError(f"tests/{tests} fails without a mutation")
        for number in chosen:
            mutation = MUTATIONS[number - 1]
            outcome = "**survived**" if survives(folder, mutation) else "killed"
            rows[number] = (
                f"| {number} | `{mutation.file}` | {mutation.mistake} | `{mutation.tests}` "
                f"| {outcome} |"
            )
            print(rows[number], flush=True)
    killed = sum("| killed |" in row for row in rows.values())
    lines = [*HEAD, *(rows[number] for number in sorted(rows)), ""]
    PAGE.write_text("\n".join([*lines, f"{killed} of {len(rows)} were killed."]) + "\n")


def rows_of(page: Path) -> dict[int, str]:
    """The rows of a written page by their numbers."""
    lines = page.read_text().splitlines() if page.exists() else []
    return {int(found[1]): found[0] for line in lines if (found := re.match(r"\| (\d+) .*", line))}


if __name__ == "__main__":
    main([int(argument) for argument in sys.argv[1:]])
