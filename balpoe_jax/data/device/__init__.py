# SPDX-License-Identifier: Apache-2.0
"""Training batches made in the memory of the devices: NumPy plans them, JAX makes them.

The training set lies in device memory as bytes. What a step does to it is its *plan*: small arrays
that NumPy draws on the host as a function of (seed, step) alone, with all that needs double
precision. A compiled program makes the batch of the plan, as a part of the training step.

    planner = Planner(labels, image_shape, settings)
    plan = planner.steps(first_step, last_step)                  # NumPy, [K, B, ...]
    batch = make_batch(constants, one_step_of_the_plan, planner) # JAX, [b, H, W, 3]
"""
