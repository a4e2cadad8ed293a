# SPDX-License-Identifier: Apache-2.0
"""Set-up of the whole test run: four CPU devices, and no silent broadcasting between ranks."""

import gc
import os
import signal
from collections.abc import Iterator

from tests.helpers import ROOT

# Before JAX starts, and for the processes that tests start. The tests' numbers are those of a CPU.
os.environ["JAX_PLATFORMS"] = "cpu"
# Tests and later test runs share compiled programs: most of the time is compilation.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".pytest_cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import jax
import pytest

from tests.helpers.xla_flags import flags_of_xla, quick_flags

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_rank_promotion", "raise")
# The lines of every caller of every operation, for nobody: a twentieth of the time.
jax.config.update("jax_include_full_tracebacks_in_locations", False)


@pytest.fixture
def x64() -> Iterator[None]:
    """Runs one test in double precision."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def tiny_experts(request: pytest.FixtureRequest) -> Iterator[None]:
    """Replaces the network of whole runs by one that compiles in a second, except with `--all`."""
    from balpoe_jax.experiment import build
    from tests.helpers import tiny_network

    with pytest.MonkeyPatch.context() as patch:
        if not request.config.getoption("--all"):
            patch.setattr(build, "create_model", tiny_network.create_model)
        yield


@pytest.fixture
def no_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluates without the page, which takes as long to draw as the rest of a tiny run."""
    from balpoe_jax.reporting import report

    monkeypatch.setattr(report, "write_report_of", lambda workdir, results, test: "no page")


@pytest.fixture
def no_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves the figures of pages empty."""
    from balpoe_jax.reporting import figures

    monkeypatch.setattr(figures, "_svg", lambda figure, name: "<svg></svg>")


@pytest.fixture
def with_all(request: pytest.FixtureRequest) -> None:
    """Skips a test of what only `--all` trains or compiles."""
    if not request.config.getoption("--all"):
        pytest.skip("runs with --all only")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--all", action="store_true", help="Compile, and train the networks, as users do."
    )


def pytest_configure(config: pytest.Config) -> None:
    _take_own_cores()  # before JAX and TensorFlow start their threads
    # A job that a shell starts in the background ignores these signals, and so do its children.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    if config.getoption("--all"):
        return
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "true")  # for processes of tests
    _set_flags_of_jax(quick_flags(config))


def _take_own_cores() -> None:
    """Gives each of several test processes its share of the cores.

    Otherwise the threads of JAX and TensorFlow of all processes take turns on all cores, which
    costs a tenth of the time.
    """
    name, number = (
        os.environ.get("PYTEST_XDIST_WORKER"),
        os.environ.get("PYTEST_XDIST_WORKER_COUNT"),
    )
    if name is None or number is None or not hasattr(os, "sched_setaffinity"):
        return
    own = sorted(os.sched_getaffinity(0))[int(name.removeprefix("gw")) :: int(number)]
    if own:
        os.sched_setaffinity(0, own)


def _set_flags_of_jax(flags: str) -> None:
    """Makes JAX's XLA read these flags, but not TensorFlow's.

    TensorFlow reads the same variable, but later, and would compile augmentations for minutes.
    """
    if not flags:
        return
    before = os.environ.get("XLA_FLAGS")
    os.environ.update(flags_of_xla(flags))
    jax.block_until_ready(jax.jit(lambda: 0)())
    if before is None:
        del os.environ["XLA_FLAGS"]
    else:
        os.environ["XLA_FLAGS"] = before


@pytest.fixture(autouse=True, scope="module")
def quick_compilation(request: pytest.FixtureRequest) -> bool:
    """Whether few optimisations are made: short programs take longer to compile than to run.

    `make test-all` compiles everything as users do.
    """
    marked = request.node.get_closest_marker("optimised") is not None
    quick = not (marked or request.config.getoption("--all"))
    jax.config.update("jax_disable_most_optimizations", quick)
    return quick


@pytest.fixture
def optimised_programs(quick_compilation: bool) -> Iterator[None]:
    """Compiles one test's programs as users do: convolutions of doubles are slow otherwise."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", quick_compilation)


@pytest.hookimpl(tryfirst=True)  # before `-m` selects
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Marks the cases that `slow_cases` names, and rejects unknown ones; long files go first.

    Otherwise one process would still make whole runs when the other has nothing left to do.
    """
    unknown: dict[str, set[str]] = {}
    for item in items:
        for marker in item.iter_markers("slow_cases"):
            name = item.nodeid.partition("[")[0]
            case = item.callspec.id if isinstance(item, pytest.Function) else ""
            unknown.setdefault(name, set(marker.args)).discard(case)
            if case in marker.args:
                item.add_marker(pytest.mark.slow)
    items.sort(key=lambda item: not _is_long(item))
    selected = any("::" in argument for argument in config.args)
    stale = {name: cases for name, cases in unknown.items() if cases}
    if stale and not selected:
        raise pytest.UsageError(f"slow_cases names cases that there are not: {stale}")


def pytest_collection_finish(session: pytest.Session) -> None:
    """Looks for garbage less often, and never among what was imported: that is a tenth of the time.

    Tracing makes millions of objects which die by their reference counts.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 20)


def _is_long(item: pytest.Item) -> bool:
    """Whether all tests of an item's file are whole runs, processes or commands."""
    module = item.getparent(pytest.Module)
    return module is not None and any(mark.name == "integration" for mark in module.own_markers)
