# SPDX-License-Identifier: Apache-2.0
"""Measures what a few minutes on a borrowed accelerator allow, in order of value.

    python -m benchmarks.accelerator --minutes=8 --output=DIR [--data_dir=PLACE]
    python -m benchmarks.accelerator --rows=NAME,... --minutes=8 --output=DIR --data_dir=PLACE
    python -m benchmarks.accelerator --pack=FOLDER --data_dir=PLACE
    python -m benchmarks.accelerator --toy --output=DIR

It needs neither TensorFlow nor a network. `--rows` trains seeds of these rows and nothing else; a
row's name is that of its folder in `python -m balpoe_jax.reproduce`. `--pack` packs CIFAR-100-LT
into 43 MiB, which the other commands take as `--data_dir`; without data nothing is trained. Each
result is a line of `DIR/results.jsonl` once it is known. `DIR/benchmarks.md` and `DIR/results.md`
follow at the end, also after SIGTERM. `benchmarks/README.md` explains the figures.
"""

import difflib
import importlib.metadata
import importlib.util
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from balpoe_jax import cli
from balpoe_jax.errors import UserError
from balpoe_jax.files import reports_write_errors
from balpoe_jax.reproduce.paper import PaperRow
from balpoe_jax.reproduce.tables import TABLES
from benchmarks import sides, step_cases
from benchmarks.sides import Clock, Job, Row

CONV_FUSION = "--xla_gpu_experimental_enable_conv_fusion=true"
DETERMINISTIC = (
    "--xla_gpu_deterministic_ops=true",
    "--xla_gpu_exclude_nondeterministic_ops=true",
)

# Tiny programs take longer to compile than to run: a toy run compiles quickly, and nothing twice.
_QUICK_FLAG = "--xla_cpu_use_fusion_emitters=false"
_QUICK = {
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "true",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
}

# Seconds reserved for the tables at the end.
_TABLES = 3.0

# A seed of Table 2: its steps, seconds of everything else, and all seconds if no step was timed.
_STEPS, _OVERHEAD, _UNMEASURED = 17_000, 40.0, 90.0

# Largest ratio of step times at which a flag is used.
_FASTER = 0.98

# Largest relative difference of first losses under other flags.
_SAME_LOSSES = 1e-3

_SEEDS = 5

# Rows of Table 2 in the order of training.
TABLE_2 = tuple(
    row
    for method in ("BalPoE", "BalPoE, no mixup", "CE", "Mixup", "balanced softmax")
    for row in TABLES["2"].rows
    if row.method == method
)


