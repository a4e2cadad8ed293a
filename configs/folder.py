# SPDX-License-Identifier: Apache-2.0
"""Images of your own: a folder of class folders, a list of paths and labels, or a set in TFDS.

    python -m balpoe_jax.main --config=configs/folder.py:dir=PHOTOS --workdir=DIR

`PHOTOS/CLASS/*.jpg` (also png, webp, bmp), or `PHOTOS/train/CLASS/*.jpg` with `val` and `test`
next to `train`. Images stay where they are. Without a test split a fifth of the images becomes one,
and a tenth is held out for temperatures, both by a hash of their names.

Arguments:
  dir=FOLDER            the images, or the folder of the paths in lists
  tfds=NAME[/CONFIG]    a data set that TFDS has prepared, in its own folder or in dir=
  list=FILE             a CSV with the header path,label or path,label,split, or lines `path label`
  val_list=, test_list= lists of the other splits, if they are files of their own
  classes=FILE          names of the classes, one a line, in the order of their numbers
  test_share=0.2, held_out_share=0.1
  backbone=resnet50     (small images: resnet32), method=balpoe, experts=E, mixup=true|false
  pretrained=FILE       published weights of the backbone, for efficientnet_lite0
  recipe=standard|strong|long, epochs=N, batch_size=B, image_size=PIXELS

What is not given has a default that suits the images, which the start prints with its reason.
"""

from ml_collections import ConfigDict

from balpoe_jax.config.folder_defaults import folder_config


def get_config(arguments: str | None = None) -> ConfigDict:
    """The experiment; `arguments` is what stands after the colon."""
    return folder_config(arguments)
