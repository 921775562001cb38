"""What training carries from one train step to the next."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct


@struct.dataclass
class TrainState:
    """A pytree.

    Attributes:
      train_step: int32 scalar, how many train steps were taken.
      params: nested dicts of float32 arrays.
      ema_params: exponential moving average of `params`, like them.
      opt_state: the optimizer's state; its moments are like `params`.
    """

    train_step: jax.Array
    params: Any
    ema_params: Any
    opt_state: Any


def create(params: Any, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first train step; the EMA starts as a copy of `params`.

    Where `params` are boxed with logical axes, so are EMA and moments, from which
    `sharding.born_sharded` takes their shardings.
    """
    return TrainState(
        train_step=jnp.zeros((), jnp.int32),
        params=params,
        ema_params=jax.tree.map(jnp.copy, params),
        opt_state=optimizer.init(params),
    )


def apply_gradients(
    state: TrainState, grads: Any, optimizer: optax.GradientTransformation, ema_decay: float
) -> TrainState:
    """One optimizer update, then ema = ema_decay * ema + (1 - ema_decay) * new parameters."""
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema_params = jax.tree.map(
        lambda ema, new: ema_decay * ema + (1 - ema_decay) * new, state.ema_params, params
    )
    return TrainState(state.train_step + 1, params, ema_params, opt_state)
