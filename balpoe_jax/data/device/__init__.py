# SPDX-License-Identifier: Apache-2.0
"""Training batches made in the memory of the devices: NumPy plans them, JAX makes them.

The training set lies in device memory as packed pixels. The *plan* of a step is all that is drawn
for its batch: small arrays that NumPy computes on the host as a function of (seed, step) alone, in
double precision where it is needed. The compiled training step makes the batch from the plan.

    planner = Planner(labels, image_shape, settings)
    plan = planner.steps(first_step, last_step)                  # NumPy, [K, B, ...]
    batch = make_batch(constants, one_step_of_the_plan, planner) # JAX, [b, H, W, 3]
"""
