"""Attention as the TPU compiler sees it: `python -m benchmarks.attention_bytes`; needs libtpu.

From the repository's root, on any machine. Forward and backward pass are compiled for one v5e chip
and nothing is run: the table holds the bytes that the compiled program moves and its temporary
memory, as the compiler counts them, and no speed. Each case compiles in a process of its own.

The operation is the attention of CausalFusion-XL (20 heads of width 64) for 8 images in bfloat16, at
256x256 pixels (64 condition, 256 clean and 256 noised tokens) and at 512x512 (64, 1024 and 1024);
"mask" is the baseline: two products around a softmax, with a [T, T] mask that is given as an array.
The block is a whole layer of XL at 256x256; the step a whole train step of it for 8 images on each of
16 chips, in which the compiler counts each loop over the layers once.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from absl import app, flags

from cfjax import build, sharding
from cfjax.config_loading import load_config
from cfjax.factorization import generalized_causal_mask
from cfjax.models.attention import ATTENDED, HEADS, attend
from cfjax.models.causal_fusion import Block, named_size
from cfjax.models.masks import MaskFunction, PackedMask, sequence_mask_terms
from cfjax.models.splash_attention import splash_attention
from cfjax.tpu_topology import describe_devices

CASES = (
    *(
        f"{size}_{attention}"
        for size in (256, 512)
        for attention in ("mask", "fused", "split", "splash")
    ),
    *(
        f"{what}_{attention}"
        for what in ("block", "step")
        for attention in ("fused", "split", "splash")
    ),
)
BATCH, NUM_CONDITION = 8, 64
NUM_TOKENS = {"256": 256, "512": 1024, "block": 256}
XL = named_size("xl")
SHAPE = jax.ShapeDtypeStruct


def attention_operation(attention: str, num_tokens: int) -> tuple[Callable[..., Any], list[Any]]:
    """Attention alone as a function of queries, keys, values and its mask, and their shapes."""
    function = MaskFunction(NUM_CONDITION, num_tokens, num_tokens, 1)
    heads = (BATCH, function.length, XL["num_heads"], XL["width"] // XL["num_heads"])
    qkv = [SHAPE(heads, jnp.bfloat16)] * 3
    if attention == "mask":
        return masked_attention, [*qkv, SHAPE((function.length,) * 2, bool)]

    def operation(queries, keys, values, ar_step_ids):
        if attention == "splash":
            mask = PackedMask(function.pack(ar_step_ids), function)
            return splash_attention(queries, keys, values, mask, HEADS, ATTENDED)
        context, noised = sequence_mask_terms(ar_step_ids, NUM_CONDITION, num_tokens, 1)
        every = jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), context, noised)
        if attention == "fused":
            return attend(queries, keys, values, generalized_causal_mask(every, every))
        n = NUM_CONDITION + num_tokens
        mask = generalized_causal_mask(context, context)
        first = attend(queries[:, :n], keys[:, :n], values[:, :n], mask)
        mask = generalized_causal_mask(noised, every)
        return jnp.concatenate([first, attend(queries[:, n:], keys, values, mask)], axis=1)

    return operation, [*qkv, SHAPE((BATCH, num_tokens), jnp.int32)]


def masked_attention(
    queries: jax.Array, keys: jax.Array, values: jax.Array, mask: jax.Array
) -> jax.Array:
    """The baseline: a [T, T] mask, and the softmax written out in float32."""
    logits = jnp.einsum("bqhe,bkhe->bhqk", queries, keys, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(jnp.where(mask[None, None], logits, -1e30)).astype(values.dtype)
    return jnp.einsum("bhqk,bkhe->bqhe", weights, values)


def block_operation(attention: str, num_tokens: int) -> tuple[Callable[..., Any], list[Any]]:
    """A layer of XL as a function of its parameters, its input and the AR-step ids."""
    block = Block(XL["num_heads"], 4.0, jnp.bfloat16, jnp.bfloat16, attention)
    function = MaskFunction(NUM_CONDITION, num_tokens, num_tokens, 1)

    def operation(params, x, ar_step_ids):
        if attention == "splash":
            mask = PackedMask(function.pack(ar_step_ids), function)
            return block.apply(params, x, None, None, mask)[0]
        terms = sequence_mask_terms(ar_step_ids, NUM_CONDITION, num_tokens, 1)
        return block.apply(params, x, None, terms, None)[0]

    x = SHAPE((BATCH, function.length, XL["width"]), jnp.bfloat16)
    params = jax.eval_shape(lambda x: block.init(jax.random.key(0), x, None, None, None), x)
    return operation, [sharding.unbox(params), x, SHAPE((BATCH, num_tokens), jnp.int32)]


def measure(case: str) -> dict[str, Any]:
    """Compiles a case: bytes accessed, temporary and peak memory, in MiB."""
    what, attention = case.split("_")
    compiled = compiled_step(attention) if what == "step" else compiled_operation(what, attention)
    memory = compiled.memory_analysis()
    return {
        "case": case,
        "bytes_accessed_mib": compiled.cost_analysis()["bytes accessed"] / 2**20,
        "temporary_mib": memory.temp_size_in_bytes / 2**20,
        "peak_mib": memory.peak_memory_in_bytes / 2**20,
    }


def compiled_step(attention: str) -> jax.stages.Compiled:
    """The train step of XL with the most clean tokens, on 16 chips."""
    config = load_config("configs/imagenet256.py:xl")
    config.model.attention = attention
    config.mesh.fsdp = 4
    config.train.global_batch_size = 16 * BATCH
    program = build.train_program(config, build.mesh(config, describe_devices("v5e:4x4")))
    return program.compile(program.clean_lengths[-1])


def compiled_operation(what: str, attention: str) -> jax.stages.Compiled:
    """Forward and backward pass of attention alone, or of a block, on one chip."""
    make = block_operation if what == "block" else attention_operation
    operation, shapes = make(attention, NUM_TOKENS[what])
    mesh = sharding.make_mesh(devices=describe_devices("v5e:1x1"))

    def forward_and_backward(cotangent, differentiated, mask):
        output, pullback = jax.vjp(lambda *args: operation(*args, mask), *differentiated)
        return output, pullback(cotangent)

    with sharding.activate(mesh):
        arguments = jax.eval_shape(operation, *shapes), shapes[:-1], shapes[-1]
        arguments = jax.tree.map(
            lambda x: SHAPE(x.shape, x.dtype, sharding=sharding.replicated(mesh)), arguments
        )
        return jax.jit(forward_and_backward).lower(*arguments).compile()


def measure_in_process(case: str, timeout: float = 600.0) -> dict[str, Any]:
    """`measure` in another process.

    Raises:
      CalledProcessError: it failed, for instance because libtpu is missing.
    """
    command = [sys.executable, "-m", "benchmarks.attention_bytes", f"--case={case}"]
    run = subprocess.run(
        command,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        text=True,
        timeout=timeout,
        check=True,
    )
    return json.loads(run.stdout.splitlines()[-1])


def main(_: Sequence[str]) -> None:
    """Runs the benchmark."""
    jax.config.update("jax_enable_compilation_cache", False)  # of no use without a TPU
    if flags.FLAGS["case"].value:
        print(json.dumps(measure(flags.FLAGS["case"].value)))
        return
    baseline = {}
    for case in CASES:
        result = measure_in_process(case)
        what = case.split("_")[0]
        ratio = (
            result["bytes_accessed_mib"] / baseline.setdefault(what, result)["bytes_accessed_mib"]
        )
        print(
            f"{case:<14} {result['bytes_accessed_mib']:8.0f} MiB accessed, {ratio:5.3f} of the"
            f" first; {result['temporary_mib']:7.0f} MiB temporary, peak {result['peak_mib']:.0f}"
        )


if __name__ == "__main__":
    flags.DEFINE_enum("case", None, CASES, "Compile this case alone, here, and print JSON.")
    app.run(main)
