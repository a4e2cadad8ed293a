# SPDX-License-Identifier: Apache-2.0
"""Generated garbage in a config's arguments and overrides: success, or one sentence and code 2."""

import sys
from unittest import mock

import pytest
from absl import flags
from hypothesis import example, given
from hypothesis import strategies as st

from balpoe_jax import cli
from balpoe_jax import config as config_lib
from balpoe_jax.experiment.build import build
from balpoe_jax.methods import PRESETS
from tests.helpers import ROOT
from tests.helpers.commands import run_main
from tests.helpers.config_files import get_config
from tests.helpers.fuzzing import count, fuzzed, sentence_of, time_limit

# Of ml_collections, when it loads a config file.
pytestmark = [
    pytest.mark.integration,
    pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning"),
]

CONFIGS = ("digits_lt", "cifar10_lt", "cifar100_lt", "imagenet_lt", "inaturalist2018")

NUMBERS = st.one_of(
    st.integers().map(str),
    st.integers(-3, 40).map(str),
    st.sampled_from([str(10**sign) for sign in (3, 6, 9, 12, 18, 19, 30, 400)]),
    st.floats().map(str),
    st.sampled_from(["nan", "inf", "-inf", "1e400", "1e-400", "0x10", "1_0", "٣", "²", "9" * 5000]),
)
HOSTILE = st.sampled_from(
    [
        "", " ", ",", "=", "()", "(", "((", "(,)", "[1,2]", "{}", "None", "True", "false", "'", '"',
        "a\nb", "\t", "\x00", "\ud800", "é🙂", "../..", "/dev/zero", "$(touch hacked)", "`id`",
        "__import__('os').getcwd()", "(" * 300, "1+" * 300 + "1", "%s%n", "--workdir=x",
    ]
)  # fmt: skip
WORDS = st.one_of(
    st.sampled_from(
        [
            "balpoe", "standard", "long", "resnet8", "resnet32", "resnet50", "bfloat16", "vmap",
            "linear", "cosine", "step", "pmap", "shard_map", "digits", "skip", "randaugment",
            "autoaugment_cifar", "1.5", "2", "0", "1", "-1",
        ]
    ),
    st.text(max_size=20),
)  # fmt: skip
TUPLES = st.lists(st.one_of(NUMBERS, WORDS), max_size=4).map(lambda items: f"({','.join(items)})")
VALUES = st.one_of(NUMBERS, WORDS, HOSTILE, TUPLES)

KEYS = st.one_of(
    st.sampled_from(["ir", "recipe", "method", "mixup", "experts", "backbone", "epochs"]),
    st.sampled_from(["batch_size", "speed", "", " ir"]),
    st.text(max_size=5),
)
PLAUSIBLE = {
    "ir": st.sampled_from(["100", "50", "10"]),
    "recipe": st.sampled_from(["standard", "strong", "long"]),
    "method": st.sampled_from(list(PRESETS)),
    "mixup": st.sampled_from(["true", "False"]),
    "experts": st.integers(0, 9).map(str),
    "epochs": st.integers(0, 900).map(str),
    "batch_size": st.integers(0, 4096).map(str),
}
ARGUMENTS = st.one_of(
    st.fixed_dictionaries({}, optional=PLAUSIBLE).map(
        lambda chosen: ",".join(f"{key}={value}" for key, value in chosen.items())
    ),
    st.lists(st.tuples(KEYS, VALUES).map("=".join), max_size=4).map(",".join),
    st.text(max_size=40),
)


@pytest.mark.parametrize("name", CONFIGS)
@fuzzed(60)
@given(arguments=ARGUMENTS)
def test_arguments_of_a_config(name: str, arguments: str) -> None:
    sentence_of(lambda: config_lib.resolve(get_config(name, arguments)))


def fields(config, prefix: str = "config") -> list[str]:
    """The dotted name of every field and section."""
    names = []
    for name, value in config.items():
        names.append(f"{prefix}.{name}")
        names += fields(value, names[-1]) if hasattr(value, "items") else []
    return names


