# SPDX-License-Identifier: Apache-2.0
"""Methods are found by their files, the catalogue is theirs, a new one begins with a template."""

import ast
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from balpoe_jax import methods
from balpoe_jax.errors import UserError
from balpoe_jax.flops import count_flops
from balpoe_jax.methods import MODULES, PRESETS, Preset, PublishedResult, catalogue, scaffold
from balpoe_jax.methods.__main__ import main, write_catalogue, write_new
from balpoe_jax.methods.balpoe import BalPoE
from balpoe_jax.methods.catalogue import COSTS, Cost
from balpoe_jax.methods.sade import Sade
from balpoe_jax.models import MODELS, create_model
from tests.helpers import ROOT
from tests.helpers.config_files import get_config

pytestmark = pytest.mark.integration

FOLDER = ROOT / "balpoe_jax" / "methods"


def cost_name(cost: Cost) -> str:
    return f"{cost.network} on {cost.dataset}"


HINT = "write it again with python -m balpoe_jax.methods catalogue"


def test_every_file_with_presets_is_a_method() -> None:
    """By their text; BalPoE's first, for the others are compared with it."""
    files = [
        path.stem
        for path in FOLDER.glob("*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "PRESETS"
    ]
    found = [module.__name__.rpartition(".")[2] for module in MODULES]
    assert found == sorted(files, key=lambda name: (name != "balpoe", name))
    assert list(PRESETS) == [name for module in MODULES for name in module.PRESETS]


def test_two_files_with_one_name_are_refused() -> None:
    first = SimpleNamespace(__name__="a", PRESETS={"one": Preset(BalPoE(), "one")})
    again = SimpleNamespace(__name__="b", PRESETS={"one": Preset(Sade(), "another one")})
    with pytest.raises(UserError, match="that no other method has, got 'one' and Sade in b; ren"):
        methods._collect([first, again])
    other = type("BALPOE", (Sade,), {})
    again.PRESETS = {"two": Preset(other(), "another class of that name")}
    with pytest.raises(UserError, match="got 'two' and BALPOE in b"):
        methods._collect([first, again])


def test_importing_the_methods_reads_their_folder_and_their_code_alone(tmp_path: Path) -> None:
    code = f"""
import sys, os
sys.path.insert(0, {str(ROOT)!r})
import flax.linen, jax, optax
seen = []
def watch(event, arguments):
    if event in ("open", "os.listdir", "os.scandir") and isinstance(arguments[0], str):
        seen.append((event, arguments[0]))
sys.addaudithook(watch)
import balpoe_jax.methods

for event, path in seen:
    print(event, path)
"""
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    ).stdout
    ours = [line.split() for line in out.splitlines() if str(ROOT) in line]
    opened = {Path(path) for event, path in ours if event == "open"}
    assert {path.suffix for path in opened} <= {".py", ".pyc"} and len(opened) > 10
    listed = [path for event, path in ours if event != "open"]
    # By Python's own finder and by pkgutil.
    assert listed.count(str(FOLDER)) <= 2


def test_the_catalogue_is_that_of_the_files() -> None:
    assert (ROOT / catalogue.PAGE).read_text() == catalogue.page(MODULES), HINT
    readme = (ROOT / catalogue.README).read_text()
    assert catalogue.table(MODULES) in readme, HINT


def test_the_catalogue_has_every_preset_and_figure() -> None:
    page = catalogue.page(MODULES)
    for name, preset in PRESETS.items():
        (row,) = re.findall(rf"^\| `{name}` \|.*$", page, flags=re.MULTILINE)
        assert preset.about in row
        for published in preset.published:
            network = published.measured_on(preset)
            assert f", {network}: {published.accuracy:g}" in row
            assert f"({published.source})" in row
    assert "CIFAR-100-LT `ir=100`, ResNet-32, 3 experts: 52, ECE 4.9 (BalPoE's Table 2)" in page
    assert "CIFAR-100-LT `ir=100`, ResNet-34: 53.1 (the authors' notebook)" in page
    assert "another ResNet-32, of bottlenecks (0.30 M): 44.07 (" in page


@pytest.mark.parametrize(
    ("name", "dataset", "arguments", "network"),
    [
        ("paco", "cifar100_lt", "ir=100", "ResNet-32"),
        ("balpoe", "cifar10_lt", "ir=100,recipe=long", "ResNet-32, 3 experts"),
        ("lade", "cifar100_lt", "ir=50,backbone=resnet32_bbn", "ResNet-32 of BBN"),
        ("paco", "imagenet_lt", "", "ResNet-50"),
        ("ride", "imagenet_lt", "backbone=resnext50", "ResNeXt-50, 3 experts, reduced width"),
        ("ride_distill", "inaturalist2018", "experts=4", "ResNet-50, 4 experts, reduced width"),
        ("sade", "cifar100_lt", "ir=10", "ResNet-32, 3 experts, reduced width"),
        ("sade", "cifar10_lt", "ir=10", "ResNet-32, 3 experts"),
    ],
)
def test_a_figure_stands_with_the_network_of_its_preset_or_its_own(
    name: str, dataset: str, arguments: str, network: str
) -> None:
    preset = PRESETS[name]
    assert PublishedResult(dataset, arguments, 50.0, "").measured_on(preset) == network
    config = get_config(dataset, f"method={name},{arguments}".rstrip(","))
    assert f"{config.model.num_experts} experts" in network or config.model.num_experts == 1
    assert config.model.reduce_dimension == ("reduced width" in network)
    assert config.model.name == network.split(",")[0].lower().replace("-", "").replace(" of ", "_")
    other = PublishedResult(dataset, arguments, 50.0, "", network="ResNet-34")
    assert other.measured_on(preset) == "ResNet-34"