class Bench:
    """One run of the command.

    Args:
        output: Folder of everything that is written.
        minutes: Time for everything.
        data_dir: Place of CIFAR-100, or a folder of mosaics; empty for none.
        toy: Whether everything is tiny.
        rows_to_train: Rows of CIFAR-100-LT that are trained.

    Attributes:
        output, toy, rows_to_train: Arguments of the same names.
        clock: Clock that tells the time left.
        data: Path of the file with images for trainings; empty for none.
        sizes: Sizes of networks, images and measurements.
        check: Path of the file with PyTorch's first losses.
    """

    def __init__(
        self,
        output: Path,
        minutes: float,
        data_dir: str,
        toy: bool,
        rows_to_train: Sequence[PaperRow],
    ) -> None:
        self.output, self.toy, self.rows_to_train = output, toy, rows_to_train
        self.clock = Clock(time.time() + 60 * minutes - _TABLES)
        self.data = ""
        self._data_dir, self._results = data_dir, output / "results.jsonl"
        self.sizes = step_cases.sizes(toy)
        self.check = str(output / "first_losses.npz")

    @property
    def rows(self) -> list[Row]:
        """The results so far."""
        return sides.read(self._results)

    def write(self, part: str, side: str = "-", **values: Any) -> None:
        """Adds a result."""
        sides.write(self._results, {"part": part, "side": side, **values})

    def run(
        self,
        module: str,
        part: str,
        side: str,
        options: Row,
        share: float = 1.0,
        least: float = 20.0,
        xla_flags: Sequence[str] = (),
    ) -> None:
        """Runs a side in its own process, if there is time for the least it does.

        Args:
            module: Module of the side.
            part: Part that the results belong to.
            side: Name of the side.
            options: Options of the side's job.
            share: Share of the remaining time that the side may take.
            least: Seconds that must remain for the side to begin.
            xla_flags: Options of XLA.
        """
        seconds = self.clock.left * share
        if self.clock.left < least:
            self.write(part, side, skipped=sides.no_time(self.clock, least))
            return
        deadline = time.time() + max(seconds, least)
        job = Job(part, side, str(self._results), deadline, {"toy": self.toy, **options})
        log = self.output / f"{part}_{side}.log"
        quick = _QUICK if self.toy else {}
        # Later versions have the flag's name in their libraries, but exit when they get it.
        if self.toy and importlib.metadata.version("jaxlib").startswith("0.10."):
            xla_flags = [*xla_flags, _QUICK_FLAG]
        sides.run(f"benchmarks.{module}", job, log, xla_flags, **quick)

    def generated(self) -> str:
        """A file of generated images, for the device pipeline's step times."""
        from benchmarks import packed_data

        path = self.output / "generated" / f"{packed_data.NAME}.npz"
        if not path.exists():
            packed_data.generate(path, self.sizes.train_per_class, self.sizes.test_per_class)
        return str(path)

    def find_data(self) -> None:
        """Prepares the data for trainings, or writes why there are none."""
        from balpoe_jax.data import datasets
        from balpoe_jax.data.datasets import cifar
        from benchmarks import packed_data

        path = self.output / "data" / f"{packed_data.NAME}.npz"
        place, generated = self._data_dir, False
        if not place and self.toy:
            place, generated = str(self.output / "mosaics"), True
            packed_data.pack(self.generated(), Path(place), self.sizes.ratio, verify_counts=False)
        if not place:
            self.write("data", skipped="no --data_dir was given, so that nothing is trained")
            return
        try:
            if packed_data.is_packed(place):
                packed_data.unpack(Path(place), path)
                place = str(path)
            train, test = cifar.load(packed_data.NAME, place)
            datasets.load(packed_data.NAME, self.sizes.ratio, place, not self.toy)
        except UserError as error:
            self.write("data", skipped=f"nothing is trained: {error}")
            return
        if not place.endswith(".npz"):  # a `.npz` file needs no further package
            packed_data.save(path, train.images, train.labels, test.images, test.labels)
            place = str(path)
        self.data = str(Path(place).absolute())
        order = packed_data.has_archive_order(train.labels)
        self.write("data", archive_order=order, generated=generated, toy=self.toy)


def device(bench: Bench) -> None:
    """Device, driver, versions and flags."""
    bench.run("device_step", "device", "jax", {"task": "device"}, least=10)


def small_steps(bench: Bench) -> None:
    """Step time of ResNet-32 x 3, in PyTorch, in JAX and with convolutions fused."""
    options: Row = {"network": "small", "check": bench.check, "data": bench.generated()}
    cases = step_cases.chosen(step_cases.SMALL_TORCH, bench.toy)
    _torch(bench, "steps", {**options, "cases": cases}, share=0.15)
    options |= {"task": "steps", **_cache(bench)}
    cases = step_cases.chosen(step_cases.SMALL, bench.toy)
    precisions = ["highest", "default"]
    bench.run(
        "device_step",
        "steps",
        "jax",
        {**options, "cases": cases, "precisions": precisions},
        share=0.4,
    )
    cases = step_cases.chosen(step_cases.SMALL_FUSED, bench.toy)
    bench.run(
        "device_step",
        "steps",
        "conv_fusion",
        {**options, "cases": cases, "precisions": ["default"]},
        share=0.25,
        xla_flags=[CONV_FUSION],
    )


def _torch(bench: Bench, part: str, options: Row, share: float) -> None:
    if importlib.util.find_spec("torch") is None:
        bench.write(part, "torch", skipped="PyTorch is not installed")
        return
    bench.run("torch_step", part, "torch", options, share=share)


def _cache(bench: Bench) -> Row:
    """The compilation cache of a toy run; a real run has none, because it times compilation."""
    return {"cache": str(bench.output / "cache")} if bench.toy else {}


def first_seed(bench: Bench) -> None:
    """One seed of BalPoE's row of Table 2, at full scale."""
    bench.find_data()
    _train(bench, "table2", [(bench.rows_to_train[0], 1)])


