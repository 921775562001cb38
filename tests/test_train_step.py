"""The train step's levers: microbatches, gradient dtype, the class table, compiler options."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from cfjax import build, sharding
from cfjax.errors import UserError
from cfjax.train_step import compile_with_options


def run(config, mesh, num_train_steps=2):
    """State and totals after some train steps on random images."""
    program = build.train_program(config, mesh)
    init = build.init_state(program.settings.model, program.settings.optimizer)
    state = sharding.born_sharded(init, mesh, jax.random.key(0))
    # The last projection starts at zero, which would hide the gradients of all before it.
    noise = jax.tree.map(lambda x: 0.1 * jnp.cos(jnp.arange(x.size)).reshape(x.shape), state.params)
    noise = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), noise, state.params)
    state = state.replace(params=jax.tree.map(jnp.add, state.params, noise))
    shape = program.abstract_batch["image"].shape
    batch = {
        "image": np.random.default_rng(0).normal(size=shape).astype(np.float32),
        "label": np.arange(shape[0], dtype=np.int32) % 10,
    }
    batch = jax.device_put(batch, sharding.batch_sharding(mesh))
    compiled = program.compile(program.clean_lengths[-1])
    for _ in range(num_train_steps):
        state, totals = compiled(state, batch)
    return state, totals


@pytest.mark.long
@pytest.mark.parametrize("mesh_sizes", [{"data": 1}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_microbatches_change_rounding_alone(mesh_sizes):
    devices = jax.devices()[: np.prod(list(mesh_sizes.values()))]
    mesh = sharding.make_mesh(**mesh_sizes, devices=devices)
    # A large ε, as Adam otherwise makes large updates from gradients that are rounding alone.
    overrides = {"optimizer__warmup_steps": 0, "optimizer__eps": 1e-2}
    whole, totals = run(tiny.config(**overrides), mesh)
    parts, totals_of_parts = run(tiny.config(**overrides, train__num_microbatches=4), mesh)
    # float32 sums over examples in another order.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        parts.params,
        whole.params,
    )
    for name, (total, count) in totals.items():
        np.testing.assert_allclose(totals_of_parts[name][0], total, rtol=1e-4, err_msg=name)
        np.testing.assert_allclose(totals_of_parts[name][1], count, err_msg=name)


@pytest.mark.long
def test_microbatches_hold_fewer_activations():
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    temporary = {}
    for num_microbatches in (1, 4):
        config = tiny.config(train__num_microbatches=num_microbatches, train__global_batch_size=256)
        program = build.train_program(config, mesh)
        memory = program.compile(program.clean_lengths[-1]).memory_analysis()
        temporary[num_microbatches] = memory.temp_size_in_bytes
    assert temporary[4] < 0.6 * temporary[1]


def test_microbatches_that_do_not_divide_are_refused():
    mesh = sharding.make_mesh()
    for num_microbatches in (0, 3):
        config = tiny.config(train__num_microbatches=num_microbatches)
        with pytest.raises(UserError, match=f"is {num_microbatches}, but must divide the 2"):
            build.train_program(config, mesh)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_of_weights_are_made_in_their_dtype(dtype):
    """In the jaxpr: compilers for CPUs reduce bfloat16 in float32 anyway."""
    config = tiny.config(model__dtype="bfloat16", model__gradient_dtype=dtype)
    model = build.model(config)
    params = tiny.random_params(model)
    inputs = (
        jnp.zeros(2, jnp.int32),
        jnp.ones((2, 3, model.token_width)),
        jnp.ones((2, 1, model.num_tokens, model.token_width)),
        jnp.zeros((2, 1, 1), jnp.int32),
        *[jnp.broadcast_to(jnp.arange(model.num_tokens), (2, model.num_tokens))] * 2,
    )

    def loss(params):
        return jnp.sum(model.apply({"params": params}, *inputs))

    text = str(jax.make_jaxpr(jax.grad(loss))(params))
    hidden = 4 * model.width
    short = {"float32": "f32", "bfloat16": "bf16"}
    made = re.findall(rf"(f32|bf16)\[{model.width},{hidden}\] = dot_general", text)
    made += re.findall(rf"(f32|bf16)\[{hidden},{model.width}\] = dot_general", text)
    assert set(made) == {short[dtype]}


@pytest.mark.long
def test_gradient_dtype_leaves_float32_alone_and_bfloat16_near():
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    results = {}
    for dtype in ("float32", "bfloat16"):
        config = tiny.config(model__dtype="bfloat16", model__gradient_dtype=dtype)
        results[dtype] = float(run(config, mesh)[1]["gradient_norm"][0])
    # bfloat16 has 8 bits of mantissa.
    assert results["float32"] == pytest.approx(results["bfloat16"], rel=2e-2)
    assert results["float32"] != results["bfloat16"]


@pytest.mark.slow
def test_class_table_is_not_summed_over_devices():
    """Neither table nor gradient crosses devices whole: labels and rows of the batch do."""
    mesh = sharding.make_mesh(data=2, fsdp=4)
    config = tiny.config(train__global_batch_size=8, model__num_condition_tokens=4)
    program = build.train_program(config, mesh)
    table = program.abstract_state.params["label_table"]
    assert table.shape == (11, 64) and table.sharding.shard_shape(table.shape) == (11, 8)
    text = program.compile(program.clean_lengths[-1]).as_text()
    assert "[11,8]" in text
    for shape in ("[11,64]", "[11,16]", "[11,32]"):
        assert shape not in text
    # Each device gets the rows of its own example, never those of the whole batch.
    assert "all-to-all(" in text
    assert not re.search(r"f32\[8,\d+,16\][^=\n]* all-gather\(", text)


@pytest.mark.long
def test_vectors_and_positions_are_not_gathered():
    """Splitting biases, scales or the position table would double the number of collectives."""
    program = build.train_program(tiny.config(model__width=32), sharding.make_mesh(fsdp=8))
    params = program.abstract_state.params
    vectors = [params["token_positions"], params["final_norm"]["scale"]]
    vectors += [params["blocks"]["mlp"]["fc2"]["bias"], params["blocks"]["norm1"]["scale"]]
    for vector in vectors:
        assert vector.sharding.is_fully_replicated
    assert not params["blocks"]["mlp"]["fc2"]["kernel"].sharding.is_fully_replicated
    text = program.compile(program.clean_lengths[-1]).as_text()
    gathered = re.findall(r"= (\w+\[[\d,]*\])[^=\n]* all-gather\(", text)
    assert "f32[32,128]" in gathered  # a kernel
    assert not {"f32[32]", "f32[1,32]", "f32[16,32]"} & set(gathered)  # vectors, positions
    assert not any(it.startswith("s32[16,16") for it in gathered)  # orders, to look positions up


def test_compiler_options():
    config = tiny.config(train__tpu_compiler_options=("xla_a=true", "xla_b=4"))
    mesh = sharding.make_mesh()
    assert build.compiler_options(config, mesh) == {}  # not a mesh of TPUs

    class Described:
        platform = "tpu"

    class Mesh:
        devices = np.array([Described()])

    assert build.compiler_options(config, Mesh) == {"xla_a": "true", "xla_b": "4"}
    with pytest.raises(UserError, match="'xla_a', which is not of the form NAME=VALUE"):
        build.compiler_options(tiny.config(train__tpu_compiler_options=("xla_a",)), mesh)


def test_unknown_compiler_option_is_refused():
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    program = build.train_program(tiny.config(), mesh)
    lowered = program.lower(program.clean_lengths[-1])
    with pytest.raises(UserError, match="does not know the option 'xla_no_such_thing'"):
        compile_with_options(lowered, {"xla_no_such_thing": "1"})
