"""The CausalFusion transformer (paper section 3.2): decoder-only, pre-norm, no AdaLN.

One network serves training, where condition, clean and noised tokens form one sequence under the
generalized causal mask, and generation, where condition and clean tokens live in a KV cache that is
an explicit value: `extend` returns a grown cache and `denoise` only reads it.

All image tokens are given in generation order: entry j of `token_order` is the grid index of the
token at position j.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from cfjax.document_masks import DocumentMaskTerms, document_mask
from cfjax.errors import UserError, check_choice
from cfjax.factorization import generalized_causal_mask
from cfjax.models.attention import ATTENDED, Attention
from cfjax.models.kv_cache import KVCache, after, empty_cache, first_row_of_each
from cfjax.models.layers import (
    LINEAR,
    Mlp,
    TimestepEmbedding,
    dense,
    layer_norm,
    sincos_positions,
)
from cfjax.models.masks import MaskFunction, PackedMask, sequence_mask_terms
from cfjax.models.rotary import Rotation
from cfjax.sharding import constrain, with_logical_axes

REMAT_POLICIES = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.save_only_these_names(LINEAR, ATTENDED),
}
ATTENTIONS = ("fused", "split", "splash")
POSITION_EMBEDDINGS = ("learned", "sincos")

# Paper tables 9 and 10; "h48" is the published code's H, whose paper row has 40 layers.
SIZES = {
    "tiny": {"width": 64, "depth": 2, "num_heads": 4},
    "b": {"width": 768, "depth": 12, "num_heads": 12},
    "l": {"width": 1024, "depth": 24, "num_heads": 16},
    "xl": {"width": 1280, "depth": 32, "num_heads": 20},
    "h": {"width": 1408, "depth": 40, "num_heads": 22},
    "h48": {"width": 1408, "depth": 48, "num_heads": 22},
}


class Push(NamedTuple):
    """What passes from layer to layer where tokens are pushed into the KV cache, in place.

    Attributes:
      x: the tokens `[batch, M, D]`.
      kv_cache: written up to `layer`.
      layer: int32 scalar, the index of the next layer.
    """

    x: jax.Array
    kv_cache: KVCache
    layer: jax.Array


class Block(nn.Module):
    """Pre-norm transformer block: `[batch, T, D]` to the same, or `Push` to `Push`.

    `cached` are keys and values of the layer that tokens attend to besides each other. `terms` are
    those of the condition and clean tokens, then those of the noised tokens, and `attention` is
    "fused" or "split"; splash attention takes a packed mask instead. `rotation` is of documents' tokens.
    Each is None where there is none.
    """

    num_heads: int
    mlp_ratio: float
    dtype: Any
    gradient_dtype: Any
    attention: str

    @nn.compact
    def __call__(
        self,
        carry: jax.Array | Push,
        cached: tuple[jax.Array, jax.Array] | None,
        terms: tuple[Any, Any] | None,
        mask: jax.Array | PackedMask | None,
        rotation: Rotation | None = None,
    ) -> tuple[jax.Array | Push, None]:
        x = carry
        if isinstance(carry, Push):
            x, cached = carry.x, carry.kv_cache.of_layer(carry.layer)
        elif cached is not None:
            cached = tuple(first_row_of_each(whole, len(x)) for whole in cached)
        width = x.shape[-1]
        if terms is not None:
            context, noised = terms
            every = jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), context, noised)
            may_attend = generalized_causal_mask
            if isinstance(context, DocumentMaskTerms):
                may_attend = document_mask
            if self.attention == "split":
                mask = may_attend(context, context), may_attend(noised, every)
            else:
                mask = may_attend(every, every)
        normed = layer_norm("vector_width", dtype=self.dtype, name="norm1")(x)
        attention = Attention(self.num_heads, self.dtype, self.gradient_dtype, name="attn")
        attended, keys, values = attention(normed, cached, mask, rotation)
        if isinstance(carry, Push):
            # The cache is read before it is written, or it would be copied to do both.
            keys, values = after(attended, (keys, values))
            kv_cache = carry.kv_cache.with_written(carry.layer, keys, values)
        x = nn.with_logical_constraint(x + attended, ("batch", "sequence", "activation_width"))
        normed = layer_norm("vector_width", dtype=self.dtype, name="norm2")(x)
        hidden_width = int(self.mlp_ratio * width)
        x = x + Mlp(hidden_width, self.dtype, self.gradient_dtype, name="mlp")(normed)
        x = nn.with_logical_constraint(x, ("batch", "sequence", "activation_width"))
        return (Push(x, kv_cache, carry.layer + 1) if isinstance(carry, Push) else x), None


class CausalFusion(nn.Module):
    """The transformer.

    Attributes:
      width, depth, num_heads: D, number of layers, number of attention heads.
      grid: (rows, columns) of image tokens; L = rows * columns.
      token_width: values per image token, p * p * C.
      num_classes: K; label K is the null class.
      num_condition_tokens: n learned condition tokens per class.
      condition_repeats: each class's n tokens are repeated this often (paper Table 8).
      position_embedding: "learned" (starts at sin-cos) or "sincos" (frozen), of the image tokens.
      position_scale: times sin-cos, where learned positions start. The pixels of large tokens add up
        to embeddings beside which 1 is hardly seen.
      mlp_ratio: hidden width of the MLP over D.
      dtype: of the matrix products; parameters, norms and softmax are float32.
      gradient_dtype: in which the weights' gradients are summed, over examples and devices.
      scan_layers: compile one layer and loop, instead of unrolling; the parameters are the same.
      remat_policy: what the backward pass recomputes: "none", "dots" (all but linear maps and what
        attention returns) or "full" (all but the layers' inputs).
      attention: of training: "fused" (the mask is computed inside the softmax), "split" (condition
        and clean tokens attend to these alone, instead of masking the noised keys away: less
        arithmetic and memory, one more concatenation a layer) or "splash" (a TPU kernel that holds
        no attention weights in memory; needs an active mesh).
    """

    width: int
    depth: int
    num_heads: int
    grid: tuple[int, int]
    token_width: int
    num_classes: int
    num_condition_tokens: int = 4
    condition_repeats: int = 1
    position_embedding: str = "learned"
    position_scale: float = 1.0
    mlp_ratio: float = 4.0
    dtype: Any = jnp.float32
    gradient_dtype: Any = jnp.float32
    scan_layers: bool = True
    remat_policy: str = "none"
    attention: str = "fused"

    @property
    def num_tokens(self) -> int:
        """L, the number of image tokens."""
        return self.grid[0] * self.grid[1]

    @property
    def condition_length(self) -> int:
        """The number of condition tokens in the sequence."""
        return self.num_condition_tokens * self.condition_repeats

    @property
    def null_class(self) -> int:
        """The label that stands for no class."""
        return self.num_classes

    def setup(self):
        check_choice("remat policy", self.remat_policy, REMAT_POLICIES)
        check_choice("attention", self.attention, ATTENTIONS)
        check_choice("position embedding", self.position_embedding, POSITION_EMBEDDINGS)
        if self.position_embedding != "learned" and self.position_scale != 1.0:
            raise UserError(
                f"position scale {self.position_scale} is where learned positions start, but position"
                f" embedding is {self.position_embedding!r}; set it to 'learned', or the scale to 1."
            )
        if self.width % self.num_heads:
            raise UserError(f"width {self.width} is not divisible by {self.num_heads} heads.")
        if self.width % 4:
            raise UserError(f"width {self.width} is not divisible by 4, as 2-D positions need.")
        normal = nn.initializers.normal(0.02)
        self.label_table = self.param(
            "label_table",
            with_logical_axes(normal, ("classes", "condition_width")),
            (self.num_classes + 1, self.num_condition_tokens * self.width),
        )
        self.condition_positions = self.param(
            "condition_positions",
            with_logical_axes(normal, ("condition", "position_width")),
            (self.condition_length, self.width),
        )
        sincos = jnp.asarray(sincos_positions(self.width, self.grid), jnp.float32)
        if self.position_embedding == "learned":
            self.token_positions = self.param(
                "token_positions",
                with_logical_axes(
                    lambda *_: self.position_scale * sincos, ("tokens", "position_width")
                ),
            )
        else:
            self.token_positions = sincos
        dtypes = {"dtype": self.dtype, "gradient_dtype": self.gradient_dtype}
        self.token_embedding = dense(self.width, ("token_width", "width"), **dtypes)
        self.timestep_embedding = TimestepEmbedding(self.width, **dtypes)
        self.blocks = self._make_blocks()
        self.final_norm = layer_norm("vector_width", dtype=self.dtype)
        self.final_projection = dense(
            self.token_width,
            ("width", "token_width"),
            kernel_init=nn.initializers.zeros_init(),
            **dtypes,
        )

    def _make_blocks(self) -> nn.Module:
        block = Block
        if self.remat_policy != "none":
            policy = REMAT_POLICIES[self.remat_policy]
            block = nn.remat(block, policy=policy, prevent_cse=not self.scan_layers)
        scanned = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast),
            length=self.depth,
            unroll=1 if self.scan_layers else self.depth,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        return scanned(
            self.num_heads, self.mlp_ratio, self.dtype, self.gradient_dtype, self.attention
        )

    def __call__(
        self,
        labels: jax.Array,
        clean_tokens: jax.Array,
        noised_tokens: jax.Array,
        t: jax.Array,
        token_order: jax.Array,
        ar_step_ids: jax.Array,
    ) -> jax.Array:
        """Predicts from one training sequence of condition, clean and noised tokens.

        Args:
          labels: int `[batch]`, `null_class` where the class is dropped.
          clean_tokens: `[batch, M, token_width]`, the first M positions, M <= L. The clean tokens
            of the last AR step are seen by no noised token, so any M that covers the steps before
            it gives the same prediction.
          noised_tokens: `[batch, copies, L, token_width]`; a copy does not see another.
          t: timesteps `[batch, copies, L]`, or `[batch, copies, 1]` if shared by a copy's tokens.
          token_order, ar_step_ids: `[batch, L]`.

        Returns:
          float32 `[batch, copies, L, token_width]`.
        """
        batch, copies, num_tokens, token_width = noised_tokens.shape
        num_clean = clean_tokens.shape[1]
        image = jnp.concatenate(
            [clean_tokens, noised_tokens.reshape(batch, copies * num_tokens, token_width)], axis=1
        )
        image = self.token_embedding(image.astype(self.dtype))
        positions = self._gather_positions(token_order)
        clean = image[:, :num_clean] + positions[:, :num_clean]
        noised = image[:, num_clean:].reshape(batch, copies, num_tokens, self.width)
        noised = noised + positions[:, None] + self.timestep_embedding(t)
        noised = noised.reshape(batch, copies * num_tokens, self.width)
        x = jnp.concatenate([self.condition_tokens(labels), clean, noised], axis=1)
        x = nn.with_logical_constraint(x, ("batch", "sequence", "activation_width"))

        # Parameters don't depend on the attention, and no mesh need be active where they are made.
        if self.attention == "splash" and not self.is_initializing():
            function = MaskFunction(self.condition_length, num_clean, num_tokens, copies)
            mask = PackedMask(function.pack(ar_step_ids), function)
            x, _ = self.blocks(x, None, None, mask, None)
        else:
            terms = sequence_mask_terms(ar_step_ids, self.condition_length, num_clean, copies)
            x, _ = self.blocks(x, None, terms, None, None)
        noised = x[:, -copies * num_tokens :]
        return self._predict(noised).reshape(batch, copies, num_tokens, token_width)

    def condition_tokens(self, labels: jax.Array) -> jax.Array:
        """Labels int `[batch]` to condition tokens `[batch, condition_length, D]`."""
        # Every device looks up all labels in its columns of the table, then rows go to where their
        # examples live. So the table's gradient is complete where it is made: it would otherwise be
        # summed over all devices, in full size.
        labels = constrain(labels, (None,))
        rows = constrain(self.label_table[labels], (None, "condition_width"))
        rows = constrain(rows.astype(self.dtype), ("batch", None))
        tokens = rows.reshape(-1, self.num_condition_tokens, self.width)
        tokens = jnp.tile(tokens, (1, self.condition_repeats, 1))
        return (tokens + self.condition_positions[None]).astype(self.dtype)

    def clean_image_tokens(self, tokens: jax.Array, grid_indices: jax.Array) -> jax.Array:
        """Embeds clean tokens `[batch, M, token_width]` at grid indices `[batch, M]`: `[.., D]`."""
        embedded = self.token_embedding(tokens.astype(self.dtype))
        return embedded + self._gather_positions(grid_indices)

    def empty_cache(self, batch: int, capacity: int) -> KVCache:
        """A KV cache with room for `capacity` tokens and none in it."""
        head_width = self.width // self.num_heads
        return empty_cache(self.depth, batch, self.num_heads, head_width, capacity, self.dtype)

    def extend(self, kv_cache: KVCache, embedded: jax.Array) -> KVCache:
        """The cache after pushing embedded clean or condition tokens `[batch, M, D]`.

        Tokens of one push see each other and all that the cache holds. It needs room for M more: the
        length may be traced, so that a push past its end is not refused but lands on earlier ones.
        """
        mask = self._decoding_mask(kv_cache, embedded)
        push, _ = self.blocks(Push(embedded, kv_cache, jnp.int32(0)), None, None, mask, None)
        return push.kv_cache._replace(length=kv_cache.length + embedded.shape[1])

    def denoise(
        self, kv_cache: KVCache, x_t: jax.Array, t: jax.Array, grid_indices: jax.Array
    ) -> jax.Array:
        """Predicts for the noised tokens of one AR step, given the cache, which is left as it is.

        Args:
          kv_cache: condition tokens and clean tokens of the AR steps before; of the batch, or of
            several rows an example, of which the first is read.
          x_t: noised tokens `[batch, M, token_width]`.
          t: timestep int `[batch]`.
          grid_indices: int `[batch, M]`.

        Returns:
          float32 `[batch, M, token_width]`.
        """
        embedded = self.clean_image_tokens(x_t, grid_indices)
        embedded = embedded + self.timestep_embedding(t)[:, None]
        return self._predict(self._over_cache(kv_cache, embedded))

    def _over_cache(self, kv_cache: KVCache, embedded: jax.Array) -> jax.Array:
        """Noised tokens `[batch, M, D]` after all layers."""
        mask = self._decoding_mask(kv_cache, embedded)
        return self.blocks(embedded, kv_cache[:2], None, mask, None)[0]

    def _decoding_mask(self, kv_cache: KVCache, x: jax.Array) -> jax.Array:
        """What is filled of the cache, and all of `x`: bool `[1, 1, capacity + M]`."""
        filled = jnp.arange(kv_cache.capacity) < kv_cache.length
        return jnp.concatenate([filled, jnp.ones(x.shape[1], bool)])[None, None]

    def _gather_positions(self, grid_indices: jax.Array) -> jax.Array:
        return jnp.asarray(self.token_positions)[grid_indices].astype(self.dtype)

    def _predict(self, x: jax.Array) -> jax.Array:
        return self.final_projection(self.final_norm(x)).astype(jnp.float32)


def in_compute_dtype(params: Any, dtype: Any) -> Any:
    """The parameters in the dtype in which they are multiplied and looked up, for generation.

    The model computes the same from them, without casting them in every call. Those that it uses in
    float32, of norms and of the condition tokens' positions, stay float32.
    """

    def cast(path, leaf):
        name = jax.tree_util.keystr(path)
        return leaf if "norm" in name or "condition_positions" in name else leaf.astype(dtype)

    return jax.tree_util.tree_map_with_path(cast, params)


def named_size(name: str) -> dict[str, int]:
    """Width, depth and number of heads of a named size of the paper, such as "xl".

    Raises:
      UserError: unknown name.
    """
    check_choice("model size", name, SIZES)
    return dict(SIZES[name])