def photo_steps(bench: Bench) -> None:
    """Step times of ResNet-50 and ResNeXt-50 x 3."""
    check = str(bench.output / "first_photo_losses.npz")
    options: Row = {"network": "resnet50", "check": check if bench.toy else ""}
    cases = step_cases.chosen(step_cases.PHOTOS_TORCH, bench.toy)
    _torch(bench, "photos", {**options, "cases": cases}, share=0.25)
    cases = step_cases.chosen(step_cases.PHOTOS, bench.toy)
    options |= {"task": "steps", "cases": cases, "precisions": ["highest"], **_cache(bench)}
    bench.run("device_step", "photos", "jax", options, share=0.6, least=40)


def same_bits(bench: Bench) -> None:
    """Whether two runs lead to the same bits, without and with deterministic operations."""
    options = {"task": "bits", "data": bench.generated(), **_cache(bench)}
    every = {"default": (), "deterministic": DETERMINISTIC}
    for side, xla_flags in list(every.items())[-1 if bench.toy else 0 :]:
        for run in (1, 2):
            bench.run(
                "device_step", "bits", side, {**options, "run": run}, least=40, xla_flags=xla_flags
            )
        made = [row for row in bench.rows if row["side"] == side and "digest" in row]
        if len(made) == 2:
            equal = made[0]["digest"] == made[1]["digest"]
            flags_used = " ".join(xla_flags) or "no flags"
            bench.write("bits", side, equal=equal, steps=made[0]["steps"], flags=flags_used)


def more_seeds(bench: Bench) -> None:
    """More seeds of BalPoE, then the other rows, seed by seed."""
    first, *rest = bench.rows_to_train
    more = [(first, seed) for seed in range(2, _SEEDS + 1)]
    others = [(row, seed) for seed in range(1, _SEEDS + 1) for row in rest]
    _train(bench, "seeds", more[:1] if bench.toy else [*more, *others])


def named_rows(bench: Bench) -> None:
    """Seeds of the rows that `--rows` names, seed by seed."""
    bench.find_data()
    seeds = range(1, 2 if bench.toy else _SEEDS + 1)
    _train(bench, "seeds", [(row, seed) for seed in seeds for row in bench.rows_to_train])


def _train(bench: Bench, part: str, runs: Sequence[tuple[PaperRow, int]]) -> None:
    """Trains seeds of rows, one after the other, as long as there is time for another."""
    if not bench.data:
        bench.write(part, "jax", skipped="there are no data")
        return
    estimate = 5.0 if bench.toy else seed_seconds(bench.rows)
    fused = fusion_helps(bench.rows)
    fields: Row = {
        "data.data_dir": bench.data,
        "compilation_cache_dir": str(bench.output / "cache"),
    }
    if bench.toy:
        fields |= {"batch_size": 64, "data.verify_counts": False, "eval.shift_ratios": ()}
    rows = []
    for row, seed in runs:
        experiment = row.experiment
        arguments, own = experiment.arguments, dict(experiment.fields)
        if bench.toy:
            arguments = arguments.replace("ir=100", f"ir={bench.sizes.ratio}")
            arguments += f",backbone={bench.sizes.small},epochs=1"
        asked = {"row": row.method, "name": experiment.name, "arguments": arguments, "seed": seed}
        rows.append({**asked, "fields": own, "estimate": estimate})
    options = {"rows": rows, "fields": fields, "runs": str(bench.output / "runs")}
    options["cache"] = str(bench.output / "cache")
    xla_flags = [CONV_FUSION] if fused else []
    bench.run("device_rows", part, "jax", options, least=estimate, xla_flags=xla_flags)


def seed_seconds(rows: Sequence[Row]) -> float:
    """The seconds of a seed of Table 2: as measured, or estimated from the time of a step.

    Args:
        rows: List of the results so far.
    """
    took = [row["seconds"] for row in rows if row["part"] == "table2" and "top1" in row]
    if took:
        return max(took)
    times = [row["ms_a_step"] for row in _scanned(rows).values()]
    return _OVERHEAD + _STEPS * max(times) / 1e3 if times else _UNMEASURED


