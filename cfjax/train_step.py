"""The train step as a pure function, and as the programs that a run compiles."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from cfjax import document_objective, objective, train_state
from cfjax.document_objective import DocumentObjective
from cfjax.errors import UserError
from cfjax.models.autoencoder_kl import Moments, split_moments
from cfjax.models.causal_fusion import CausalFusion
from cfjax.models.patches import patchify
from cfjax.objective import Objective
from cfjax.rng import per_example_keys, stream_key
from cfjax.sharding import activate, constrain, replicated
from cfjax.train_state import TrainState

# Sum and count of each metric of a train step.
Totals = dict[str, tuple[jax.Array, jax.Array]]


@dataclasses.dataclass(frozen=True)
class TrainStepSettings:
    """What is fixed for a run; `train_step` reads every field.

    Attributes:
      model: the transformer.
      objective: what it is trained for.
      optimizer: of its parameters.
      patch_size: p; a token is p x p pixels or latents.
      ema_decay: of the averaged parameters.
      seed: of all that is drawn.
      num_microbatches: parts of the batch whose gradients are computed one after the other.
      latent_scale: by which latents are multiplied; None for pixels.
    """

    model: CausalFusion
    objective: Objective | DocumentObjective
    optimizer: optax.GradientTransformation
    patch_size: int
    ema_decay: float
    seed: int
    num_microbatches: int = 1
    latent_scale: float | None = None


def train_step(
    state: TrainState,
    batch: Mapping[str, jax.Array],
    settings: TrainStepSettings,
    num_clean: int | None = None,
) -> tuple[TrainState, Totals]:
    """One train step, pure.

    Args:
      state: before the train step.
      batch: "label" int32 `[batch]`, and "image" float32 `[batch, H, W, C]` in [-1, 1]; or for
        latents "moments" `[batch, h, w, 2 c]`, as `AutoencoderKL.encode_parameters` gives them. Of
        documents, rows from `cfjax.documents.lay_out`, whose "image" or "moments" have an axis of
        images after that of the batch.
      settings: static.
      num_clean: clean tokens of the sequence (static), at least those before the last AR step; by
        default what suffices for every split.

    Returns:
      The state after it and metrics as `(sum, count)` by name.
    """
    if isinstance(settings.objective, DocumentObjective):
        loss_fn, inputs = _of_documents(settings, batch, state.train_step)
    else:
        loss_fn, inputs = _of_images(settings, batch, state.train_step, num_clean)
    value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)
    if settings.num_microbatches == 1:
        (loss, totals), grads = value_and_grad(state.params, *inputs)
    else:
        (loss, totals), grads = _accumulated(
            value_and_grad, state.params, inputs, settings.num_microbatches
        )
    state = train_state.apply_gradients(state, grads, settings.optimizer, settings.ema_decay)
    totals |= {"loss": (loss, 1.0), "gradient_norm": (optax.tree.norm(grads), 1.0)}
    return state, totals


# (parameters, *inputs) -> loss, and totals; and the inputs, arrays with an axis of the batch.
_Task = tuple[Callable[..., tuple[jax.Array, Totals]], tuple[Any, ...]]


def _of_images(
    settings: TrainStepSettings,
    batch: Mapping[str, jax.Array],
    train_step: jax.Array,
    num_clean: int | None,
) -> _Task:
    tokens = _tokens(settings, batch, train_step)
    drawn = objective.corrupt(
        settings.objective, settings.model, batch["label"], settings.seed, train_step
    )

    def loss_fn(params, tokens, drawn):
        output = objective.loss(
            settings.objective, settings.model, params, tokens, drawn, num_clean
        )
        breakdown = objective.loss_breakdown(settings.objective, drawn, output.squared_error)
        return output.loss, breakdown

    return loss_fn, (tokens, drawn)


def _of_documents(
    settings: TrainStepSettings, batch: Mapping[str, jax.Array], train_step: jax.Array
) -> _Task:
    num_rows, num_images = batch["image_places"].shape
    name = "image" if settings.latent_scale is None else "moments"
    images = batch[name].reshape(num_rows * num_images, *batch[name].shape[2:])
    tokens = _tokens(settings, {name: images}, train_step)
    tokens = tokens.reshape(num_rows, num_images, *tokens.shape[1:])
    rows = {name: it for name, it in batch.items() if name not in ("image", "moments")}
    drawn = document_objective.corrupt(
        settings.objective, settings.model, rows, settings.seed, train_step
    )

    def loss_fn(params, *inputs):
        return document_objective.loss(settings.objective, settings.model, params, *inputs)

    return loss_fn, (tokens, rows, drawn, document_objective.weights(rows))


def _tokens(
    settings: TrainStepSettings, batch: Mapping[str, jax.Array], train_step: jax.Array
) -> jax.Array:
    """Images `[images, L, token_width]` in grid order."""
    if settings.latent_scale is None:
        inputs = batch["image"]
    else:
        key = stream_key(settings.seed, "latents", train_step)
        inputs = settings.latent_scale * draw_latents(batch["moments"], key)
    return patchify(inputs, settings.patch_size)


def draw_latents(moments: jax.Array, key: jax.Array) -> jax.Array:
    """Latents float32 `[batch, h, w, c]`, drawn by the rows of the global batch.

    Args:
      moments: `[batch, h, w, 2 c]`, mean and log-variance.
      key: of the train step.
    """
    keys = per_example_keys(key, jnp.arange(moments.shape[0]))
    return jax.vmap(Moments.sample)(split_moments(moments.astype(jnp.float32)), keys)


def _accumulated(
    value_and_grad: Any, params: Any, inputs: tuple[Any, ...], num_microbatches: int
) -> Any:
    """What `value_and_grad` gives for the whole batch, with the activations of one part at a time.

    The loss is a mean over examples, so the parts' losses and gradients are averaged; totals add up.
    """

    def split(x):
        # Every n-th example, so that each device keeps its own.
        parts = x.reshape(x.shape[0] // num_microbatches, num_microbatches, *x.shape[1:])
        return constrain(parts.swapaxes(0, 1), (None, "batch"))

    parts = jax.tree.map(split, inputs)
    share = 1 / num_microbatches

    def add(total, part):
        (loss, totals), grads = value_and_grad(params, *part)
        scaled = ((share * loss, totals), jax.tree.map(lambda grad: share * grad, grads))
        return jax.tree.map(jnp.add, total, scaled), None

    shapes = jax.eval_shape(value_and_grad, params, *jax.tree.map(lambda part: part[0], parts))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    return jax.lax.scan(add, zeros, parts)[0]


@dataclasses.dataclass(frozen=True)
class TrainProgram:
    """The train steps that a run compiles, one for each number of clean tokens.

    Attributes:
      settings: of the train step.
      mesh: over whose devices it runs; they may be those of a described topology.
      abstract_state, abstract_batch: `ShapeDtypeStruct`s with shardings.
      clean_lengths: ascending; the last suffices for every split.
      compiler_options: of XLA, by name.
    """

    settings: TrainStepSettings
    mesh: Mesh
    abstract_state: TrainState
    abstract_batch: Mapping[str, jax.ShapeDtypeStruct]
    clean_lengths: tuple[int, ...]
    compiler_options: Mapping[str, str]

    def trace(self, num_clean: int) -> jax.stages.Traced:
        """The train step as a jaxpr; it takes `(state, batch)` and donates the state."""
        state_shardings = jax.tree.map(lambda leaf: leaf.sharding, self.abstract_state)
        jitted = jax.jit(
            lambda state, batch: train_step(state, batch, self.settings, num_clean),
            donate_argnums=0,
            out_shardings=(state_shardings, replicated(self.mesh)),
        )
        with activate(self.mesh):
            return jitted.trace(self.abstract_state, self.abstract_batch)

    def lower(self, num_clean: int) -> jax.stages.Lowered:
        """The train step before it is compiled."""
        with activate(self.mesh):
            return self.trace(num_clean).lower()

    def compile(self, num_clean: int) -> jax.stages.Compiled:
        """The train step as it runs.

        Raises:
          UserError: the compiler does not know one of the options.
        """
        return compile_with_options(self.lower(num_clean), self.compiler_options)


def compile_with_options(
    lowered: jax.stages.Lowered, compiler_options: Mapping[str, str]
) -> jax.stages.Compiled:
    """Compiles under options of XLA.

    Raises:
      UserError: the compiler does not know one of the options.
    """
    try:
        return lowered.compile(compiler_options=dict(compiler_options) or None)
    except jax.errors.JaxRuntimeError as error:
        if "No such compile option" not in str(error):
            raise
        name = str(error).rpartition("'")[0].rpartition("'")[2]
        raise UserError(
            f"the compiler does not know the option {name!r} of train.tpu_compiler_options; correct"
            " or remove it."
        ) from error
