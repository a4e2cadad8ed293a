# SPDX-License-Identifier: Apache-2.0
"""BalPoE on ImageNet-LT: 115,846 photographs in 1,000 classes, 1280 to 5 a class.

    python -m balpoe_jax.main --config=configs/imagenet_lt.py --workdir=runs/imagenet_lt

Arguments after a colon, as in `configs/imagenet_lt.py:backbone=resnext50,recipe=long`:

    backbone    resnet50 (default), resnext50, resnet101, resnet152
    method      balpoe (default), or another one of the README's table
    recipe      own (default), the method's training: BalPoE's has 180 epochs; or, for any method,
                BalPoE's trainings: standard, strong (the same with RandAugment and colour jitter)
                or long (400 epochs, with the augmentation of strong)
    mixup       true or false; by default as the method does
    experts     number of experts; 0 for the method's own
    epochs      number of epochs of the cosine schedule; 0 for the recipe's own
    batch_size  global batch size, with which the learning rate scales; 0 for the recipe's own

The data set is TFDS's `imagenet_lt`, which `tfds build imagenet_lt` makes from the two ILSVRC 2012
archives. Results are on its test split (50,000 images, ILSVRC's validation set); temperatures are
fitted on its validation split. The published lists of its target distributions are used if
`--config.eval.shift_lists` names them, else the rule for CIFAR.
"""

from ml_collections import ConfigDict

from balpoe_jax.config.dataset_defaults import IMAGENET_LT, photo_config


def get_config(arguments: str | None = None) -> ConfigDict:
    """The experiment; `arguments` is what stands after the colon."""
    return photo_config(IMAGENET_LT, arguments)