def test_a_network_of_several_times_the_width_says_so() -> None:
    preset = Preset(BalPoE(), "wide", experts=2, on={"cifar100_lt": {"model.width": 4}})
    assert preset.trained_network("cifar100_lt", "ir=100") == "ResNet-32 x4, 2 experts"
    assert preset.trained_network("imagenet_lt", "") == "ResNet-50, 2 experts"


def test_every_trunk_has_a_name() -> None:
    for name in MODELS:
        found = PRESETS["paco"].trained_network("cifar100_lt", f"backbone={name}")
        assert re.fullmatch(r"ResNeX?t-\d+( of BBN)?|EfficientNet-Lite0", found)


@pytest.mark.slow_cases(*(cost_name(cost) for cost in COSTS if cost.dataset != "cifar100_lt"))
@pytest.mark.parametrize(
    "cost", [cost for cost in COSTS if cost.network != "ResNet-34"], ids=cost_name
)
def test_what_a_network_costs_is_counted(cost: Cost) -> None:
    network, *rest = cost.network.split(", ")
    trunk, _, width = network.partition(" x")
    name = trunk.lower().replace("-", "").replace(" of ", "_")
    classes, side = {"cifar100_lt": (100, 32), "imagenet_lt": (1000, 224)}.get(
        cost.dataset, (8142, 224)
    )
    model = create_model(
        name,
        num_classes=classes,
        num_experts=int(rest[0].split()[0]) if rest else 1,
        classifier="linear",
        reduce_dimension="reduced width" in rest,
        width=int(width or 1),
    )
    images = jax.ShapeDtypeStruct((1, side, side, 3), np.float32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    variables = jax.eval_shape(partial(model.init, train=False), key, images)
    number = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    flops = count_flops(partial(model.apply, train=False), variables, images)
    found = (number / 1e6, flops / 1e9)
    assert tuple(float(f"{x:.3g}") for x in found) == (cost.parameters, cost.gflop)


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_a_file_says_in_its_first_sentence_where_it_comes_from(module) -> None:
    assert re.search(r"\([^)]+\)", catalogue.summary(module)), module.__doc__


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what `new` and `catalogue` work on."""
    for folder in ("balpoe_jax", "configs"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    (tmp_path / "tests").mkdir()
    for file in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / file, tmp_path)
    return tmp_path


@pytest.mark.slow_cases("ab", "methodoftwentyfourletter")
@pytest.mark.parametrize("name", ["ab", "a_b", "methodoftwentyfourletter"])
def test_a_new_method_passes_the_checks(checkout: Path, name: str) -> None:
    def run(*arguments: str) -> str:
        command = [sys.executable, "-m", *arguments]
        done = subprocess.run(command, cwd=checkout, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    write_new(checkout, name)
    files = (f"balpoe_jax/methods/{name}.py", f"tests/methods/test_{name}.py")
    run("ruff", "check", "--no-cache", *files)
    run("ruff", "format", "--no-cache", "--check", *files)
    if name == "a_b":
        # Whose classes of ours it takes for granted; `make check` looks at all.
        run("mypy", "--follow-imports=skip", "--cache-dir=/dev/null", files[0])
        run("pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", files[1])
        run("balpoe_jax.methods", "catalogue")
        assert f"| `{name}` | a method of ours | - |" in (checkout / catalogue.PAGE).read_text()
        assert f"| `{name}` | AB: say in one" in (checkout / catalogue.README).read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Expected what to write, got nothing; call python -m balpoe_jax.methods cat"),
        (["new"], "Expected what to write, got new; call"),
        (["catalogue", "x"], "Expected what to write, got catalogue x; call"),
        (["new", "My-Method"], "that begins with a letter and is no word of Python, got 'My-Meth"),
        (["new", "class"], "no word of Python, got 'class'; choose such a name"),
        (["new", "1st"], "got '1st'"),
        (["new", "../x"], "got '../x'"),
        (["new", "x" * 25], "Expected a name of at most 24 lower-case letters"),
        (["new", "sade"], r"got 'sade', which balpoe_jax/methods/sade.py has already; choose an"),
        (["new", "ldam"], "got 'ldam', which a preset or a class has already"),
        (["new", "post_hoc"], "got 'post_hoc', which a preset or a class has already"),
        (["new", "contrast"], "which tests/methods/test_contrast.py has already"),
    ],
)
def test_what_is_refused(arguments: list[str], message: str) -> None:
    before = sorted(path.name for path in FOLDER.iterdir())
    with pytest.raises(UserError, match=message):
        main(["methods", *arguments])
    assert sorted(path.name for path in FOLDER.iterdir()) == before


def test_a_refusal_is_one_sentence_and_exit_code_2() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "balpoe_jax.methods", "new", "sade"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1


def test_a_package_outside_of_a_checkout_is_left_alone(tmp_path: Path) -> None:
    for write in (write_catalogue, lambda root: write_new(root, "ab")):
        with pytest.raises(UserError, match="Expected a checkout of the project around the packag"):
            write(tmp_path)
    assert not list(tmp_path.iterdir())


def test_names_of_classes() -> None:
    assert [scaffold.class_name(name) for name in ("ab", "my_method", "x2_y")] == [
        "Ab",
        "MyMethod",
        "X2Y",
    ]
