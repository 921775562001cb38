"""Splash attention: JAX's Pallas kernels for TPUs, with the mask computed in them from integers.

Neither the mask nor the softmax weights are ever held in memory, and one program serves every
split. Elsewhere than on TPUs the kernels are interpreted: slow, for tests.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from cfjax import sharding
from cfjax.errors import UserError
from cfjax.models.masks import MaskFunction, PackedMask

try:
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel,
        splash_attention_mask_info,
    )

    # Not documented by JAX, so that another version may lack one of these names.
    BlockSizes = splash_attention_kernel.BlockSizes
    SEQUENCE_MINOR = splash_attention_kernel.QKVLayout.SEQ_MINOR
    SplashAttentionKernel = splash_attention_kernel.SplashAttentionKernel
    MaskInfo = splash_attention_mask_info.MaskInfo
except (ImportError, AttributeError) as error:
    raise UserError(
        f"jax {jax.__version__} lacks what splash attention is made of ({error}); use"
        ' model.attention="fused", or the jax version of requirements.txt.'
    ) from error

LANES = 128  # of a TPU's vector registers: blocks are multiples
SUBLANES = 16  # of bfloat16
# Of which scores, keys and values fit into the 16 MiB of fast memory that a v5e gives a kernel.
MAX_BLOCK = 768  # tokens
MAX_KEY_BYTES = 3 * MAX_BLOCK * 2  # for each number of the head width: bfloat16 has 2 bytes


def block_sizes(num_tokens: int, dtype: jnp.dtype) -> BlockSizes:
    """Blocks of queries and keys for T tokens, which are padded to a multiple of both.

    As few equal blocks as fit: a TPU starts a block in about the time in which it multiplies 370
    queries with 370 keys, so that few large blocks are faster than leaving out small ones that the
    mask leaves empty. All keys of a head stay in fast memory while its queries pass, if they fit.
    """
    num_parts = -(-num_tokens * jnp.dtype(dtype).itemsize // MAX_KEY_BYTES)
    num_blocks = -(-num_tokens // (num_parts * MAX_BLOCK)) * num_parts
    block = -(-num_tokens // (num_blocks * LANES)) * LANES
    keys = block * num_blocks // num_parts
    # A block that is the whole array need not be a multiple of lanes.
    queries = block if num_blocks > 1 else -(-num_tokens // SUBLANES) * SUBLANES
    # One kernel for all gradients writes those of the queries once for each part of the keys.
    one_backward_kernel = num_parts == 1
    return BlockSizes(
        block_q=queries,
        block_kv=keys,
        block_kv_compute=block,
        block_q_dkv=queries,
        block_kv_dkv=keys,
        block_kv_dkv_compute=block,
        block_q_dq=None if one_backward_kernel else queries,
        block_kv_dq=None if one_backward_kernel else block,
        use_fused_bwd_kernel=one_backward_kernel,
        q_layout=SEQUENCE_MINOR,
        k_layout=SEQUENCE_MINOR,
        v_layout=SEQUENCE_MINOR,
    )


def splash_attention(
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    mask: PackedMask,
    axes: tuple[str, ...],
    residual_name: str,
) -> jax.Array:
    """Softmax attention under the generalized causal mask, on the devices of the active mesh.

    Args:
      queries: `[batch, T, heads, E]`, already scaled.
      keys, values: the same shape.
      mask: what each query sees.
      axes: logical axes of queries, keys and values.
      residual_name: the checkpoint name of what the backward pass needs besides its arguments.

    Returns:
      `[batch, T, heads, E]` in the dtype of the values.

    Raises:
      UserError: no mesh is active.
    """
    mesh = sharding.active_mesh()
    if mesh is None:
        raise UserError(
            "splash attention is made for the devices of a mesh; trace the model inside"
            " cfjax.sharding.activate(mesh)."
        )
    spec = sharding.partition_spec(axes)
    attend = functools.partial(
        _attend,
        function=mask.function,
        residual_name=residual_name,
        interpret=mesh.abstract_device.platform != "tpu",
    )
    # The compiler cannot split a kernel over devices.
    attend = jax.shard_map(
        attend,
        in_specs=(spec, spec, spec, PartitionSpec(spec[0])),
        out_specs=spec,
        check_vma=False,
    )
    return attend(queries, keys, values, mask.queries)


def _attend(
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    packed: jax.Array,
    *,
    function: MaskFunction,
    residual_name: str,
    interpret: bool,
) -> jax.Array:
    """`splash_attention` of what one device holds."""
    num_tokens = queries.shape[1]
    sizes = block_sizes(num_tokens, values.dtype)
    # Padded keys are in nobody's prefix or window; padded queries are cut off.
    queries, keys, values = (
        jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, 0), (0, -num_tokens % multiple), (0, 0)))
        for x, multiple in (
            (queries, sizes.block_q),
            (keys, sizes.block_kv),
            (values, sizes.block_kv),
        )
    )
    packed = jnp.pad(packed, ((0, 0), (0, -num_tokens % sizes.block_q)))

    def of_example(queries, keys, values, packed):
        mask_info = MaskInfo(None, None, None, None, q_sequence=packed)
        kernel = SplashAttentionKernel(
            mask_info,
            None if sizes.use_fused_bwd_kernel else mask_info,
            mask_info,
            block_sizes=sizes,
            is_mqa=False,
            save_residuals=False,
            mask_value=splash_attention_kernel.DEFAULT_MASK_VALUE,
            attn_logits_soft_cap=None,
            residual_checkpoint_name=residual_name,
            mask_function=function,
            interpret=interpret,
        )
        return kernel(queries, keys, values)

    attended = jax.vmap(of_example)(queries, keys, values, packed)
    return attended[:, :, :num_tokens].swapaxes(1, 2)
