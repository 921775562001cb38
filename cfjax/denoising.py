"""The denoising steps of one AR step, from noise to clean tokens."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from cfjax.denoising_tables import DenoisingTables
from cfjax.diffusion.solvers import Solver, StepCoefficients, denoising_step
from cfjax.guided_network import Caches, Network, guided_prediction


def denoise_tokens(
    network: Network,
    guide: Network | None,
    tables: DenoisingTables,
    solver: Solver,
    ar_step: int | jax.Array,
    row: int | jax.Array,
    caches: Caches,
    x_t: jax.Array,
    grid_indices: jax.Array,
    noise_at: Callable[[jax.Array], jax.Array],
    record: bool = False,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
    """Denoises the tokens of one AR step from noise to clean.

    Args:
      network, guide: the transformers.
      tables: of all AR steps.
      solver: the denoising rule.
      ar_step: which AR step.
      row: its row of the tables; traced where AR steps of one loop differ in denoising steps.
      caches: from `prefill` and `push_clean_tokens`.
      x_t: noise `[batch, M, token_width]`.
      grid_indices: `[batch, M]`.
      noise_at: index of the denoising step, counted down -> noise like `x_t`.
      record: also return what each denoising step gave; `row` is an int then.

    Returns:
      Clean tokens like `x_t`, and with `record` (x_t, predicted x_0) after each denoising step,
      `[denoising steps, ...]`.
    """

    def look_up(table, index):
        return jnp.asarray(table, jnp.float32)[row, index]

    by_ar_step = jnp.asarray(tables.guidance_by_ar_step, jnp.float32)[ar_step]

    def step(carry, index, is_guided):
        x_t, x_start = carry
        t = jnp.asarray(tables.timesteps)[row, index]
        scale = None
        if is_guided:
            by_timestep = look_up(tables.guidance_by_timestep, index)
            scale = 1.0 + (tables.guidance_scale - 1.0) * by_ar_step * by_timestep
        prediction = guided_prediction(network, guide, caches, x_t, t, grid_indices, scale)
        noise = noise_at(index) if solver.needs_noise else None
        coefficients = StepCoefficients(*(look_up(it, index) for it in tables.coefficients))
        x_t, x_start = denoising_step(solver, coefficients, x_t, prediction, x_start, noise)
        carry = x_t, x_start if solver.is_multistep else None
        return carry, (x_t, x_start) if record else None

    carry = x_t, jnp.zeros_like(x_t) if solver.is_multistep else None
    recorded = []
    for segment, is_guided in enumerate((False, True, False)):
        begins, ends = tables.segments[:, segment], tables.segments[:, segment + 1]
        if isinstance(row, int):
            if begins[row] > ends[row]:
                indices = jnp.arange(ends[row], begins[row])[::-1]
                body = functools.partial(step, is_guided=is_guided)
                carry, outputs = jax.lax.scan(body, carry, indices)
                recorded.append(outputs)
        elif (begins > ends).any():
            begin = jnp.asarray(begins)[row]
            num_denoising_steps = begin - jnp.asarray(ends)[row]

            def body(i, carry, begin=begin, is_guided=is_guided):
                return step(carry, begin - 1 - i, is_guided)[0]

            carry = jax.lax.fori_loop(0, num_denoising_steps, body, carry)
    if not record:
        return carry[0], None
    return carry[0], jax.tree.map(lambda *parts: jnp.concatenate(parts), *recorded)
