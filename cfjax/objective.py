"""The training objective (paper sections 3.2 and 3.3): a batch and keys to loss and metrics.

1. Factorize each image along the AR axis: a token order and AR-step ids.
2. Corrupt each AR step along the noise axis: a timestep and noise.
3. Predict from condition, clean and noised tokens in one sequence.
4. Weigh the squared error by AR step and noise level.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from cfjax.diffusion.process import PREDICTION_TYPES, add_noise, at, prediction_target
from cfjax.diffusion.schedule import NoiseSchedule
from cfjax.diffusion.weighting import LOSS_WEIGHTINGS, loss_weight_table
from cfjax.errors import UserError, check_choice
from cfjax.factorization import (
    AR_LOSS_WEIGHT_SCHEDULES,
    Factorization,
    FactorizationPlan,
    ar_loss_weights,
    max_clean_tokens,
    sample_plan,
)
from cfjax.models.causal_fusion import CausalFusion
from cfjax.rng import per_example_keys, stream_key

TIMESTEP_SHARINGS = ("example", "ar_step")


@dataclasses.dataclass(frozen=True)
class Objective:
    """What is trained; `corrupt` and `loss` read every field.

    Attributes:
      factorization: the AR axis.
      schedule: the noise axis.
      prediction_type: what the network predicts, "noise", "x_start" or "velocity".
      timestep_sharing: one timestep for all AR steps of an "example", or one for each "ar_step"
        (paper Table 7).
      timesteps_per_ar_step: k, the noised copies of each AR step, each with its own timestep.
      ar_loss_weight: λ, the loss weight at the first position; it falls to 1.
      ar_loss_weight_schedule: "linear" or "cosine".
      noise_level_weighting: "none", "min_snr", "p2" or "truncated_snr".
      noise_level_gamma: γ of "min_snr" and "p2".
      class_dropout: probability that an example's class is replaced by the null class.
    """

    factorization: Factorization
    schedule: NoiseSchedule
    prediction_type: str = "noise"
    timestep_sharing: str = "example"
    timesteps_per_ar_step: int = 1
    ar_loss_weight: float = 2.0
    ar_loss_weight_schedule: str = "linear"
    noise_level_weighting: str = "none"
    noise_level_gamma: float = 5.0
    class_dropout: float = 0.1

    def __post_init__(self):
        check_choice("prediction type", self.prediction_type, PREDICTION_TYPES)
        check_choice("timestep sharing", self.timestep_sharing, TIMESTEP_SHARINGS)
        check_choice(
            "AR loss weight schedule", self.ar_loss_weight_schedule, AR_LOSS_WEIGHT_SCHEDULES
        )
        check_choice("noise-level weighting", self.noise_level_weighting, LOSS_WEIGHTINGS)
        if self.timesteps_per_ar_step < 1:
            raise UserError(
                f"timesteps_per_ar_step is {self.timesteps_per_ar_step}, but must be at least 1."
            )
        if not 0.0 <= self.class_dropout < 1.0:
            raise UserError(f"class_dropout is {self.class_dropout}, but must be in [0, 1).")


class Corruption(NamedTuple):
    """All that is drawn for a batch of one train step; k noised copies of each example.

    Attributes:
      labels: int32 `[batch]`, the null class where the class is dropped.
      plan: token order and AR-step ids, `[batch, L]`.
      t: int32 `[batch, k, L]`, or `[batch, k, 1]` where the tokens of a copy share a timestep.
      noise: float32 `[batch, k, L, token_width]`, in generation order.
    """

    labels: jax.Array
    plan: FactorizationPlan
    t: jax.Array
    noise: jax.Array


def corrupt(
    objective: Objective,
    model: CausalFusion,
    labels: jax.Array,
    seed: int,
    train_step: int | jax.Array,
) -> Corruption:
    """Draws what a train step needs, by (seed, stream, train step, row of the global batch).

    Args:
      objective: what to draw (static).
      model: gives the grid, the token width and the null class.
      labels: int `[batch]`.
      seed: the run's seed.
      train_step: train steps taken before this one.
    """
    batch, copies = labels.shape[0], objective.timesteps_per_ar_step
    factorization, num_tokens = objective.factorization, model.num_tokens

    def keys(stream):
        return per_example_keys(stream_key(seed, stream, train_step), jnp.arange(batch))

    split_key = (
        keys("split") if factorization.split_per_example else stream_key(seed, "split", train_step)
    )
    plan = sample_plan(factorization, split_key, keys("token_order"), model.grid)

    num_timesteps = objective.schedule.num_timesteps
    if objective.timestep_sharing == "example":
        t = _per_example_randint(keys("timestep"), (copies, 1), num_timesteps)
    else:
        per_ar_step = _per_example_randint(keys("timestep"), (copies, num_tokens), num_timesteps)
        t = jnp.take_along_axis(per_ar_step, plan.ar_step_ids[:, None], axis=2)

    noise_shape = (copies, num_tokens, model.token_width)
    noise = jax.vmap(lambda key: jax.random.normal(key, noise_shape))(keys("noise"))

    uniform = jax.vmap(jax.random.uniform)(keys("class_dropout"))
    labels = jnp.where(uniform < objective.class_dropout, model.null_class, labels)
    return Corruption(labels, plan, t, noise)


def _per_example_randint(keys: jax.Array, shape: tuple[int, ...], bound: int) -> jax.Array:
    return jax.vmap(lambda key: jax.random.randint(key, shape, 0, bound))(keys)


class LossOutput(NamedTuple):
    """The loss of a batch and what it is made of.

    Attributes:
      loss: float32 scalar, the mean of the weighted squared errors.
      prediction: float32 `[batch, k, L, token_width]`.
      squared_error: of the prediction, unweighted, same shape.
    """

    loss: jax.Array
    prediction: jax.Array
    squared_error: jax.Array


def loss(
    objective: Objective,
    model: CausalFusion,
    params: Any,
    tokens: jax.Array,
    drawn: Corruption,
    num_clean: int | None = None,
) -> LossOutput:
    """The loss of a batch under a given corruption.

    As published, the weighted errors are averaged without dividing by the weights' sum, so that the
    loss of another split has another scale.

    Args:
      objective: the loss (static).
      model: the transformer (static).
      params: its parameters.
      tokens: patchified images `[batch, L, token_width]` in grid order.
      drawn: from `corrupt`.
      num_clean: clean tokens in the sequence (static); the loss is the same for all numbers that
        cover the AR steps before the last. By default what suffices for every split.
    """
    schedule, plan, t = objective.schedule, drawn.plan, drawn.t
    x_start = jnp.take_along_axis(tokens, plan.token_order[..., None], axis=1)
    x_t = add_noise(schedule, x_start[:, None], drawn.noise, t)

    if num_clean is None:
        num_clean = max_clean_tokens(objective.factorization, model.num_tokens)
    prediction = model.apply(
        {"params": params}, drawn.labels, x_start[:, :num_clean], x_t, t, *plan
    )

    target = prediction_target(
        schedule, objective.prediction_type, x_start[:, None], drawn.noise, t
    )
    squared_error = jnp.square(prediction - target)

    weights = loss_weights(objective, plan.ar_step_ids, t)
    return LossOutput(jnp.mean(weights * squared_error), prediction, squared_error)


def loss_weights(objective: Objective, ar_step_ids: jax.Array, t: jax.Array) -> jax.Array:
    """By what squared errors are multiplied: by AR step and by noise level.

    Args:
      objective: how (static).
      ar_step_ids: `[..., L]`.
      t: timesteps `[..., k, L]` or `[..., k, 1]`.

    Returns:
      float32 `[..., k, L, 1]`.
    """
    by_ar_step = ar_loss_weights(
        ar_step_ids, objective.ar_loss_weight, schedule=objective.ar_loss_weight_schedule
    )
    by_noise_level = loss_weight_table(
        objective.schedule,
        objective.noise_level_weighting,
        objective.prediction_type,
        objective.noise_level_gamma,
    )
    return by_ar_step[..., None, :, None] * at(by_noise_level, t, t.ndim + 1)


def loss_breakdown(
    objective: Objective,
    drawn: Corruption,
    squared_error: jax.Array,
    is_counted: jax.Array | None = None,
) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Unweighted squared error by AR-step index and by quartile of the noise level (paper fig. 4).

    AR-step indices from 2 on are grouped by powers of two; quartile 1 has the least noise. With
    `is_counted`, bool `[batch]`, of those examples alone.

    Returns:
      `(sum, count)` by name, float32 scalars, to be added up over batches: a group may be empty in
      one batch.
    """
    per_token = squared_error.mean(-1)
    ar_step_ids = jnp.broadcast_to(drawn.plan.ar_step_ids[:, None], per_token.shape)
    quartile = drawn.t * 4 // objective.schedule.num_timesteps
    quartile = jnp.broadcast_to(quartile, per_token.shape)

    members = {}
    for first, last in _ar_step_groups(ar_step_ids.shape[-1]):
        name = f"loss/ar_step_{first}" + (f"_to_{last}" if last > first else "")
        members[name] = (ar_step_ids >= first) & (ar_step_ids <= last)
    for i in range(4):
        members[f"loss/noise_quartile_{i + 1}"] = quartile == i
    if is_counted is not None:
        members = {name: it & is_counted[:, None, None] for name, it in members.items()}
    return {
        name: (jnp.sum(per_token * member), jnp.sum(member, dtype=jnp.float32))
        for name, member in members.items()
    }


def _ar_step_groups(num_tokens: int) -> list[tuple[int, int]]:
    """First and last AR-step index of each group: 0, 1, 2-3, 4-7, ... up to L - 1."""
    groups, first = [(0, 0)], 1
    while first < num_tokens:
        last = min(2 * first - 1, num_tokens - 1)
        groups.append((first, last))
        first = last + 1
    return groups
