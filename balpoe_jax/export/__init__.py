# SPDX-License-Identifier: Apache-2.0
"""A trained run as a file for other programs: `python -m balpoe_jax.export --workdir=RUN`.

Each format is a module with a function `write(predictor, folder)`, which returns the path of what
it wrote. The program in it takes uint8 images `[n, S, S, 3]` of any n, and gives `expert_logits`
`[n, E, C]`, `logits` `[n, C]` and `probabilities` `[n, C]`; see `Predictor.as_function`.
"""
