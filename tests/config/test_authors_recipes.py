# SPDX-License-Identifier: Apache-2.0
"""Recipes of other methods are their authors': the rate of every epoch, sizes, initial values."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from balpoe_jax.config import resolve
from balpoe_jax.errors import UserError
from balpoe_jax.experiment.build import build_program
from balpoe_jax.experiment.program import num_parameters
from balpoe_jax.experiment.settings import learning_rates
from balpoe_jax.methods import Context
from balpoe_jax.models import create_model
from balpoe_jax.parallel import make_parallel
from tests.helpers.config_files import get_config


def rates_of(data: str, arguments: str) -> np.ndarray:
    return learning_rates(resolve(get_config(data, arguments)))


def in_steps(epochs: int, rate: float, warmup: int, drops: dict[int, float]) -> np.ndarray:
    """Rates that rise linearly over the warm-up and fall to a factor at each of these epochs."""
    rates = np.full(epochs, rate)
    for epoch, factor in drops.items():
        rates[epoch:] = rate * factor
    rates[:warmup] = rate * np.arange(1, warmup + 1) / warmup
    return rates


def cosine_after_warmup(epochs: int, rate: float, warmup: int) -> np.ndarray:
    rest = np.arange(1, epochs - warmup + 1) / (epochs - warmup + 1)
    rise = rate * np.arange(1, warmup + 1) / warmup
    return np.concatenate([rise, rate * (1 + np.cos(np.pi * rest)) / 2])


# Epochs counted from 0: the scripts drop the rate "above" 320 and 360.
LAST_EIGHTY = {321: 0.1, 361: 0.01}


@pytest.mark.parametrize(
    ("arguments", "rate"),
    [("method=paco", 0.05), ("method=gpaco", 0.1), ("method=cmo_bs,recipe=long", 0.1)],
)
def test_paco_and_what_follows_it_drop_the_rate_in_steps_on_cifar(arguments, rate) -> None:
    rates = rates_of("cifar100_lt", arguments)
    np.testing.assert_allclose(rates, in_steps(400, rate, 10, LAST_EIGHTY), rtol=1e-12)
    assert rates[320] == pytest.approx(rate)
    # The one epoch that differs, as the methods say: the scripts' 11th rises on to 1.1.
    theirs = np.where(np.arange(400) == 10, 1.1 * rate, rates)
    assert theirs.mean() == pytest.approx(rate * 0.0401 / 0.05, rel=1e-3)


@pytest.mark.parametrize("data", ["imagenet_lt", "inaturalist2018"])
@pytest.mark.parametrize(
    ("arguments", "rate"),
    [("method=paco", 0.02), ("method=gpaco", 0.04), ("method=cmo_bs,recipe=long", 0.02)],
)
def test_on_photographs_they_follow_a_cosine_after_the_warmup(data, arguments, rate) -> None:
    expected = cosine_after_warmup(400, rate, 10)
    np.testing.assert_allclose(rates_of(data, arguments), expected, rtol=1e-12)
    if rate == 0.02:
        assert expected[145] == pytest.approx(0.014601, abs=1e-6)


@pytest.mark.parametrize(
    ("method", "epochs"),
    [
        *((name, 100) for name in ("cmo_ce", "cmo_bs")),
        *((name, 200) for name in ("cross_entropy_cb", "ce_drw", "ldam", "ldam_drw")),
        *((name, 200) for name in ("focal", "focal_cb")),
    ],
)
def test_cmos_training_on_inaturalist_warms_up(method: str, epochs: int) -> None:
    rates = rates_of("inaturalist2018", f"method={method}")
    np.testing.assert_allclose(rates[:6], [0.02, 0.04, 0.06, 0.08, 0.1, 0.1], rtol=1e-12)
    expected = in_steps(epochs, 0.1, 5, {75: 0.1, 160: 0.01})
    np.testing.assert_allclose(rates, expected, rtol=1e-12)


def test_pc_softmax_has_a_training_of_its_own_on_imagenet_lt_alone() -> None:
    cosine = (1 + np.cos(np.pi * np.arange(90) / 90)) / 2
    np.testing.assert_allclose(rates_of("imagenet_lt", "method=pc_softmax"), 0.2 * cosine)
    assert get_config("imagenet_lt", "method=pc_softmax").batch_size == 256
    lade = rates_of("imagenet_lt", "method=lade")
    assert (len(lade), lade[0]) == (180, 0.05)
    for data in ("cifar100_lt", "inaturalist2018"):
        lade, softmax = (rates_of(data, f"method={name}") for name in ("lade", "pc_softmax"))
        np.testing.assert_array_equal(lade, softmax)


def test_gpaco_blurs_its_second_view_less_on_cifar() -> None:
    blurs = {
        data: [get_config(data, f"method={name}").view2.blur for name in ("paco", "gpaco")]
        for data in ("cifar10_lt", "cifar100_lt", "imagenet_lt", "inaturalist2018")
    }
    assert blurs["cifar10_lt"] == blurs["cifar100_lt"] == [0.5, 0.2]
    assert blurs["imagenet_lt"] == blurs["inaturalist2018"] == [0.5, 0.5]


def test_gpaco_has_a_queue_and_passes_of_its_own_everywhere() -> None:
    sizes = {}
    for data in ("digits_lt", "cifar10_lt", "cifar100_lt", "imagenet_lt", "inaturalist2018"):
        method = get_config(data, "method=gpaco").method
        assert method.queue_without_momentum and method.passes_by_view and not method.momentum
        sizes[data] = method.queue_size
    assert set(sizes.values()) == {1024, 8192}
    assert sizes["cifar100_lt"] == 1024 and sizes["imagenet_lt"] == 8192


def network_of(data: str, method: str, classes: int):
    """The network of a recipe, without what a whole program checks."""
    settings = resolve(get_config(data, f"method={method}"))
    model = settings.model
    ensemble = create_model(
        model.name,
        num_classes=classes,
        num_experts=model.num_experts,
        classifier=model.classifier,
        classifier_init=model.classifier_init,
        reduce_dimension=model.reduce_dimension,
    )
    return settings.method.network(ensemble, Context(np.full(classes, 1000)))


def head_of(network):
    return getattr(network, "ensemble", network).expert.head


def deviation(module, kernel: str, *arguments) -> float:
    """Of the initial values of a layer, by a path such as `dense/kernel`, for 64 features."""
    values = module.init(jax.random.key(0), jnp.zeros((1, 64)), *arguments)["params"]
    for name in kernel.split("/"):
        values = values[name]
    return float(values.std())


# He's, and PyTorch's default: uniform within 1 / sqrt(64).
HE, TORCH = (2 / 64) ** 0.5, (1 / 192) ** 0.5


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        *((name, TORCH) for name in ("paco", "gpaco", "ncl", "ncl_contrast", "lade", "pc_softmax")),
        *((name, HE) for name in ("cmo_ce", "bayias", "mislas", "focal_cb", "bcl")),
    ],
)
def test_the_initial_classifier_on_cifar(method: str, expected: float) -> None:
    found = deviation(head_of(network_of("cifar100_lt", method, 100)), "dense/kernel")
    assert found == pytest.approx(expected, rel=0.03)


def test_a_program_begins_with_the_classifier_of_its_config() -> None:
    config = get_config("cifar100_lt", "method=lade")
    program = build_program(resolve(config), make_parallel(), np.full(100, 9), (32, 32, 3))
    assert deviation(program.model.expert.head, "dense/kernel") == pytest.approx(TORCH, rel=0.03)
    config.model.classifier_init = "zeros"
    with pytest.raises(UserError, match=r"model.classifier_init must be one of he, torch, or None"):
        resolve(config)


@pytest.mark.parametrize(
    ("data", "classes", "last"), [("cifar100_lt", 100, HE), ("imagenet_lt", 9, TORCH)]
)
@pytest.mark.parametrize("method", ["paco", "gpaco"])
def test_the_initial_projection_of_paco(method: str, data: str, classes: int, last: float) -> None:
    """He's on CIFAR, where the authors' network sets all of its own layers."""
    projection = network_of(data, method, classes).projection
    assert deviation(projection, "out/kernel", False) == pytest.approx(last, rel=0.05)
    assert deviation(projection, "hidden0/kernel", False) == pytest.approx(TORCH, rel=0.05)


@pytest.mark.integration
@pytest.mark.parametrize(("data", "classes"), [("imagenet_lt", 1000), ("inaturalist2018", 8142)])
def test_mdcs_is_narrow_on_photographs(data: str, classes: int) -> None:
    """Shapes alone: three experts, each with half of a ResNet-50 at three quarters of its width."""
    for recipe in ("own", "long"):
        assert get_config(data, f"method=mdcs,recipe={recipe}").model.reduce_dimension
    init = partial(network_of(data, "mdcs", classes).init, train=False)
    shapes = jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    expected = 43.7e6 + 3 * 1536 * (classes - 1000)
    assert num_parameters(shapes["params"]) == pytest.approx(expected, abs=0.05e6)
