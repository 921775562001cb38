"""How the next text token is chosen from its logits."""

import dataclasses

import jax
import jax.numpy as jnp

from cfjax.documents import Vocabulary
from cfjax.errors import UserError

_NEVER = -1e30  # a logit


@dataclasses.dataclass(frozen=True)
class TextSampling:
    """How text is generated; hashable, static in programs.

    Attributes:
      max_length: of a text, in tokens.
      temperature: by which logits are divided; 0 takes the most probable token.
      top_k: only the k most probable tokens are drawn; 0 for all.
      top_p: only the most probable tokens are drawn whose probabilities, all but the last of them, sum
        to less; 1 for all.
      num_beams: of beam search, which draws nothing; 1 for none.
      length_penalty: beams are compared by log-probability / length ** penalty.
      guidance_scale: of classifier-free guidance, against the same text with nothing before it
        (arXiv 2306.17806); 1 for none.
    """

    max_length: int
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    num_beams: int = 1
    length_penalty: float = 1.0
    guidance_scale: float = 1.0

    @property
    def is_guided(self) -> bool:
        """Whether the text alone is looked at too."""
        return self.guidance_scale != 1.0

    def __post_init__(self):
        if self.max_length < 1 or self.num_beams < 1:
            raise UserError(
                f"max_length {self.max_length} and num_beams {self.num_beams} must be at least 1."
            )
        if self.temperature < 0 or self.top_k < 0:
            raise UserError(
                f"temperature {self.temperature:g} and top_k {self.top_k} must not be negative."
            )
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p:g}, but must be in (0, 1].")
        if self.guidance_scale < 1:
            raise UserError(
                f"guidance_scale of text is {self.guidance_scale:g}, but must be at least 1, which is"
                " none."
            )
        if self.num_beams > 1 and (self.temperature or self.top_k or self.top_p < 1):
            raise UserError(
                "beam search draws nothing; pass num_beams=1, or no temperature, top_k and top_p."
            )


def choose_token(settings: TextSampling, logits: jax.Array, keys: jax.Array) -> jax.Array:
    """The next token of each row: logits float32 `[rows, V]` and typed keys `[rows]` to int32."""
    if settings.temperature == 0:
        return logits.argmax(-1).astype(jnp.int32)
    logits = keep_most_probable(logits / settings.temperature, settings.top_k, settings.top_p)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def keep_most_probable(logits: jax.Array, top_k: int, top_p: float) -> jax.Array:
    """Logits `[rows, V]` with all others made impossible; of equal ones all stay that may."""
    if 0 < top_k < logits.shape[-1]:
        smallest = jax.lax.top_k(logits, top_k)[0][:, -1:]
        logits = jnp.where(logits < smallest, _NEVER, logits)
    if top_p < 1:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        probabilities = jax.nn.softmax(ordered)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        smallest = jnp.min(jnp.where(before < top_p, ordered, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < smallest, _NEVER, logits)
    return logits


def next_token_logits(
    settings: TextSampling, vocabulary: Vocabulary, logits: jax.Array
) -> jax.Array:
    """By what the next token of a text is chosen, float32 `[rows, V]`.

    Args:
      settings: read is the guidance.
      vocabulary: our own tokens. `end_of_image` is never chosen. Under guidance a text ends by
        `end_of_text` alone, as probable as all ends together: what would follow does not matter.
      logits: float32 `[rows, copies, V]`, of the document and, if guided, of the text alone.
    """
    if not settings.is_guided:
        return without(logits[:, 0], vocabulary.end_of_image)
    ends = [vocabulary.end_of_text, vocabulary.begin_of_image]
    logits = without(logits, vocabulary.end_of_image)
    end = jax.nn.logsumexp(logits[..., ends], axis=-1)
    logits = without(logits, vocabulary.begin_of_image).at[..., vocabulary.end_of_text].set(end)
    of_document, of_text = jnp.split(jax.nn.log_softmax(logits), 2, axis=1)
    guided = of_text + settings.guidance_scale * (of_document - of_text)
    return without(guided[:, 0], [vocabulary.begin_of_image, vocabulary.end_of_image])


def without(logits: jax.Array, tokens: int | list[int]) -> jax.Array:
    """Logits `[..., V]` under which some tokens are never chosen."""
    return logits.at[..., tokens].set(_NEVER)
