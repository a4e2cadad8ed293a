# SPDX-License-Identifier: Apache-2.0
"""How batches are made, as data: augmentation, mixing, order, and each host's part. NumPy only.

Two pipelines read these settings: `pipeline` makes batches with tf.data on the host, `device` makes
them in the memory of the devices.
"""

import dataclasses

from balpoe_jax.errors import UserError

# How the training set is gone through:
#   shuffle         every epoch is a permutation of all examples
#   class_balanced  a class with even odds, then one of its examples with even odds
#   class_aware     the classes in turn, in a new order each time round, and of each class some of
#                   its examples in turn, in a new order each time round (MiSLAS, stage 2)
SAMPLERS = ("shuffle", "class_balanced", "class_aware")


def check_sampler(sampler: str, samples_per_class: int) -> None:
    """Refuses a sampler that there is not."""
    if sampler not in SAMPLERS:
        raise UserError(
            f"config.data.sampler must be one of {', '.join(SAMPLERS)}; got {sampler!r}."
        )
    if samples_per_class < 1:
        raise UserError(
            f"config.data.samples_per_class must be at least 1, got {samples_per_class}."
        )


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


def check_policy(name: str) -> None:
    """Refuses an unknown policy.

    Raises:
        UserError (a `ValueError`): listing the valid names.
    """
    if name not in POLICIES:
        raise UserError(f"augment.policy must be one of {', '.join(POLICIES)}; got {name!r}.")


# timm's `rand-n2-m10-mstd0.5`: colour outside the image, operations an image, their magnitude.
IMAGENET_MEAN = (124, 116, 104)
RANDAUGMENT_LAYERS = 2
RANDAUGMENT_MAGNITUDE = RANDAUGMENT_GREATEST = 10.0

BLUR_SIGMA = (0.1, 2.0)


