# SPDX-License-Identifier: Apache-2.0
"""BalPoE on iNaturalist 2018: 437,513 photographs of 8,142 species, 1000 to 2 a class.

    python -m balpoe_jax.main --config=configs/inaturalist2018.py --workdir=runs/inaturalist

Arguments after a colon, as in `configs/inaturalist2018.py:recipe=long`:

    backbone    resnet50 (default), resnext50, resnet101, resnet152
    method      balpoe (default), or another one of the README's table
    recipe      own (default), the method's training: BalPoE's has 100 epochs; or, for any method,
                BalPoE's trainings: standard, strong (the same with RandAugment and colour jitter)
                or long (400 epochs, with the augmentation of strong)
    mixup       true or false; by default as the method does
    experts     number of experts; 0 for the method's own
    epochs      number of epochs of the cosine schedule; 0 for the recipe's own
    batch_size  global batch size, with which the learning rate scales; 0 for the recipe's own

The data set is TFDS's `i_naturalist2018`. Results are on its validation split (24,426 images), as
in the paper; the test split has no labels. Nothing is held out, so no temperature is fitted.
"""

from ml_collections import ConfigDict

from balpoe_jax.config.dataset_defaults import INATURALIST2018, photo_config


def get_config(arguments: str | None = None) -> ConfigDict:
    """The experiment; `arguments` is what stands after the colon."""
    return photo_config(INATURALIST2018, arguments)
