# SPDX-License-Identifier: Apache-2.0
"""How batches are made, as data: augmentation, mixing, order, and each host's part. NumPy only.

Two pipelines read these settings: `pipeline` makes batches with tf.data on the host, `device` makes
them in the memory of the devices.
"""

import dataclasses

from balpoe_jax.errors import UserError
from balpoe_jax.setting import Section, setting

# How the training set is gone through:
#   shuffle         every epoch is a permutation of all examples
#   class_balanced  a class with even odds, then one of its examples with even odds
#   class_aware     the classes in turn, in a new order each time round, and of each class some of
#                   its examples in turn, in a new order each time round (MiSLAS, stage 2)
SAMPLERS = ("shuffle", "class_balanced", "class_aware")


def steps_per_epoch(num_examples: int, batch_size: int) -> int:
    """`ceil(N / B)`: the last batch of an epoch wraps to the start of the epoch's permutation.

    The reference makes as many steps, the last of them with the smaller rest as a batch.
    """
    return -(-num_examples // batch_size)


Rule = tuple[str, float, int]  # operation, probability, magnitude index 0..9

# AutoAugment for CIFAR-10 (Cubuk et al., CVPR 2019, table 7): one pair is drawn for each image.
AUTOAUGMENT_CIFAR: tuple[tuple[Rule, Rule], ...] = (
    (("invert", 0.1, 7), ("contrast", 0.2, 6)),
    (("rotate", 0.7, 2), ("translate_x", 0.3, 9)),
    (("sharpness", 0.8, 1), ("sharpness", 0.9, 3)),
    (("shear_y", 0.5, 8), ("translate_y", 0.7, 9)),
    (("autocontrast", 0.5, 8), ("equalize", 0.9, 2)),
    (("shear_y", 0.2, 7), ("posterize", 0.3, 7)),
    (("color", 0.4, 3), ("brightness", 0.6, 7)),
    (("sharpness", 0.3, 9), ("brightness", 0.7, 9)),
    (("equalize", 0.6, 5), ("equalize", 0.5, 1)),
    (("contrast", 0.6, 7), ("sharpness", 0.6, 5)),
    (("color", 0.7, 7), ("translate_x", 0.5, 8)),
    (("equalize", 0.3, 7), ("autocontrast", 0.4, 8)),
    (("translate_y", 0.4, 3), ("sharpness", 0.2, 6)),
    (("brightness", 0.9, 6), ("color", 0.2, 8)),
    (("solarize", 0.5, 2), ("invert", 0.0, 3)),
    (("equalize", 0.2, 0), ("autocontrast", 0.6, 0)),
    (("equalize", 0.2, 8), ("equalize", 0.6, 4)),
    (("color", 0.9, 9), ("equalize", 0.6, 6)),
    (("autocontrast", 0.8, 4), ("solarize", 0.2, 8)),
    (("brightness", 0.1, 3), ("color", 0.7, 0)),
    (("solarize", 0.4, 5), ("autocontrast", 0.9, 3)),
    (("translate_y", 0.9, 9), ("translate_y", 0.7, 9)),
    (("autocontrast", 0.9, 2), ("solarize", 0.8, 3)),
    (("equalize", 0.8, 8), ("invert", 0.1, 3)),
    (("translate_y", 0.7, 9), ("autocontrast", 0.9, 1)),
)

POLICY_TABLES = {"none": (), "autoaugment_cifar": AUTOAUGMENT_CIFAR}
POLICIES = (*POLICY_TABLES, "randaugment")


# timm's `rand-n2-m10-mstd0.5`: colour outside the image, operations an image, their magnitude.
IMAGENET_MEAN = (124, 116, 104)
RANDAUGMENT_LAYERS = 2
RANDAUGMENT_MAGNITUDE = RANDAUGMENT_GREATEST = 10.0

BLUR_SIGMA = (0.1, 2.0)


@dataclasses.dataclass(frozen=True)
class AugmentSettings(Section):
    """What happens to each image, in the order that `docs/pipelines.md` gives; by default nothing.

    Raises:
        UserError (a `ValueError`): a value that is not valid.
    """

    path = "augment."

    crop_padding: int = setting(
        0, "Width in pixels of black around the image; a crop of its old size is taken.", 0, 1024
    )
    flip: bool = setting(False, "Whether half of the images are mirrored left and right.")
    rotation: float = setting(
        0.0,
        "Greatest angle in degrees of a uniform rotation; nearest pixel, black corners.",
        0,
        180,
    )
    color_jitter: tuple[float, float, float] = setting(
        (0.0, 0.0, 0.0),
        "Greatest relative change of brightness, contrast and saturation, in random order.",
        0,
        1,
        length=3,
    )
    policy: str = setting("none", "Name of a table of operations.", choices=POLICIES)
    fill: tuple[int, int, int] = setting(
        IMAGENET_MEAN,
        "Colour outside of the image under the policy randaugment, 0 to 255 by channel.",
        0,
        255,
        length=3,
    )
    cutout: int = setting(
        0, "Side in pixels of a black square with its centre anywhere; even, 0 for none.", 0, 8192
    )
    crop_area: float | None = setting(
        None,
        "Least share of the area that a random window has, which is resized to the image's size by "
        "the rule of torchvision's RandomResizedCrop. None: 0.08 for photographs, which always "
        "have such a window, and the whole of images of one size.",
        1e-9,
        1,
    )
    hue: float = setting(
        0.0, "Greatest turn of the hue as a share of the circle; one more random change.", 0, 0.5
    )
    jitter_probability: float = setting(
        1.0, "Share of the images whose colours are changed at all.", 0, 1
    )
    grayscale: float = setting(0.0, "Share of the images that lose their colour.", 0, 1)
    blur: float = setting(
        0.0,
        "Share of the images that a Gaussian blurs, of 0.1 to 2 pixels' standard deviation.",
        0,
        1,
    )
    randaugment_layers: int = setting(
        RANDAUGMENT_LAYERS, "Number of RandAugment's operations an image.", 1, 100
    )
    randaugment_magnitude: float = setting(
        RANDAUGMENT_MAGNITUDE, "Magnitude of RandAugment's operations.", 0, RANDAUGMENT_GREATEST
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cutout % 2:
            raise UserError(f"config.augment.cutout must be even, got {self.cutout}.")

    @property
    def has_geometry(self) -> bool:
        """Whether images are cropped, mirrored or rotated."""
        return bool(self.crop_area or self.crop_padding or self.flip or self.rotation)

    @property
    def has_color_jitter(self) -> bool:
        """Whether colours are changed at random."""
        return any(self.color_jitter) or self.hue > 0

    @property
    def has_per_image_ops(self) -> bool:
        """Whether there is anything for `change_image` to do."""
        gray_or_blurred = self.grayscale > 0 or self.blur > 0
        return self.has_color_jitter or gray_or_blurred or self.policy == "randaugment"

    def split_per_image_ops(self) -> tuple["AugmentSettings", "AugmentSettings"]:
        """These settings without what `change_image` does, and those of that alone."""
        none = AugmentSettings()
        changes = ("color_jitter", "hue", "jitter_probability", "grayscale", "blur")
        rest = dataclasses.replace(self, **{name: getattr(none, name) for name in changes})
        only = dataclasses.replace(none, **{name: getattr(self, name) for name in changes})
        if self.policy == "randaugment":
            rest = dataclasses.replace(rest, policy=none.policy)
            its_own = ("policy", "fill", "randaugment_layers", "randaugment_magnitude")
            only = dataclasses.replace(only, **{name: getattr(self, name) for name in its_own})
        return rest, only


RULES = ("mixup", "cutmix", "mixup_or_cutmix", "remix", "remix_cutmix", "unimix", "cmo")
PARTNERS = ("batch", "sampler")

BOX_RULES = ("cutmix", "remix_cutmix", "cmo")
REMIX_RULES = ("remix", "remix_cutmix")


@dataclasses.dataclass(frozen=True)
class MixSettings(Section):
    """How the images of a batch are mixed with others; by default not at all.

    The rules:
        mixup: a weighted mean, one coefficient a batch.
        cutmix: a box of the partner's pixels, one box a batch; the label's share is that of the
            pixels.
        mixup_or_cutmix: one of these two, with even odds for each batch.
        remix, remix_cutmix: mixup or cutmix, but the whole label is the rarer one's where its class
            is `remix_kappa` times as rare and the other's share of the image is less than
            `remix_tau`.
        unimix: a weighted mean with a coefficient for each image, which favours the rarer.
        cmo: cutmix with partners from the second sampler.

    With `regmixup` (Pinto et al., NeurIPS 2022) every rule gives batches of twice as many rows: of
    each image the clean row, whose first label has the whole share, and next to it the mixed one.
    So every part of a batch, of a device or a microbatch, has as many of both. As in the authors'
    code (FrancescoPinto/RegMixup) both go through the network together, and the loss is the mean
    over all rows. The paper's is a sum of two means, twice as large: the rate times 2 and the
    weight decay over 2 make SGD take the same steps.

    Raises:
        UserError (a `ValueError`): a value that is not valid.
    """

    path = "mix."

    alpha: float = setting(
        0.0, "Parameter of the coefficients' distribution Beta(alpha, alpha); 0 for none.", 0, 1e6
    )
    groups: int = setting(
        1,
        "Number of equal groups of neighbours in which partners are found. 1 is the reference's; "
        "a multiple of the hosts keeps the partners of a row on its host.",
        1,
        2**20,
    )
    rule: str = setting("mixup", "Name of the rule.", choices=RULES)
    probability: float = setting(1.0, "Share of the batches that are mixed.", 0, 1)
    first_epoch: int = setting(0, "First epoch with mixed batches, counted from 0.", 0, 1e6)
    last_epoch: int | None = setting(
        None, "Epoch before which mixing ends, counted from 0; None for the end.", 1, 1e6
    )
    remix_kappa: float = setting(
        3.0, "Ratio of class counts from which Remix gives the label to the rarer class.", 1
    )
    remix_tau: float = setting(
        0.5, "Share of the image below which the frequent class loses the label in Remix.", 0, 1
    )
    sampling_power: float = setting(
        0.0,
        "Power of a class's count to which its odds are proportional, where partners are not a "
        "permutation of the batch: of a class in the second sampler, of an image in UniMix.",
        -10,
        10,
    )
    partners: str = setting(
        "batch",
        "Origin of the partners: the batch (permuted; UniMix draws with replacement), or a second "
        "sampler over the whole training set, whose images are augmented by draws of their own. "
        "CMO always has the sampler.",
        choices=PARTNERS,
    )
    regmixup: bool = setting(
        False,
        "Whether a batch has each image twice, as it is and then mixed (RegMixup): the mean over "
        "its rows is half the sum of the two losses.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.last_epoch is not None and self.last_epoch <= self.first_epoch:
            raise UserError(
                "config.mix.last_epoch must be later than config.mix.first_epoch, or None for the "
                f"end; got {self.last_epoch} and {self.first_epoch}."
            )

    @property
    def from_sampler(self) -> bool:
        """Whether partners are read from the training set rather than found in the batch."""
        return self.alpha > 0 and (self.rule == "cmo" or self.partners == "sampler")

    @property
    def rows_per_image(self) -> int:
        """How many rows of a batch an image has, the mixed one and with RegMixup a clean one."""
        return 2 if self.regmixup and self.alpha > 0 else 1

    @property
    def always(self) -> bool:
        """Whether every batch is mixed."""
        return self.probability == 1 and not self.first_epoch and self.last_epoch is None

    def check_groups(self, batch_size: int, num_hosts: int) -> None:
        """Refuses groups within which rows of one host could not find all their partners."""
        if self.alpha == 0 or self.from_sampler:
            num_hosts = 1
        if self.groups < 1 or batch_size % self.groups or self.groups % num_hosts:
            raise UserError(
                f"mix.groups must divide the batch size {batch_size} and be a multiple of the "
                f"number of hosts, {num_hosts}; got {self.groups}."
            )


NO_MIXING = MixSettings()


@dataclasses.dataclass(frozen=True)
class TrainSettings:
    """How training batches are made.

    Attributes:
        batch_size: of the global batch.
        seed: of order, augmentation and mixing.
        mean, std: of the normalisation, by channel, for images in [0, 1].
        augment: what happens to the uint8 images.
        other_augment: what happens to half of them, drawn one by one, instead; None for none.
        mix: how they are mixed then.
        dtype: of the images, "float32" or "bfloat16", to which they are rounded at the end.
        views: of further views of the same images, what happens to each; they are not mixed.
        sampler, samples_per_class: see `samplers.batches`.
    """

    batch_size: int
    seed: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    augment: AugmentSettings
    mix: MixSettings = NO_MIXING
    dtype: str = "float32"
    views: tuple[AugmentSettings, ...] = ()
    sampler: str = "shuffle"
    samples_per_class: int = 1
    other_augment: AugmentSettings | None = None


@dataclasses.dataclass(frozen=True)
class Host:
    """Which part of each global batch to make, and with how many threads (None: all cores)."""

    index: int = 0
    count: int = 1
    threads: int | None = None

    def rows(self, batch_size: int) -> slice:
        """This host's rows of a global batch."""
        if batch_size % self.count:
            raise UserError(
                f"The batch size must be a multiple of the {self.count} hosts, got {batch_size}."
            )
        share = batch_size // self.count
        return slice(self.index * share, (self.index + 1) * share)


# Which makes whole batches.
ONE_HOST = Host()