@dataclasses.dataclass(frozen=True)
class AugmentSettings:
    """What happens to each image, in this order.

    Attributes:
        crop_area: a window with at least this share of the area is resized to the image's size, by
            the rule of torchvision's RandomResizedCrop. 0: photographs, which always have such a
            window, 0.08; of images of one size the whole is kept.
        crop_padding: pixels of black around the image; a crop of the old size is taken from it.
        flip: mirror left and right, half of the images.
        rotation: uniform between minus and plus so many degrees; nearest pixel, black corners.
        color_jitter: brightness, contrast and saturation each change by a factor that is uniform
            within 1 plus or minus so much, in random order.
        hue: it turns by a share of the circle that is uniform between minus and plus so much; one
            more of these changes in random order.
        jitter_probability: of all of these changes together.
        grayscale: the share of images that lose their colour.
        blur: the share of images that are blurred, by a Gaussian of a standard deviation that is
            uniform in `BLUR_SIGMA` pixels; see `blur`.
        policy: one of `POLICIES`.
        fill: colour that the policy randaugment shows outside the image, 0 to 255 by channel.
        randaugment_layers, randaugment_magnitude: of that policy, see `randaugment.draw`.
        cutout: side in pixels of a black square with its centre anywhere; 0 for none.

    Raises:
        UserError (a `ValueError`): a value that is not valid.
    """

    crop_padding: int = 0
    flip: bool = False
    rotation: float = 0.0
    color_jitter: tuple[float, float, float] = (0.0, 0.0, 0.0)
    policy: str = "none"
    fill: tuple[int, int, int] = IMAGENET_MEAN
    cutout: int = 0
    crop_area: float = 0.0
    hue: float = 0.0
    jitter_probability: float = 1.0
    grayscale: float = 0.0
    blur: float = 0.0
    randaugment_layers: int = RANDAUGMENT_LAYERS
    randaugment_magnitude: float = RANDAUGMENT_MAGNITUDE

    def __post_init__(self) -> None:
        check_policy(self.policy)
        if not 0 <= self.rotation <= 180:
            raise UserError(f"augment.rotation must be 0 to 180 degrees, got {self.rotation}.")
        if self.crop_padding < 0:
            raise UserError(f"augment.crop_padding must not be negative, got {self.crop_padding}.")
        if len(self.color_jitter) != 3 or not all(0 <= x <= 1 for x in self.color_jitter):
            raise UserError(
                "augment.color_jitter must be three numbers from 0 to 1 (brightness, contrast, "
                f"saturation), got {self.color_jitter}."
            )
        if not 0 <= self.hue <= 0.5:
            raise UserError(f"augment.hue must be 0 to 0.5 of the circle, got {self.hue}.")
        for name in ("crop_area", "jitter_probability", "grayscale", "blur"):
            if not 0 <= (share := getattr(self, name)) <= 1:
                raise UserError(f"augment.{name} must be 0 to 1, got {share}.")
        if len(self.fill) != 3 or not all(0 <= x <= 255 for x in self.fill):
            raise UserError(f"augment.fill must be three values from 0 to 255, got {self.fill}.")
        if self.randaugment_layers < 1:
            raise UserError(
                f"augment.randaugment_layers must be at least 1, got {self.randaugment_layers}; "
                "augment.policy=none turns RandAugment off."
            )
        if not 0 <= self.randaugment_magnitude <= RANDAUGMENT_GREATEST:
            raise UserError(
                f"augment.randaugment_magnitude must be 0 to {RANDAUGMENT_GREATEST:g}, got "
                f"{self.randaugment_magnitude}."
            )
        if self.cutout < 0 or self.cutout % 2:
            raise UserError(f"augment.cutout must be even and not negative, got {self.cutout}.")

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
class MixSettings:
    """How the images of a batch are mixed with others.

    Attributes:
        alpha: of the Beta distribution `Beta(alpha, alpha)` of coefficients; 0 for no mixing.
        groups: partners in the batch are within this many equal groups of neighbours; 1 is the
            reference, several keep the partners of a row on its host.
        rule: one of `RULES`.
            mixup: a weighted mean, one coefficient a batch.
            cutmix: a box of the partner's pixels, one box a batch; the label's share is that of the
                pixels.
            mixup_or_cutmix: one of these two, with even odds for each batch.
            remix, remix_cutmix: mixup or cutmix, but the whole label is the rarer one's where its
                class is `remix_kappa` times as rare and the other's share of the image is less than
                `threshold`.
            unimix: a weighted mean with a coefficient for each image, which favours the rarer.
            cmo: cutmix with partners from the second sampler.
        probability: the share of batches that are mixed.
        first_epoch, last_epoch: batches are mixed from the first of these epochs, counted from 0,
            until before the last one; 0 for the last one means to the end.
        remix_kappa, threshold: of Remix.
        exponent: partners are drawn, where they are not a permutation of the batch, with
            probability proportional to a class's number of examples to the power of so much: for
            each class by the second sampler, for each image of the batch by unimix.
        partners: "batch" (a permutation; of unimix with replacement) or "sampler" (the second one,
            over the whole training set with replacement; its images are augmented by draws of
            their own). Of cmo it is always the sampler.

    Raises:
        UserError (a `ValueError`): a value that is not valid.
    """

    alpha: float = 0.0
    groups: int = 1
    rule: str = "mixup"
    probability: float = 1.0
    first_epoch: int = 0
    last_epoch: int = 0
    remix_kappa: float = 3.0
    remix_tau: float = 0.5
    sampling_power: float = 0.0
    partners: str = "batch"

    def __post_init__(self) -> None:
        for name, valid in (("rule", RULES), ("partners", PARTNERS)):
            if (value := getattr(self, name)) not in valid:
                raise UserError(
                    f"config.mix.{name} must be one of {', '.join(valid)}; got {value!r}."
                )
        if not self.alpha >= 0:
            raise UserError(f"config.mix.alpha must not be negative, got {self.alpha}.")
        if not 0 <= self.probability <= 1:
            raise UserError(f"config.mix.probability must be 0 to 1, got {self.probability}.")
        if self.first_epoch < 0 or 0 < self.last_epoch <= self.first_epoch or self.last_epoch < 0:
            raise UserError(
                "config.mix.first_epoch must not be negative and .last_epoch be later, or 0 for "
                f"the end; got {self.first_epoch} and {self.last_epoch}."
            )
        if not self.remix_kappa >= 1 or not 0 <= self.remix_tau <= 1:
            raise UserError(
                "config.mix.remix_kappa must be at least 1 and .remix_tau 0 to 1, got "
                f"{self.remix_kappa} and {self.remix_tau}."
            )

    @property
    def from_sampler(self) -> bool:
        """Whether partners are read from the training set rather than found in the batch."""
        return self.alpha > 0 and (self.rule == "cmo" or self.partners == "sampler")

    @property
    def always(self) -> bool:
        """Whether every batch is mixed."""
        return self.probability == 1 and not self.first_epoch and not self.last_epoch

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

    Raises:
        UserError (a `ValueError`): a sampler that there is not.
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

    def __post_init__(self) -> None:
        check_sampler(self.sampler, self.samples_per_class)


@dataclasses.dataclass(frozen=True)
class Host:
    """Which part of each global batch to make, and with how many threads (0: all cores)."""

    index: int = 0
    count: int = 1
    threads: int = 0

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
