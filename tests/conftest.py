# SPDX-License-Identifier: Apache-2.0
"""Set-up of the whole test run: four CPU devices, and no silent broadcasting between ranks."""

import os
from collections.abc import Iterator
from pathlib import Path

# Before JAX starts, and for the processes that tests start. The tests' numbers are those of a CPU.
os.environ["JAX_PLATFORMS"] = "cpu"
# What one test has compiled serves the others, and the next run: most of their time is compilation.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".pytest_cache" / "jax")
)

import jax
import jaxlib
import pytest

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def x64() -> Iterator[None]:
    """Runs one test in double precision."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def tiny_experts(request: pytest.FixtureRequest) -> Iterator[None]:
    """Whole runs of a network that is compiled in a second; `make test-all` takes the config's."""
    import tiny_network

    from balpoe_jax.experiment import build

    with pytest.MonkeyPatch.context() as patch:
        if not request.config.getoption("--all"):
            patch.setattr(build, "create_model", tiny_network.create_model)
        yield


@pytest.fixture
def no_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluations without the page, which takes as long to draw as the rest of a tiny run."""
    from balpoe_jax import evaluate

    monkeypatch.setattr(evaluate.report, "write_report", lambda workdir: "no page")


@pytest.fixture
def no_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages whose figures are empty."""
    from balpoe_jax.reporting import figures

    monkeypatch.setattr(figures, "_svg", lambda figure, name: "<svg></svg>")


# Tests that repeat others in another setting, at such a cost that `make test` leaves them out.
_COSTLY = (
    "test_reproduce.py::test_two_real_runs_at_once",
    "test_models.py::test_logits_are_the_references[experts7]",
    "test_models.py::test_logits_are_the_references[experts2]",
    "test_models.py::test_logits_are_the_references[nonorm]",
    "test_models.py::test_logits_are_the_references[reduce]",
    "test_models.py::test_gradients_are_the_references[False]",
    "test_models.py::test_gradients_are_the_references[True]",
    "test_large_models.py::test_gradients_are_the_references",
    "test_large_models.py::test_half_precision_rounds_a_little",
    "test_unreadable.py::test_a_partner_of_the_second_sampler_is_replaced_too",
    "test_models.py::test_one_expert_is_one_network_however_it_is_cut[-1]",
    "test_models.py::test_expert_map_and_rematerialisation_give_one_model[options0]",
    "test_large_models.py::test_expert_map_and_rematerialisation_change_nothing[loop]",
    "test_large_models.py::test_logits_are_the_references[resnet50/nonsquare-loop-options2]",
    "test_large_models.py::test_logits_are_the_references[resnet50/nonorm-vmap-options1]",
    "test_methods.py::test_devices_and_modes_change_nothing[mdcs-0]",
    "test_methods.py::test_devices_and_modes_change_nothing[sade-0]",
    "test_methods.py::test_devices_and_modes_change_nothing[gpaco-0]",
    # Whose first phase is cross-entropy, as the tests of their own files say.
    "test_methods.py::test_devices_and_modes_change_nothing[ltwb-0]",
    "test_methods.py::test_devices_and_modes_change_nothing[los-0]",
    "test_methods.py::test_devices_and_modes_change_nothing[crt-0]",
    "test_methods.py::test_devices_and_modes_change_nothing[lws-0]",
    "test_methods.py::test_a_restored_state_goes_on_bit_for_bit[los]",
    "test_methods.py::test_a_restored_state_goes_on_bit_for_bit[crt]",
    "test_methods.py::test_a_restored_state_goes_on_bit_for_bit[lws]",
    "test_methods.py::test_a_restored_state_goes_on_bit_for_bit[mdcs]",
    "test_methods.py::test_a_restored_state_goes_on_bit_for_bit[sade]",
    "test_methods.py::test_a_restored_state_goes_on_bit_for_bit[gpaco]",
    "test_mixing.py::test_two_hosts_and_a_resumed_run_make_the_same_batches[mix1]",
    "test_unreadable.py::test_skipping_goes_on_after_a_resume_and_on_any_hosts",
    "test_unreadable.py::test_too_many_bad_images_are_refused",
    "test_parallel.py::test_rematerialisation_changes_nothing[shard_map-loop]",
    "test_pipeline.py::test_hosts_make_the_same_global_batches[autoaugment_cifar]",
    "test_randaugment.py::test_threads_change_nothing",
    "test_benchmarks.py::test_input_pipeline",
    "test_benchmarks.py::test_both_sides_make_the_same_distribution_of_images[photos long]",
    "test_tpu_step.py::test_the_example_learns",
    "test_torch_import.py::test_evaluation_sees_the_imported_network",
    "test_processes.py::test_a_process_that_is_lost_ends_the_other[1-19]",
    "test_processes.py::test_a_training_is_preempted_and_killed_and_goes_on",
    "test_benchmarks.py::test_method_steps",
    "test_parallel.py::test_mode_devices_and_expert_map_change_nothing[pmap-1-vmap]",
    "test_methods.py::test_devices_and_modes_change_nothing[balanced_softmax-0]",
    "test_processes.py::test_the_twin_mode_trains_what_one_process_does",
    "test_processes.py::test_a_peer_lost_at_a_checkpoint_is_not_an_error_of_the_storage[restore]",
    "test_parallel.py::test_mode_devices_and_expert_map_change_nothing[pmap-4-loop]",
    "test_command_line.py::test_a_preemption_saves_the_step_it_comes_at",
    "test_processes.py::test_a_peer_lost_at_a_checkpoint_is_not_an_error_of_the_storage[save]",
    "test_models.py::test_logits_are_the_references[experts1]",
    "test_large_models.py::test_expert_map_and_rematerialisation_change_nothing[vmap]",
    "test_methods.py::test_devices_and_modes_change_nothing[ldam_drw-0]",
    "test_methods.py::test_devices_and_modes_change_nothing[ride_router-0]",
    "test_methods.py::test_devices_and_modes_change_nothing[ride_router-1]",
    "test_methods.py::test_a_restored_state_goes_on_bit_for_bit[ride_router]",
    "test_methods.py::test_a_restored_state_goes_on_bit_for_bit[ldam_drw]",
    "test_unreadable.py::test_skipped_images_are_replaced_by_the_next_of_their_class",
    "test_parallel.py::test_rematerialisation_changes_nothing[pmap-vmap]",
    "test_non_finite.py::test_a_resumed_run_counts_as_an_undisturbed_one[1]",
    "test_losses.py::test_gradients[False]",
    "test_communication.py::test_global_statistics_add_two_small_ones_an_application[2]",
    "test_communication.py::test_statistics_per_device_leave_one_all_reduce_a_step[2]",
    "test_kill.py::test_killed_runs_end_as_an_undisturbed_one",
    "test_method_runs.py::test_a_run[bcl]",
    "test_method_runs.py::test_a_run[tlc]",
    "test_method_runs.py::test_a_run[balpoe_cs]",
    "test_tpu_step.py::test_both_steps_do_the_same_work",
    "test_benchmarks.py::test_both_sides_make_the_same_distribution_of_images[cifar long]",
    "test_training.py::test_another_run_ends_with_the_same_bits",
    "test_training.py::test_a_quickly_compiled_state_has_the_usual_bits",
    "test_photo_datasets.py::test_a_training_batch_is_what_its_stages_make[augment0]",
    "test_accumulation.py::test_batch_norm_takes_each_microbatch_by_itself[pmap-4-False]",
    "test_parallel.py::test_all_shards_stay_equal[False-pmap]",
    "test_method_runs.py::test_a_run[paco]",
    "test_method_runs.py::test_a_run[mislas]",
    "test_accumulation.py::test_batch_norm_takes_each_microbatch_by_itself[pmap-1-True]",
    "test_non_finite.py::test_an_update_that_overflows_is_skipped",
    "test_samplers.py::test_batches_are_made_of_what_the_sampler_says[class_balanced]",
    "test_fuzz_config.py::test_the_command_itself_refuses_garbage"
    "[--config.eval.shift_lists=~nobody/x_forward5.txt]",
    "test_pipeline.py::test_threads_change_nothing[2]",
    "test_few_kernels.py::test_stacked_experts_are_those_of_the_loop[True]",
    "test_device_views.py::test_the_same_images_under_scan_and_on_several_devices[randaugment]",
    "test_device_runs.py::test_where_dispatches_are_cut_changes_no_bit[100]",
    "test_device_runs.py::test_single_steps_round_otherwise_at_most",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="Also run the costly tests.")


