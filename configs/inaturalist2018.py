# SPDX-License-Identifier: Apache-2.0
"""BalPoE on iNaturalist 2018: 437,513 photographs of 8,142 species, 1000 to 2 a class.

    python -m balpoe_jax.main --config=configs/inaturalist2018.py --workdir=runs/inaturalist

Arguments after a colon, as in `configs/inaturalist2018.py:recipe=long`:

    backbone    resnet50 (default), resnext50, resnet101, resnet152
    recipe      standard (100 epochs), strong (the same with colour jitter and RandAugment) or
                long (400 epochs, likewise)
    method      balpoe (default), balanced_softmax (one expert, tau 1), cross_entropy (one, tau 0)
    mixup       true or false
    experts     number of experts; 0 for the method's own
    epochs      the cosine schedule over so many; 0 for the recipe's own
    batch_size  global; 0 for the paper's 512, otherwise the learning rate scales in proportion

The data set is TFDS's `i_naturalist2018`. Results are on its validation split (24,426 images), as
in the paper; the test split has no labels. Nothing is held out, so no temperature is fitted.
"""

from ml_collections import ConfigDict

from balpoe_jax.recipes import INATURALIST2018, photo_config


def get_config(arguments: str | None = None) -> ConfigDict:
    """The experiment; `arguments` is what stands after the colon."""
    return photo_config(INATURALIST2018, arguments)
