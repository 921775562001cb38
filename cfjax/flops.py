"""FLOPs of the transformer: those its formulas ask for, and those that a traced program holds.

A product of [a, b] and [b, c] counts 2 a b c; norms, softmax and other pointwise work count nothing.
"""

import math
from collections.abc import Sequence
from typing import Any

from jax.extend.core import jaxprs_in_params
from jax.interpreters import partial_eval

from cfjax.models.causal_fusion import CausalFusion
from cfjax.models.layers import TIMESTEP_FEATURES
from cfjax.models.multimodal import MultimodalCausalFusion


def layer_flops(model: CausalFusion, num_queries: int, num_keys: int) -> int:
    """Of one layer's forward pass for one example: n_q (24 D^2 + 4 n_k D) for an MLP ratio of 4."""
    width = model.width
    dense = (8 + 4 * model.mlp_ratio) * width**2
    return int(num_queries * (dense + 4 * num_keys * width))


def end_flops(model: CausalFusion, num_clean: int, num_noised: int, num_timesteps: int) -> int:
    """Of embedding and final projection of image tokens, and of timesteps, for one example."""
    width = model.width
    tokens = 2 * model.token_width * width * (num_clean + 2 * num_noised)
    return tokens + num_timesteps * 2 * (TIMESTEP_FEATURES * width + width**2)


def training_forward_flops(
    model: CausalFusion, num_clean: int, num_copies: int, num_timesteps: int
) -> int:
    """Of the forward pass over one training sequence; a train step takes three times as many.

    Args:
      model: the transformer.
      num_clean: clean tokens in the sequence.
      num_copies: noised copies of the image.
      num_timesteps: timesteps that are embedded.
    """
    num_noised = num_copies * model.num_tokens
    length = model.condition_length + num_clean + num_noised
    layers = model.depth * layer_flops(model, length, length)
    return layers + end_flops(model, num_clean, num_noised, num_timesteps)


def document_forward_flops(
    model: MultimodalCausalFusion,
    num_text: int,
    num_images: int,
    num_copies: int,
    num_timesteps: int,
) -> int:
    """Of the forward pass over one row of documents without classes, its empty slots too.

    Attention counts all pairs of tokens in the row, as it computes them, though a document sees itself
    alone and its text and clean tokens see no noised ones.

    Args:
      model: the transformer.
      num_text, num_images: slots of a row.
      num_copies: noised copies of each image.
      num_timesteps: timesteps that are embedded for each image.
    """
    num_clean = num_images * model.num_tokens
    length = num_text + num_clean * (1 + num_copies)
    layers = model.depth * layer_flops(model, length, length)
    ends = end_flops(model, num_clean, num_clean * num_copies, num_images * num_timesteps)
    return layers + ends + 2 * num_text * model.width * model.vocabulary_size


def sampling_flops(
    model: CausalFusion, split_sizes: Sequence[int], num_passes: Sequence[int], num_rows: int
) -> int:
    """Of one image: each AR step's denoising, and pushing its clean tokens into the KV cache.

    Args:
      model: the transformer.
      split_sizes: tokens of each AR step; those left out of L are known, and pushed at first.
      num_passes: forward passes in the denoising of each AR step: one a denoising step, two a guided
        one.
      num_rows: of an image in the KV cache: 2 with classifier-free guidance.
    """
    condition, begin = model.condition_length, model.num_tokens - sum(split_sizes)
    pushed = model.depth * layer_flops(model, condition, condition)
    if begin:
        pushed += model.depth * layer_flops(model, begin, condition + begin)
        pushed += end_flops(model, begin, 0, 0)
    total = num_rows * pushed
    for size, passes in zip(split_sizes, num_passes, strict=True):
        layers = model.depth * layer_flops(model, size, condition + begin + size)
        total += passes * (layers + end_flops(model, 0, size, 1))
        begin += size
        if begin < model.num_tokens:
            total += num_rows * (layers + end_flops(model, size, 0, 0))
    return total


def counted_flops(jaxpr: Any) -> int:
    """Of all matrix products in a jaxpr whose results are used, on all devices together.

    The body of a scan counts as often as it runs, a Pallas kernel for each block of its grid. A
    branch of `cond` counts as if it were taken.
    """
    # Traces of recomputation hold kernels whose results were saved; no compiler keeps them.
    used, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    return _flops_of_equations(used)


def _flops_of_equations(jaxpr: Any) -> int:
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            inner = math.prod(shape[axis] for axis in contracted)
            total += 2 * inner * math.prod(equation.outvars[0].aval.shape)
        times = _repetitions(equation)
        for inner_jaxpr in jaxprs_in_params(equation.params):
            total += times * _flops_of_equations(inner_jaxpr)
    return total


def _repetitions(equation: Any) -> int:
    """How often the jaxprs within an equation run."""
    match equation.primitive.name:
        case "scan":
            return equation.params["length"]
        case "pallas_call":
            return math.prod(equation.params["grid_mapping"].grid)
        case "shard_map":
            return equation.params["mesh"].size
    return 1
