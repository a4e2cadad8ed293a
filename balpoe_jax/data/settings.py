# SPDX-License-Identifier: Apache-2.0
"""Settings of batches: augmentation, mixing, order, and each host's part. NumPy only.

Two pipelines follow these settings: `pipeline` makes batches with tf.data on the host, `device`
makes them in the memory of the devices.
"""

import dataclasses

from balpoe_jax.errors import UserError
from balpoe_jax.setting import Section, setting

# The order in which a sampler draws the training examples:
#   shuffle         every epoch is a permutation of all examples
#   class_balanced  a class with even odds, then one of its examples with even odds
#   class_aware     the classes in turn, some examples of each; both classes and examples are
#                   shuffled again each time that all were drawn (MiSLAS, second phase)
SAMPLERS = ("shuffle", "class_balanced", "class_aware")


def steps_per_epoch(num_examples: int, batch_size: int) -> int:
    """`ceil(N / B)`: the last batch of an epoch wraps to the start of the epoch's permutation.

    The reference makes as many steps, and its last batch is the smaller rest.
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

# timm's `rand-n2-m10-mstd0.5`: colour outside the image, operations per image, their magnitude.
IMAGENET_MEAN = (124, 116, 104)
RANDAUGMENT_LAYERS = 2
RANDAUGMENT_MAGNITUDE = RANDAUGMENT_GREATEST = 10.0

# Range of the blur's standard deviation, in pixels.
BLUR_SIGMA = (0.1, 2.0)


@dataclasses.dataclass(frozen=True)
class AugmentSettings(Section):
    """What happens to each image, by default nothing; `docs/pipelines.md` gives the order.

    Raises:
        UserError (a `ValueError`): a value that is not valid.
    """

    path = "augment."

    crop_padding: int = setting(
        0, "Width in pixels of a black border, from which a crop of the old size is taken.", 0, 1024
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
        "Least share of the area of a random window, which is resized to the image's size by the "
        "rule of torchvision's RandomResizedCrop. None: 0.08 for photographs, which always get "
        "such a window, and no window for images of one size.",
        1e-9,
        1,
    )
    hue: float = setting(
        0.0, "Greatest turn of the hue as a share of the circle; part of the colour jitter.", 0, 0.5
    )
    jitter_probability: float = setting(
        1.0, "Share of the images whose colours are jittered.", 0, 1
    )
    grayscale: float = setting(0.0, "Share of the images that lose their colour.", 0, 1)
    blur: float = setting(
        0.0,
        "Share of the images that are blurred by a Gaussian with a standard deviation of 0.1 to 2 "
        "pixels.",
        0,
        1,
    )
    randaugment_layers: int = setting(
        RANDAUGMENT_LAYERS, "Number of RandAugment's operations per image.", 1, 100
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
        """Whether `change_image` changes anything."""
        gray_or_blurred = self.grayscale > 0 or self.blur > 0
        return self.has_color_jitter or gray_or_blurred or self.policy == "randaugment"

    def split_per_image_ops(self) -> tuple["AugmentSettings", "AugmentSettings"]:
        """These settings without the part of `change_image`, and that part alone."""
        none = AugmentSettings()
        changes = ("color_jitter", "hue", "jitter_probability", "grayscale", "blur")
        rest = dataclasses.replace(self, **{name: getattr(none, name) for name in changes})
        only = dataclasses.replace(none, **{name: getattr(self, name) for name in changes})
        if self.policy == "randaugment":
            rest = dataclasses.replace(rest, policy=none.policy)
            its_own = ("policy", "fill", "randaugment_layers", "randaugment_magnitude")
            only = dataclasses.replace(only, **{name: getattr(self, name) for name in its_own})
        return rest, only


RULES = (
    *("mixup", "cutmix", "mixup_or_cutmix", "mixup_and_cutmix"),
    *("remix", "remix_cutmix", "unimix", "cmo"),
)
PARTNERS = ("batch", "sampler")

BOX_RULES = ("cutmix", "remix_cutmix", "cmo")
REMIX_RULES = ("remix", "remix_cutmix")


@dataclasses.dataclass(frozen=True)
class MixSettings(Section):
    """How the images of a batch are mixed with others, by default not at all.

    The rules:
        mixup: a weighted mean, one coefficient a batch.
        cutmix: a box of the partner's pixels, one box a batch; a label's share is its image's
            share of the pixels.
        mixup_or_cutmix: one of these two, with even odds for each batch.
        mixup_and_cutmix: mixup of the first view and cutmix of the second one, with one coefficient
            and the same partners, whose view of the same number is used. The label's share is the
            coefficient in both.
        remix, remix_cutmix: mixup or cutmix, but the rarer class gets the whole label where it is
            `remix_kappa` times as rare and the other's share of the image is below `remix_tau`.
        unimix: a weighted mean with a coefficient for each image that favours the rarer class.
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
        "Number of equal groups of neighbouring rows within which partners are found. 1 is the "
        "reference's; a multiple of the number of hosts keeps a row's partner on its host.",
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
        3.0, "Ratio of class counts from which Remix favours the rarer class.", 1
    )
    remix_tau: float = setting(
        0.5, "Share of the image below which the frequent class loses the label in Remix.", 0, 1
    )
    sampling_power: float = setting(
        0.0,
        "Power of the class count to which the odds of a partner are proportional, where partners "
        "are not a permutation of the batch: odds of a class in the second sampler, of an image in "
        "UniMix.",
        -10,
        10,
    )
    partners: str = setting(
        "batch",
        "Origin of the partners: the batch (permuted; UniMix draws with replacement), or a second "
        "sampler over the whole training set, whose images are augmented by draws of their own. "
        "CMO always uses the sampler.",
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
        if self.regmixup and self.of_two_views:
            raise UserError(
                "config.mix.regmixup must be False for the rule mixup_and_cutmix, which leaves no "
                "view clean; got True."
            )

    @property
    def from_sampler(self) -> bool:
        """Whether partners are read from the training set instead of found in the batch."""
        return self.alpha > 0 and (self.rule == "cmo" or self.partners == "sampler")

    @property
    def of_two_views(self) -> bool:
        """Whether the second view is mixed too."""
        return self.alpha > 0 and self.rule == "mixup_and_cutmix"

    @property
    def rows_per_image(self) -> int:
        """Number of rows of an image in a batch: the mixed one, and with RegMixup a clean one."""
        return 2 if self.regmixup and self.alpha > 0 else 1

    @property
    def always(self) -> bool:
        """Whether every batch is mixed."""
        return self.probability == 1 and not self.first_epoch and self.last_epoch is None

    def check_groups(self, batch_size: int, num_hosts: int) -> None:
        """Raises UserError unless the groups divide the batch and each lies on one host."""
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
        batch_size: Size of the global batch.
        seed: Seed of order, augmentation and mixing.
        mean, std: Statistics of the normalisation by channel, for images in [0, 1].
        augment: Augmentation of the first view.
        mix: Mixing of the first view, or of the first two by a rule of two views.
        dtype: Type to which the images are rounded at the end, "float32" or "bfloat16".
        views: Augmentations of the further views of the same images.
        sampler, samples_per_class: Order of the examples, see `samplers.batches`.
        other_augment: Augmentation that half of the images, drawn one by one, get in place of
            `augment`; None for none.
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
    """The part of each global batch that a host makes, and the number of its threads.

    Attributes:
        index: Position of the host, from 0.
        count: Number of hosts.
        threads: Number of threads; None for one on each core.
    """

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


# The host that makes whole batches.
ONE_HOST = Host()
