# SPDX-License-Identifier: Apache-2.0
"""The train step of Flax's own ImageNet example (google/flax, examples/imagenet), to compare with.

It is re-created from a description of the example: a ResNet-50 whose strided convolutions pad as
"SAME"; everything in bfloat16, including images, linear head and loss, except parameters and
BatchNorm's statistics; cross-entropy of one label; an L2 penalty of 1e-4 on kernels as part of the
loss; SGD with Nesterov momentum 0.9, with a warm-up and a cosine schedule; gradients, statistics
and metrics averaged over devices. The example's BatchNorm takes statistics over all devices. Here
each device takes its own by default.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec

NUM_CLASSES = 1000
STAGE_SIZES = (3, 4, 6, 3)
DTYPE = jnp.bfloat16

AXIS_NAME = "batch"

_Conv = partial(nn.Conv, use_bias=False, dtype=DTYPE)


class Bottleneck(nn.Module):
    """A 1x1, a 3x3 and a 1x1 convolution with a shortcut around them."""

    width: int
    stride: int
    axis_name: str | None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """bfloat16 `[B, H, W, in]` -> `[B, H / stride, W / stride, 4 width]`."""
        norm = partial(_batch_norm, self.axis_name)
        strides = (self.stride, self.stride)
        y = nn.relu(norm()(_Conv(self.width, (1, 1))(x)))
        y = nn.relu(norm()(_Conv(self.width, (3, 3), strides)(y)))
        y = norm(scale_init=nn.initializers.zeros)(_Conv(4 * self.width, (1, 1))(y))
        if x.shape != y.shape:
            x = norm()(_Conv(4 * self.width, (1, 1), strides)(x))
        return nn.relu(x + y)


class ResNet(nn.Module):
    """A ResNet of bottleneck blocks with a linear head, in training mode."""

    stage_sizes: Sequence[int] = STAGE_SIZES
    axis_name: str | None = None

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """bfloat16 `[B, H, W, 3]` -> logits bfloat16 `[B, 1000]`."""
        x = _Conv(64, (7, 7), (2, 2), padding=((3, 3), (3, 3)))(images)
        x = nn.relu(_batch_norm(self.axis_name)(x))
        x = nn.max_pool(x, (3, 3), (2, 2), padding="SAME")
        for stage, blocks in enumerate(self.stage_sizes):
            for block in range(blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                x = Bottleneck(64 * 2**stage, stride, self.axis_name)(x)
        return nn.Dense(NUM_CLASSES, dtype=DTYPE)(jnp.mean(x, axis=(1, 2)))


def _batch_norm(axis_name: str | None, **options: Any) -> nn.BatchNorm:
    return nn.BatchNorm(
        use_running_average=False, momentum=0.9, dtype=DTYPE, axis_name=axis_name, **options
    )


@flax.struct.dataclass
class State:
    """The state that the step updates."""

    step: jax.Array
    params: Any
    batch_stats: Any
    opt_state: Any


Batch = dict[str, jax.Array]


def abstract_step(
    devices: Sequence[jax.Device],
    batch_size: int,
    image_size: int = 224,
    stage_sizes: Sequence[int] = STAGE_SIZES,
    sync_batch_norm: bool = False,
    donate: bool = False,
) -> tuple[Callable[..., Any], tuple[State, Batch]]:
    """The jitted step on all devices, and its abstract arguments.

    Args:
        devices: Devices that share the batch.
        batch_size: Size of the batch of all devices.
        image_size: Height and width of the images.
        stage_sizes: Blocks in each stage.
        sync_batch_norm: Whether statistics are those of the whole batch, as in the example.
        donate: Whether the new state reuses the memory of the old one, unlike in the example.
    """
    model = ResNet(stage_sizes, AXIS_NAME if sync_batch_norm else None)
    optimizer = optax.sgd(
        optax.warmup_cosine_decay_schedule(0.0, 0.1, 1000, 10000), momentum=0.9, nesterov=True
    )
    mesh = Mesh(np.array(devices), (AXIS_NAME,))
    replicated, cut = PartitionSpec(), PartitionSpec(AXIS_NAME)

    def create() -> State:
        # There is no mapped axis here, so the model must not take statistics over one.
        images = jnp.zeros((1, image_size, image_size, 3), DTYPE)
        variables = ResNet(stage_sizes).init(jax.random.key(0), images)
        params = variables["params"]
        zero = jnp.zeros((), jnp.int32)
        return State(zero, params, variables["batch_stats"], optimizer.init(params))

    def placed(tree: Any, spec: PartitionSpec) -> Any:
        sharding = NamedSharding(mesh, spec)
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree
        )

    batch = {
        "images": jax.ShapeDtypeStruct((batch_size, image_size, image_size, 3), DTYPE),
        "labels": jax.ShapeDtypeStruct((batch_size,), jnp.int32),
    }
    step = jax.shard_map(
        partial(train_step, model, optimizer),
        mesh=mesh,
        in_specs=(replicated, cut),
        out_specs=replicated,
        check_vma=False,  # as pmap has it, which the example uses
    )
    arguments = placed(jax.eval_shape(create), replicated), placed(batch, cut)
    return jax.jit(step, donate_argnums=0 if donate else ()), arguments


def train_step(
    model: ResNet, optimizer: optax.GradientTransformation, state: State, batch: Batch
) -> tuple[State, dict[str, jax.Array]]:
    """The example's update of one device: bfloat16 images, int labels -> new state, metrics."""

    def cross_entropy(logits: jax.Array) -> jax.Array:
        one_hot = jax.nn.one_hot(batch["labels"], NUM_CLASSES)
        return optax.softmax_cross_entropy(logits, one_hot).mean()

    def loss_fn(params: Any) -> tuple[jax.Array, tuple[Any, jax.Array]]:
        logits, updated = model.apply(
            {"params": params, "batch_stats": state.batch_stats},
            batch["images"],
            mutable=["batch_stats"],
        )
        kernels = [x for x in jax.tree.leaves(params) if x.ndim > 1]
        penalty = 1e-4 / 2 * sum(jnp.sum(jnp.square(kernel)) for kernel in kernels)
        return cross_entropy(logits) + penalty, (updated["batch_stats"], logits)

    grads, (batch_stats, logits) = jax.grad(loss_fn, has_aux=True)(state.params)
    metrics = {
        "loss": cross_entropy(logits),
        "accuracy": jnp.mean(jnp.argmax(logits, axis=-1) == batch["labels"]),
    }
    grads, batch_stats, metrics = jax.lax.pmean((grads, batch_stats, metrics), AXIS_NAME)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    return State(state.step + 1, params, batch_stats, opt_state), metrics
