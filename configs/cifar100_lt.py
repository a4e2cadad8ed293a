# SPDX-License-Identifier: Apache-2.0
"""BalPoE on CIFAR-100-LT.

    python -m balpoe_jax.main --config=configs/cifar100_lt.py:ir=100,recipe=standard --workdir=DIR

Arguments: ir=100|50|10; method=balpoe or another one of the README's table; recipe=own (the
method's training), or standard|strong|long (BalPoE's trainings, for any method); mixup=true|false
(default: as the method does); experts=E (0: the method's own number); backbone=resnet32|...;
width=N (0: the method's own factor of the channels, mostly 1);
epochs=N (0: the recipe's own number; otherwise its schedule is scaled).

One GPU is enough: ResNet-32 with 3 experts at batch 128. Top-1 accuracy in the paper (ResNet-32, 3
experts, balanced test set; no figure of ours is measured yet, for want of an accelerator):

    arguments                                    paper                  ours
    ir=100                                       52.0 +- 0.5, ECE 4.9   not yet measured
    ir=100,mixup=false                           49.2 +- 0.5, ECE 17.6  not yet measured
    ir=100,method=cross_entropy,mixup=false      38.8 +- 0.6, ECE 32.0  not yet measured
    ir=100,method=cross_entropy                  40.8 +- 0.7, ECE 9.6   not yet measured
    ir=100,recipe=strong                         54.7                   not yet measured
    ir=50,recipe=strong / ir=10,recipe=strong    58.7 / 66.3            not yet measured
    ir=100,recipe=long                           55.9                   not yet measured
    ir=50,recipe=long / ir=10,recipe=long        60.1 / 68.1            not yet measured

`python -m balpoe_jax.reproduce --table=2` runs and collects them. We have measured ResNet-8 on two
CPU cores: results/cifar100_lt_cpu.md (15 epochs, three seeds, BalPoE's rows of Table 2),
results/methods_cpu.md (all methods) and results/cifar100_lt_small.md (30 epochs).
"""

from ml_collections import ConfigDict

from balpoe_jax.config.dataset_defaults import cifar_config


def get_config(arguments: str | None = None) -> ConfigDict:
    """The experiment; `arguments` is what stands after the colon."""
    return cifar_config("cifar100", mixup_alpha=0.4, arguments=arguments)