FIELDS = st.one_of(
    st.sampled_from([f for f in fields(get_config("digits_lt")) if f != "config.data.name"]),
    st.sampled_from(["config", "config.", "config.nme", "config.data.name.x", "config.data[0]"]),
    st.text(max_size=10).map(lambda text: f"config.{text}"),
)
LEAVES = {  # by their types, which a field has that is None by default, too
    f"{section}.{name}": content.get_type(name)
    for section, content in get_config("digits_lt").items()
    if hasattr(content, "items")
    for name in content
    if (section, name) != ("data", "name")
}
LIKE = {
    bool: st.booleans().map(str),
    int: st.integers(-1, 300).map(str),
    float: st.floats(-1, 3).map(str),
    str: WORDS,
    tuple: st.lists(st.floats(0, 60).map(str), max_size=3).map(
        lambda items: f"({','.join(items)},)"
    ),
}


def typed(name: str) -> st.SearchStrategy[str]:
    """Overrides of a field with values of its type."""
    return LIKE[LEAVES[name]].map(lambda value: f"config.{name}={value}")


OVERRIDES = st.lists(
    st.one_of(
        st.sampled_from(sorted(LEAVES)).flatmap(typed),
        st.tuples(FIELDS, st.sampled_from(["=", "=", " ", ""]), VALUES).map("".join),
    ),
    max_size=3,
).map(lambda items: [f"--{item}" for item in items])


@pytest.fixture(scope="module", autouse=True)
def run_flags() -> None:
    if "workdir" not in flags.FLAGS:
        cli.define_run_flags()


def parse(overrides: list[str]):
    """The config that the real command would start with; SystemExit if it would refuse."""
    path = f"--config={ROOT}/configs/digits_lt.py:experts=1"
    arguments = ["main", path, "--workdir=unused", *overrides]
    try:
        with mock.patch.object(sys, "argv", arguments):  # where ml_collections finds the overrides
            cli._parse_flags(arguments)
        return flags.FLAGS.config
    finally:
        flags.FLAGS.unparse_flags()
        for name in [name for name in flags.FLAGS if name.startswith("config.")]:
            delattr(flags.FLAGS, name)


def test_parsing_leaves_nothing_behind() -> None:
    assert [parse(o).seed for o in (["--config.seed=3"], [], ["--config.seed=4"])] == [3, 1, 4]


@fuzzed(400)
@given(overrides=OVERRIDES)
@example(overrides=["--config.total_epochs=1000000000000"])
@example(overrides=["--config.model.num_experts=1000000000"])
@example(overrides=["--config.optim.decay_factor=1000000000000000000000000000000"])
@example(overrides=["--config=/dev/zero"])
@example(overrides=["--config.batch_size=4", "--config.optim.accumulation_steps=3"])
def test_overrides(capsys, overrides: list[str]) -> None:
    capsys.readouterr()
    with time_limit():
        try:
            config = parse(overrides)
        except SystemExit as end:
            config, code = None, end.code
    if config is not None:
        sentence_of(lambda: build(config_lib.resolve(config)))
        return
    count("refused by the parser")
    assert code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("Error: ") and len(lines[0]) < 5000


@pytest.mark.slow_cases("--config.eval.shift_lists=~nobody/x_forward5.txt")
@pytest.mark.parametrize(
    "argument",
    [
        "--config.loss.taus=" + "(" * 300,
        "--config.eval.shift_lists=~nobody/x_forward5.txt",
    ],
)
def test_the_command_itself_refuses_garbage(tmp_path, argument: str) -> None:
    result = run_main("--config=configs/digits_lt.py", f"--workdir={tmp_path}/run", argument)
    assert (result.returncode, len(result.stderr.splitlines())) == (2, 1), result.stderr
    assert result.stderr.startswith("Error: ")
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".json", ".jsonl")]