# Files whose networks are of the reference's sizes, and run for longer than they are compiled; and
# whose bits are those of programs as users compile them.
_OPTIMISED = ("test_trajectory.py", "test_large_models.py", "test_device_runs.py")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--all"):
        return
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "true")  # for processes of tests
    _set_flags_of_jax(quick_flags(config))


def quick_flags(config: pytest.Config) -> str:
    """Flags of XLA with which small programs are compiled twice as fast, and large ones as fast."""
    # Other versions may end at a flag that they do not know.
    known = jaxlib.__version__.startswith("0.10.") and not config.getoption("--all")
    return "--xla_cpu_use_fusion_emitters=false" if known else ""


def flags_of_xla(flags: str) -> dict[str, str]:
    """The variable that adds flags to those of the environment, for JAX and processes of tests.

    Without any it is left out: XLA takes a value that is blank for the name of a file of flags.
    """
    every = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()
    return {"XLA_FLAGS": every} if every else {}


def _set_flags_of_jax(flags: str) -> None:
    """Makes JAX's XLA read these flags, and not TensorFlow's.

    That one reads the same variable, but later, and would compile augmentations for minutes.
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
def quick_compilation(request: pytest.FixtureRequest) -> None:
    """Programs that run a few steps on tiny images take longer to compile than to run.

    `make test-all` compiles everything as users do.
    """
    optimised = request.path.name in _OPTIMISED or request.config.getoption("--all")
    jax.config.update("jax_disable_most_optimizations", not optimised)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--all"):
        return
    skip = pytest.mark.skip(reason="costly; make test-all runs it")
    for item in items:
        if item.nodeid.removeprefix("tests/") in _COSTLY:
            item.add_marker(skip)
