# SPDX-License-Identifier: Apache-2.0
"""BalPoE on scikit-learn's handwritten digits made long-tailed: about a minute on two CPU cores.

    python -m balpoe_jax.main --config=configs/digits_lt.py --workdir=runs/digits_lt

413 training images of 8x8 pixels (130 down to 5 a class), 400 balanced test images, ResNet-8.
Arguments: method=balpoe or another one of the README's table, mixup=true|false, experts=E (0: the
method's own number), epochs=N (0: 120), recipe=own|standard. The paper does not use this data set;
the README has what we measured.
"""

from ml_collections import ConfigDict

from balpoe_jax import config as config_lib
from balpoe_jax.config.dataset_defaults import RECIPE_CHOICES, set_method
from balpoe_jax.methods import PRESETS


def get_config(arguments: str | None = None) -> ConfigDict:
    """The experiment; `arguments` is what stands after the colon."""
    args = config_lib.parse_arguments(
        arguments,
        method=tuple(PRESETS),
        recipe=RECIPE_CHOICES[:2],
        mixup=bool,
        experts=0,
        epochs=0,
    )
    config = config_lib.default_config()
    config.total_epochs = 120
    config.batch_size = 32
    config.log_every_steps = 65
    config.data.name = "digits"
    config.data.imbalance_ratio = 26.0
    # Classes are small here: "many" begins above 60 images, instead of the usual 100.
    config.data.shot_thresholds = (20, 60)
    config.data.mean = (0.305, 0.305, 0.305)
    config.data.std = (0.376, 0.376, 0.376)
    config.augment.crop_padding = 1
    config.augment.flip = False  # a mirrored digit is another character
    config.model.name = "resnet8"
    config.mix.alpha = 0.4
    config.optim.learning_rate = 0.1
    config.optim.decay_epochs = (96, 108)
    config.optim.warmup_epochs = 4
    config.eval.batch_size = 200
    config.eval.every_epochs = 10
    set_method(config, "digits_lt", args)
    return config
