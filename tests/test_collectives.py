"""Collectives as the TPU and the CPU compiler write them."""

import hlo_excerpts
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from cfjax.collectives import Collective, find_collectives
from cfjax.sharding import make_mesh

LAYER = "jit(<lambda>)/jvp(CausalFusion)/while/body/closed_call/blocks"
BACKWARD = "jit(<lambda>)/transpose(jvp(CausalFusion))"


def test_v5e_excerpt():
    weights = 2 * 1280 * 5120
    by_name = {
        "qkv": Collective(
            "all-gather",
            ("bf16",),
            2 * 1280 * 3840,
            True,
            32,
            False,
            f"{LAYER}/attn/qkv/dot_general",
        ),
        # In three pieces: the start, a fusion with other work, the end.
        "fc1": Collective(
            "all-gather", ("bf16",), weights, True, 32, True, f"{LAYER}/mlp/fc1/dot_general"
        ),
        # An all-reduce whose result is sliced; the fusion around it has the name.
        "fc2": Collective(
            "reduce-scatter",
            ("f32",),
            2 * weights,
            True,
            32,
            False,
            f"{BACKWARD}/while/body/closed_call/checkpoint/blocks/mlp/fc2/dot_general",
        ),
        "norms": Collective("all-reduce", ("f32",), 3 * 4 * 1280, True, 32, False, ""),
        "labels": Collective(
            "all-to-all",
            ("bf16",),
            2 * 8 * 16 * 5120,
            False,
            1,
            False,
            f"{BACKWARD}/CausalFusion.condition_tokens/convert_element_type",
        ),
    }
    assert find_collectives(hlo_excerpts.V5E) == list(by_name.values())


def test_v4_excerpt():
    """A start has operand and result in its shape; its end is not another collective."""
    assert find_collectives(hlo_excerpts.V4) == [
        Collective(
            "all-gather", ("bf16",), 2 * 1280 * 5120, False, 1, True, f"{LAYER}/mlp/fc1/dot_general"
        )
    ]


def test_permutes_of_one_channel_are_several():
    one = "  %p{i} = f32[96,5120]{{1,0}} collective-permute(%x), channel_id=1, source_target_pairs={{{{0,1}}}}"
    lines = "\n".join(one.format(i=i) for i in range(3))
    found = find_collectives(f"ENTRY %main (x: f32[96,5120]) -> f32[96,5120] {{\n{lines}\n}}")
    assert [it.num_bytes for it in found] == [96 * 5120 * 4] * 3


@pytest.mark.parametrize(
    ("condition", "times"),
    [
        ("  %c = s32[] constant(7)\n  ROOT %lt = pred[] compare(%i, %c), direction=LT", 7),
        ("  ROOT %lt = pred[] compare(%i, %n), direction=LT", None),
    ],
)
def test_loops_in_loops(condition, times):
    text = f"""\
%less (i: s32[]) -> pred[] {{
{condition}
}}

%two (i: s32[]) -> pred[] {{
  %c2 = s32[] constant(2)
  ROOT %lt2 = pred[] compare(%i2, %c2), direction=LT
}}

%inner (x: f32[4]) -> f32[4] {{
  %r = f32[4]{{0}} all-reduce(%x), channel_id=5, to_apply=%add
}}

%outer (x: f32[4]) -> f32[4] {{
  %w2 = f32[4]{{0}} while(%x), condition=%less, body=%inner
}}

ENTRY %main (x: f32[4]) -> f32[4] {{
  %w = f32[4]{{0}} while(%x), condition=%two, body=%outer
}}
"""
    (found,) = find_collectives(text)
    assert found.in_loop and found.num_bytes == 16
    assert found.times == (times and 2 * times)


def test_cpu_program():
    """Rows of weights are gathered in a loop of 5, and a sum over devices follows it."""
    mesh = make_mesh(data=2, fsdp=4)
    weights = jax.ShapeDtypeStruct(
        (5, 8, 8), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(None, "fsdp"))
    )
    x = jax.ShapeDtypeStruct(
        (16, 8), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    )

    def program(weights, x):
        def layer(x, w):
            w = jax.lax.with_sharding_constraint(w, NamedSharding(mesh, PartitionSpec()))
            return jnp.tanh(x @ w), None

        return jax.lax.scan(layer, x, weights)[0].sum()

    found = find_collectives(jax.jit(program).lower(weights, x).compile().as_text())
    assert {(it.kind, it.in_loop, it.times) for it in found} == {
        ("all-gather", True, 5),
        ("all-reduce", False, 1),
    }
    assert [it.num_bytes for it in found if it.in_loop] == [8 * 8 * 4]
