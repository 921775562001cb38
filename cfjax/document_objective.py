"""The training objective for rows of documents: diffusion of images and cross-entropy of text.

loss = diffusion loss + text_loss_weight * cross-entropy, each a mean over the targets of the global
batch. Images are factorized and corrupted as those of single-image models, each by itself.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from cfjax import objective as image_objective
from cfjax.diffusion.process import add_noise, prediction_target
from cfjax.documents import NO_PLACE, NO_TARGET
from cfjax.errors import UserError
from cfjax.models.multimodal import DocumentRows, MultimodalCausalFusion
from cfjax.objective import Corruption, Objective, loss_breakdown, loss_weights


@dataclasses.dataclass(frozen=True)
class DocumentObjective:
    """What is trained.

    Attributes:
      image: the objective of each image.
      text_loss_weight: of the cross-entropy, in nats a token, against the diffusion loss.
    """

    image: Objective
    text_loss_weight: float = 0.2

    def __post_init__(self):
        if self.text_loss_weight < 0:
            raise UserError(f"text_loss_weight is {self.text_loss_weight}, but must be at least 0.")


class Weights(NamedTuple):
    """Of each target in the loss of its batch, which is the mean over rows of the weighted sums.

    Attributes:
      image: float32 `[batch, I]`.
      text: float32 `[batch, N]`.
    """

    image: jax.Array
    text: jax.Array


def weights(batch: Mapping[str, jax.Array]) -> Weights:
    """Equal for all targets of a kind; from the whole batch, so that it may be split afterwards."""

    def equal(is_target):
        share = is_target.astype(jnp.float32)
        return share * (len(share) / jnp.maximum(share.sum(), 1))

    is_target = batch["image_is_target"] & (batch["image_places"] != NO_PLACE)
    return Weights(equal(is_target), equal(batch["text_targets"] != NO_TARGET))


def corrupt(
    objective: DocumentObjective,
    model: MultimodalCausalFusion,
    batch: Mapping[str, jax.Array],
    seed: int,
    train_step: int | jax.Array,
) -> Corruption:
    """Draws what a train step needs for all images, by their slots: arrays `[batch, I, ...]`.

    `labels` are those of classes, dropped as in single-image models, or `[batch, 0]`.
    """
    num_rows, num_images = batch["image_places"].shape
    has_classes = batch["label"].shape[1] > 0
    labels = batch["label"] if has_classes else jnp.zeros((num_rows, num_images), jnp.int32)
    drawn = image_objective.corrupt(objective.image, model, labels.reshape(-1), seed, train_step)
    drawn = jax.tree.map(lambda x: x.reshape(num_rows, num_images, *x.shape[1:]), drawn)
    return drawn if has_classes else drawn._replace(labels=batch["label"])


class DocumentLoss(NamedTuple):
    """The loss of a batch, and what it is made of as `(sum, count)` by name."""

    loss: jax.Array
    totals: dict[str, tuple[jax.Array, jax.Array]]


def loss(
    objective: DocumentObjective,
    model: MultimodalCausalFusion,
    params: Any,
    tokens: jax.Array,
    batch: Mapping[str, jax.Array],
    drawn: Corruption,
    weights: Weights,
) -> DocumentLoss:
    """The loss of a batch under a given corruption.

    Args:
      objective: the loss (static).
      model: the transformer (static).
      params: its parameters.
      tokens: patchified images `[batch, I, L, token_width]` in grid order.
      batch: from `cfjax.documents.lay_out`.
      drawn: from `corrupt`.
      weights: from `weights`, of the whole batch of which this may be a part.
    """
    image, plan = objective.image, drawn.plan
    x_start = jnp.take_along_axis(tokens, plan.token_order[..., None], axis=2)
    x_t = add_noise(image.schedule, x_start[:, :, None], drawn.noise, drawn.t)
    rows = {name: batch[name] for name in DocumentRows._fields}
    rows["label"] = drawn.labels
    prediction, logits = model.apply(
        {"params": params},
        DocumentRows(**rows),
        x_start,
        x_t,
        drawn.t,
        *plan,
        method=model.documents,
    )
    target = prediction_target(
        image.schedule, image.prediction_type, x_start[:, :, None], drawn.noise, drawn.t
    )
    squared_error = jnp.square(prediction - target)
    of_token = loss_weights(image, plan.ar_step_ids, drawn.t)
    of_image = jnp.mean(of_token * squared_error, axis=(2, 3, 4))
    diffusion_loss = jnp.mean(jnp.sum(weights.image * of_image, axis=1))

    targets = jnp.maximum(batch["text_targets"], 0)
    log_probabilities = jax.nn.log_softmax(logits)
    of_target = jnp.take_along_axis(log_probabilities, targets[..., None], axis=2)[..., 0]
    text_loss = jnp.mean(jnp.sum(weights.text * -of_target, axis=1))

    is_target = weights.text > 0
    is_right = (logits.argmax(-1) == targets) & is_target
    totals = {
        "loss/image": (diffusion_loss, 1.0),
        "loss/text": (text_loss, 1.0),
        "text_accuracy": (
            is_right.sum(dtype=jnp.float32),
            is_target.sum(dtype=jnp.float32),
        ),
    }
    per_image = jax.tree.map(
        lambda x: x.reshape(-1, *x.shape[2:]), (drawn._replace(labels=None), squared_error)
    )
    totals |= loss_breakdown(image, *per_image, is_counted=weights.image.reshape(-1) > 0)
    return DocumentLoss(diffusion_loss + objective.text_loss_weight * text_loss, totals)
