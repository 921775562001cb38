"""CausalFusion for documents of text and images: one decoder, one sequence, one KV cache.

Text tokens are AR steps of one token with a softmax over the vocabulary; image tokens are generated
as `CausalFusion` does. Queries and keys are turned by the position of their text token or image in
the document; within an image the table of grid positions tells its tokens apart.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from cfjax.document_masks import DocumentMaskTerms, clean_terms, noised_terms
from cfjax.errors import UserError
from cfjax.models.causal_fusion import CausalFusion, Push
from cfjax.models.document_cache import DocumentCache, empty_document_cache
from cfjax.models.kv_cache import KVCache, first_row_of_each
from cfjax.models.layers import dense, layer_norm
from cfjax.models.rotary import Rotation, rotation
from cfjax.sharding import with_logical_axes


class DocumentRows(NamedTuple):
    """Where everything of packed documents stands: int32, see `cfjax.documents.lay_out`.

    Attributes:
      text_ids, text_places, text_begins, text_positions: `[batch, N]`.
      image_places, image_begins, image_positions: `[batch, I]`.
      label, label_places: `[batch, I]`, or `[batch, 0]` without classes.
    """

    text_ids: jax.Array
    text_places: jax.Array
    text_begins: jax.Array
    text_positions: jax.Array
    image_places: jax.Array
    image_begins: jax.Array
    image_positions: jax.Array
    label: jax.Array
    label_places: jax.Array


class MultimodalCausalFusion(CausalFusion):
    """The transformer with a text embedding and a language-model head.

    Attributes:
      vocabulary_size: V, of the tokenizer's ids and our own.
      has_tied_head: the head multiplies by the text embedding, instead of by weights of its own.
    """

    vocabulary_size: int = 0
    has_tied_head: bool = True

    def setup(self):
        super().setup()
        if self.attention == "splash":
            raise UserError(
                'splash attention is for models of images alone; set model.attention="fused".'
            )
        self.text_table = self.param(
            "text_table",
            with_logical_axes(nn.initializers.normal(0.02), ("vocabulary", "width")),
            (self.vocabulary_size, self.width),
        )
        self.text_norm = layer_norm("vector_width", dtype=self.dtype)
        if not self.has_tied_head:
            self.text_head = dense(
                self.vocabulary_size,
                ("width", "vocabulary"),
                dtype=self.dtype,
                gradient_dtype=self.gradient_dtype,
            )

    def __call__(self, *args: jax.Array) -> jax.Array:
        """Predicts for a class and its image alone: see `CausalFusion`."""
        prediction = super().__call__(*args)
        if self.is_initializing():  # all parameters are made by one call
            self.text_logits(jnp.zeros((1, 1, self.width), self.dtype))
        return prediction

    def documents(
        self,
        rows: DocumentRows,
        clean_tokens: jax.Array,
        noised_tokens: jax.Array,
        t: jax.Array,
        token_order: jax.Array,
        ar_step_ids: jax.Array,
    ) -> tuple[jax.Array, jax.Array]:
        """Predicts from rows of condition, text, clean and noised tokens.

        Args:
          rows: what stands where.
          clean_tokens: `[batch, I, M, token_width]`, the first M positions of each image; all, M = L,
            where something follows an image.
          noised_tokens: `[batch, I, copies, L, token_width]`.
          t: timesteps `[batch, I, copies, L]` or `[batch, I, copies, 1]`.
          token_order, ar_step_ids: `[batch, I, L]`.

        Returns:
          The prediction, float32 `[batch, I, copies, L, token_width]`, and the logits of the text
          token after each, float32 `[batch, N, V]`.
        """
        batch, num_images, copies, num_tokens, token_width = noised_tokens.shape
        if rows.text_ids.shape[1] == 0 and rows.label.shape[1] == num_images == 1:
            # Nothing is turned at position 0: to the bit what the single-image model computes.
            alone = (clean_tokens, noised_tokens, t, token_order, ar_step_ids)
            prediction = super().__call__(rows.label[:, 0], *(it[:, 0] for it in alone))
            return prediction[:, None], jnp.zeros((batch, 0, self.vocabulary_size))
        num_clean, num_text = clean_tokens.shape[2], rows.text_ids.shape[1]
        noised_length = num_images * copies * num_tokens
        image = jnp.concatenate(
            [
                clean_tokens.reshape(batch, num_images * num_clean, token_width),
                noised_tokens.reshape(batch, noised_length, token_width),
            ],
            axis=1,
        )
        image = self.token_embedding(image.astype(self.dtype))
        grid_positions = self._gather_positions(token_order)
        clean = image[:, : num_images * num_clean]
        clean = clean.reshape(batch, num_images, num_clean, self.width)
        clean = clean + grid_positions[:, :, :num_clean]
        noised = image[:, num_images * num_clean :]
        noised = noised.reshape(batch, num_images, copies, num_tokens, self.width)
        noised = noised + grid_positions[:, :, None] + self.timestep_embedding(t)
        condition = self.condition_tokens(rows.label.reshape(-1))
        x = jnp.concatenate(
            [
                condition.reshape(batch, -1, self.width),
                self.text_tokens(rows.text_ids),
                clean.reshape(batch, -1, self.width),
                noised.reshape(batch, -1, self.width),
            ],
            axis=1,
        )
        x = nn.with_logical_constraint(x, ("batch", "sequence", "activation_width"))
        context, noised_terms_ = self._terms(rows, ar_step_ids, num_clean, copies)
        turned = self._rotation(self._positions(rows, num_clean, copies))
        x, _ = self.blocks(x, None, (context, noised_terms_), None, turned)
        begin = rows.label.shape[1] * self.condition_length
        logits = self.text_logits(x[:, begin : begin + num_text])
        prediction = self._predict(x[:, -noised_length:])
        return prediction.reshape(noised_tokens.shape), logits

    def _terms(
        self, rows: DocumentRows, ar_step_ids: jax.Array, num_clean: int, copies: int
    ) -> tuple[DocumentMaskTerms, DocumentMaskTerms]:
        """Terms of the condition, text and clean tokens, and of the noised tokens."""
        batch, num_tokens = len(ar_step_ids), self.num_tokens

        def repeated(per_image, count):
            return jnp.repeat(per_image, count, axis=1)

        condition = clean_terms(
            repeated(rows.label_places, self.condition_length),
            repeated(rows.image_begins[:, : rows.label.shape[1]], self.condition_length),
            num_tokens,
        )
        text = clean_terms(rows.text_places, rows.text_begins, num_tokens)
        clean = clean_terms(
            repeated(rows.image_places, num_clean),
            repeated(rows.image_begins, num_clean),
            num_tokens,
            ar_step_ids[:, :, :num_clean].reshape(batch, -1),
        )
        copy = jnp.repeat(jnp.arange(copies), num_tokens)
        noised = noised_terms(
            repeated(rows.image_places, copies * num_tokens),
            repeated(rows.image_begins, copies * num_tokens),
            num_tokens,
            jnp.tile(ar_step_ids, (1, 1, copies)).reshape(batch, -1),
            jnp.tile(copy, ar_step_ids.shape[1])[None],
            copies,
        )
        parts = condition, text, clean
        return jax.tree.map(lambda *terms: jnp.concatenate(terms, axis=1), *parts), noised

    def _positions(self, rows: DocumentRows, num_clean: int, copies: int) -> jax.Array:
        """The position of each token in its document, `[batch, T]`."""

        def repeated(count):
            return jnp.repeat(rows.image_positions, count, axis=1)

        condition = rows.image_positions[:, : rows.label.shape[1]]
        return jnp.concatenate(
            [
                jnp.repeat(condition, self.condition_length, axis=1),
                rows.text_positions,
                repeated(num_clean),
                repeated(copies * self.num_tokens),
            ],
            axis=1,
        )

    def _rotation(self, positions: jax.Array) -> Rotation:
        return rotation(positions, self.width // self.num_heads)

    def text_tokens(self, ids: jax.Array) -> jax.Array:
        """Ids int `[batch, N]` to embedded text tokens `[batch, N, D]`."""
        return self.text_table[ids].astype(self.dtype)

    def text_logits(self, x: jax.Array) -> jax.Array:
        """Text tokens after all layers `[batch, N, D]` to float32 logits `[batch, N, V]`."""
        x = self.text_norm(x)
        if not self.has_tied_head:
            return self.text_head(x).astype(jnp.float32)
        table = self.text_table.astype(self.dtype)
        return jnp.einsum("bnd,vd->bnv", x, table, preferred_element_type=jnp.float32)

    def empty_document_cache(self, rows: int, capacity: int) -> DocumentCache:
        """A KV cache of documents with room for `capacity` tokens and none in it."""
        head_width = self.width // self.num_heads
        return empty_document_cache(
            self.depth, rows, self.num_heads, head_width, capacity, self.dtype
        )

    def push_text(
        self, cache: DocumentCache, ids: jax.Array, is_real: jax.Array
    ) -> tuple[DocumentCache, jax.Array]:
        """The cache after text tokens, and the logits of what follows each.

        Args:
          cache: of R rows.
          ids: int `[R, M]`.
          is_real: bool `[R, M]`; a row's tokens may have gaps, in which nothing is pushed.

        Returns:
          The cache and float32 logits `[R, M, V]`.
        """
        offsets = jnp.cumsum(is_real, axis=1, dtype=jnp.int32)
        positions = cache.position[:, None] + offsets - 1
        causal = jnp.tril(jnp.ones((ids.shape[1], ids.shape[1]), bool))
        cache, x = self._pushed(cache, self.text_tokens(ids), positions, is_real, causal[None])
        return cache.after_segment(offsets[:, -1]), self.text_logits(x)

    def push_class(self, cache: DocumentCache, labels: jax.Array) -> DocumentCache:
        """The cache after the condition tokens of labels int `[R]`; the image that follows has the
        same position.
        """
        embedded = self.condition_tokens(labels)
        return self.extend(cache, embedded).after_segment(0)

    def extend(
        self, kv_cache: KVCache | DocumentCache, embedded: jax.Array
    ) -> KVCache | DocumentCache:
        """The cache after clean tokens of an image `[R, M, D]`, which see each other.

        Of documents the image is not whole until `after_segment(1)`.
        """
        if isinstance(kv_cache, KVCache):
            return super().extend(kv_cache, embedded)
        is_real = jnp.ones(embedded.shape[:2], bool)
        positions = jnp.broadcast_to(kv_cache.position[:, None], is_real.shape)
        return self._pushed(kv_cache, embedded, positions, is_real, is_real[:1, None])[0]

    def _pushed(self, cache, embedded, positions, is_real, among_new):
        """The cache after tokens `[R, M, D]`, and these after all layers.

        `among_new` is who of the new tokens may attend to whom, broadcastable to `[R, M, M]`.
        """
        rows, num_new = is_real.shape
        cache = cache.with_room(num_new)
        seen = jnp.broadcast_to(cache.is_filled[:, None], (rows, num_new, cache.capacity))
        among_new = jnp.broadcast_to(among_new & is_real[:, None], (rows, num_new, num_new))
        mask = jnp.concatenate([seen, among_new], axis=2)
        push, _ = self.blocks(
            Push(embedded, cache.kv_cache, jnp.int32(0)),
            None,
            None,
            mask,
            self._rotation(positions),
        )
        return cache.with_pushed(push.kv_cache, is_real), push.x

    def _over_cache(self, kv_cache: KVCache | DocumentCache, embedded: jax.Array) -> jax.Array:
        if isinstance(kv_cache, KVCache):
            return super()._over_cache(kv_cache, embedded)
        batch, num_new = embedded.shape[:2]
        seen = first_row_of_each(kv_cache.is_filled, batch)
        position = first_row_of_each(kv_cache.position, batch)
        mask = jnp.concatenate([seen, jnp.ones((batch, num_new), bool)], axis=1)[:, None]
        turned = self._rotation(jnp.broadcast_to(position[:, None], (batch, num_new)))
        return self.blocks(embedded, kv_cache.kv_cache[:2], None, mask, turned)[0]