def fusion_helps(rows: Sequence[Row]) -> bool:
    """Whether the step of Table 2 is faster with fused convolutions, and begins with equal losses.

    Args:
        rows: List of the results so far.
    """
    found = _scanned(rows)
    if not {"jax", "conv_fusion"} <= found.keys():
        return False
    plain, fused = found["jax"], found["conv_fusion"]
    pairs = zip(fused["losses"], plain["losses"], strict=True)
    same = all(math.isclose(a, b, rel_tol=_SAME_LOSSES) for a, b in pairs)
    return same and fused["ms_a_step"] < _FASTER * plain["ms_a_step"]


def _scanned(rows: Sequence[Row]) -> dict[str, Row]:
    """The results by side of the step as in Table 2: several steps a dispatch, in float32."""
    kind = {"dtype": "float32", "expert_map": "loop", "dispatch": "several"}
    return {
        row["side"]: row
        for row in rows
        if "ms_a_step" in row and all(row.get(name) == value for name, value in kind.items())
    }


# In order of value.
PARTS: tuple[Callable[[Bench], None], ...] = (
    device,
    small_steps,
    first_seed,
    photo_steps,
    same_bits,
    more_seeds,
)
PARTS_OF_NAMED_ROWS = (device, named_rows)


def find_rows(names: Sequence[str]) -> list[PaperRow]:
    """The rows of CIFAR-100-LT whose folders have these names.

    Args:
        names: Names of folders of `python -m balpoe_jax.reproduce`, for any table.

    Raises:
        UserError (a `ValueError`): a row that there is not, that is of another data set, or that
            learns from the run of another row.
    """
    known = {row.experiment.name: row for table in TABLES.values() for row in table.rows}
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=3)
            hint = f"did you mean {' or '.join(close)}?" if close else "see --mode=print."
            raise UserError(f"No table of balpoe_jax.reproduce has a row {name!r}; {hint}")
        experiment = known[name].experiment
        if experiment.config != "cifar100_lt.py" or experiment.teacher:
            raise UserError(
                f"The row {name!r} should be of CIFAR-100-LT and without a teacher; run it with "
                "python -m balpoe_jax.reproduce."
            )
    return [known[name] for name in names]


def write_tables(bench: Bench) -> None:
    """Writes and prints the results so far as Markdown."""
    from benchmarks import accelerator_tables

    texts = {
        "benchmarks.md": accelerator_tables.benchmarks(bench.rows),
        "results.md": accelerator_tables.results(bench.rows, bench.rows_to_train),
    }
    for name, text in texts.items():
        with reports_write_errors(bench.output / name):
            (bench.output / name).write_text(text, encoding="utf-8")
        print(f"\n{text}", flush=True)


def define_flags() -> None:
    """Defines --minutes, --output, --data_dir, --rows, --pack and --toy."""
    flags.DEFINE_float("minutes", 8.0, "Minutes for everything.", lower_bound=0.5)
    flags.DEFINE_string("output", "", "New folder that everything is written to.")
    flags.DEFINE_string("data_dir", "", "Place of CIFAR-100, or a folder that --pack wrote.")
    flags.DEFINE_list("rows", [], "Rows to train, by their folders' names, and nothing else.")
    flags.DEFINE_string("pack", "", "Folder to pack the data into; nothing is measured.")
    flags.DEFINE_bool("toy", False, "Everything tiny, to try the command on a CPU.")


def main(arguments: Sequence[str]) -> None:
    """Packs data, or measures part after part."""
    if len(arguments) > 1:
        raise UserError(f"Unexpected argument {arguments[1]!r}; every option starts with --.")
    values = flags.FLAGS
    if values.pack:
        from benchmarks import packed_data

        size = packed_data.pack(values.data_dir, Path(values.pack))
        print(f"{values.pack}: {size / 2**20:.1f} MiB")
        return
    if not values.output:
        raise UserError("Expected a folder for the results; give one with --output=DIR.")
    rows_to_train = find_rows(values.rows) if values.rows else TABLE_2
    output = Path(values.output).expanduser().absolute()
    if output.exists() and any(output.iterdir()):
        raise UserError(f"{output} is not empty; choose another --output.")
    with reports_write_errors(output):
        output.mkdir(parents=True, exist_ok=True)
    bench = Bench(output, values.minutes, values.data_dir, values.toy, rows_to_train)
    with sides.preemptible():
        try:
            for part in PARTS_OF_NAMED_ROWS if values.rows else PARTS:
                part(bench)
        finally:
            write_tables(bench)


if __name__ == "__main__":
    cli.run(define_flags, main)
