"""The train step of an autoencoder as a pure function, and as the program that a run compiles."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from cfjax import autoencoder_objective, train_state
from cfjax.autoencoder_objective import AutoencoderObjective
from cfjax.models.autoencoder_kl import AutoencoderKL
from cfjax.rng import per_example_keys, stream_key
from cfjax.sharding import activate, batch_sharding, replicated
from cfjax.train_state import TrainState
from cfjax.train_step import Totals


@dataclasses.dataclass(frozen=True)
class AutoencoderTrainStep:
    """What is fixed for a run; `train_step` reads every field.

    Attributes:
      module: the autoencoder.
      objective: what it is trained for.
      optimizer: of its parameters.
      ema_decay: of the averaged parameters.
      seed: of all that is drawn.
    """

    module: AutoencoderKL
    objective: AutoencoderObjective
    optimizer: optax.GradientTransformation
    ema_decay: float
    seed: int

    def init(self, key: jax.Array) -> TrainState:
        """The state before the first train step."""
        size = self.module.downsampling
        images = jnp.zeros((1, size, size, self.module.image_channels))
        return train_state.create(self.module.init(key, images)["params"], self.optimizer)


def train_step(
    state: TrainState,
    batch: Mapping[str, jax.Array],
    lpips_params: Any,
    settings: AutoencoderTrainStep,
) -> tuple[TrainState, Totals]:
    """One train step, pure.

    Args:
      state: before the train step.
      batch: "image" float32 `[batch, H, W, C]` in [-1, 1].
      lpips_params: of `Lpips`; None when the objective has no weight for it.
      settings: static.

    Returns:
      The state after it and metrics as `(sum, count)` by name.
    """
    images = batch["image"]
    key = stream_key(settings.seed, "posterior", state.train_step)
    keys = per_example_keys(key, jnp.arange(len(images)))

    def loss_fn(params):
        return autoencoder_objective.loss(
            settings.objective, settings.module, params, images, keys, lpips_params
        )

    (loss, totals), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    state = train_state.apply_gradients(state, grads, settings.optimizer, settings.ema_decay)
    totals |= {"loss": (loss, 1.0), "gradient_norm": (optax.tree.norm(grads), 1.0)}
    return state, totals


def compile_train_step(
    settings: AutoencoderTrainStep,
    mesh: Mesh,
    abstract_state: TrainState,
    image_shape: tuple[int, int, int, int],
    lpips_params: Any = None,
) -> Callable[[TrainState, Mapping[str, jax.Array]], tuple[TrainState, Totals]]:
    """The train step as it runs: it takes `(state, {"image", "label"})` and donates the state.

    Args:
      settings: static.
      mesh: over whose devices the batch is split; the parameters are whole on each.
      abstract_state: `ShapeDtypeStruct`s with shardings.
      image_shape: `(global batch, H, W, C)`.
      lpips_params: as of `train_step`, NumPy arrays.
    """
    rows = batch_sharding(mesh)
    abstract_batch = {
        "image": jax.ShapeDtypeStruct(image_shape, jnp.float32, sharding=rows),
        "label": jax.ShapeDtypeStruct(image_shape[:1], jnp.int32, sharding=rows),
    }
    state_shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state)
    jitted = jax.jit(
        lambda state, batch, lpips_params: train_step(state, batch, lpips_params, settings),
        donate_argnums=0,
        out_shardings=(state_shardings, replicated(mesh)),
    )
    # An argument, as constants would be compiled in.
    lpips_params = jax.device_put(lpips_params, replicated(mesh))
    with activate(mesh):
        compiled = jitted.lower(abstract_state, abstract_batch, lpips_params).compile()
    return lambda state, batch: compiled(state, batch, lpips_params)
