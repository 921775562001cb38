"""Meshes, shardings from logical axes, global batches: on the 8 virtual devices of the tests."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from cfjax import sharding, train_state
from cfjax.errors import UserError

BATCH, WIDTH, HIDDEN = 16, 8, 32


class TinyModel(nn.Module):
    """An MLP whose last bias (10) divides by no mesh axis of these tests."""

    @nn.compact
    def __call__(self, x):
        def dense(features, axes, name):
            return nn.Dense(
                features,
                kernel_init=sharding.with_logical_axes(nn.initializers.normal(), axes),
                bias_init=sharding.with_logical_axes(nn.initializers.zeros, axes[1:]),
                name=name,
            )

        x = nn.relu(dense(HIDDEN, ("width", "mlp"), "fc1")(x))
        x = nn.with_logical_constraint(x, ("batch", "activation_mlp"))
        x = dense(WIDTH, ("mlp", "width"), "fc2")(x)
        return dense(10, ("mlp", "width"), "fc3")(x)


OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))


def create(key):
    return train_state.create(TinyModel().init(key, jnp.zeros((8, WIDTH)))["params"], OPTIMIZER)


def loss_fn(params, batch):
    return jnp.mean((TinyModel().apply({"params": params}, batch["x"]) - batch["y"]) ** 2)


@jax.jit
def train(state, batch):
    grads = jax.grad(loss_fn)(state.params, batch)
    return train_state.apply_gradients(state, grads, OPTIMIZER, 0.9)


def make_batch():
    rng = np.random.default_rng(0)
    return {
        "x": rng.normal(size=(BATCH, WIDTH)).astype(np.float32),
        "y": rng.normal(size=(BATCH, 10)).astype(np.float32),
    }


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({}, (8, 1, 1)),
        ({"fsdp": 4}, (2, 4, 1)),
        ({"data": 1, "fsdp": -1, "tensor": 2}, (1, 4, 2)),
        ({"data": 2, "fsdp": 2, "tensor": 2}, (2, 2, 2)),
    ],
)
def test_mesh_sizes(sizes, expected):
    mesh = sharding.make_mesh(**sizes)
    assert mesh.axis_names == ("data", "fsdp", "tensor")
    assert mesh.devices.shape == expected


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"data": 3}, ["data=3", "8 devices"]),
        ({"data": -1, "fsdp": 3}, ["fsdp=3", "8 devices"]),
        ({"data": 2}, ["data=2", "8 devices"]),
        ({"data": 16}, ["data=16", "8 devices"]),
        ({"data": -1, "fsdp": -1}, ["fsdp=-1", "at most one"]),
        ({"data": 0}, ["data=0", "positive"]),
    ],
)
def test_mesh_that_does_not_fit_is_refused(sizes, words):
    with pytest.raises(UserError) as error:
        sharding.make_mesh(**sizes)
    assert all(word in str(error.value) for word in words)


def test_mesh_over_some_devices():
    assert sharding.make_mesh(devices=jax.devices()[:1]).size == 1


def test_shardings_follow_logical_axes_and_fall_back_to_replication():
    mesh = sharding.make_mesh(fsdp=4, tensor=2)
    shardings = sharding.state_shardings(jax.eval_shape(create, jax.random.key(0)), mesh)
    adam = shardings.opt_state[1][0]
    for params in (shardings.params, shardings.ema_params, adam.mu, adam.nu):
        assert params["fc1"]["kernel"].spec == PartitionSpec(("fsdp",), ("tensor",))
        assert params["fc2"]["bias"].spec == PartitionSpec(("fsdp",))
        assert params["fc3"]["kernel"].spec == PartitionSpec(("tensor",), None)
        assert params["fc3"]["bias"].spec == PartitionSpec(None)
    assert shardings.train_step.spec == adam.count.spec == PartitionSpec()


def test_small_parameters_are_not_split_over_their_width():
    """What counts is one layer of those that are stacked."""
    mesh = sharding.make_mesh(fsdp=4, tensor=2)
    boxed = {
        "small": nn.LogicallyPartitioned(jnp.zeros((8, 8)), ("width", "mlp")),
        "stacked": nn.LogicallyPartitioned(jnp.zeros((9, 8, 8)), ("layers", "width", "mlp")),
        "large": nn.LogicallyPartitioned(jnp.zeros((8, 10)), ("width", "mlp")),
        "classes": nn.LogicallyPartitioned(jnp.zeros((2, 8)), ("classes", "condition_width")),
    }
    specs = jax.tree.map(lambda it: it.spec, sharding.state_shardings(boxed, mesh, min_size=65))
    assert specs == {
        "small": PartitionSpec(None, ("tensor",)),
        "stacked": PartitionSpec(None, None, ("tensor",)),
        "large": PartitionSpec(("fsdp",), ("tensor",)),
        "classes": PartitionSpec(None, ("data", "fsdp")),
    }
    state = sharding.born_sharded(create, mesh, jax.random.key(0), min_size=2**20)
    abstract = sharding.abstract_sharded(create, mesh, jax.random.key(0), min_size=2**20)
    described = jax.tree.map(lambda leaf: leaf.sharding, state)
    assert described == jax.tree.map(lambda leaf: leaf.sharding, abstract)
    assert state.params["fc1"]["kernel"].sharding.spec == PartitionSpec(None, ("tensor",))


def test_unknown_logical_name_is_an_error():
    box = nn.LogicallyPartitioned(jnp.zeros((4,)), names=("widht",))
    with pytest.raises(KeyError, match="widht"):
        sharding.state_shardings({"a": box}, sharding.make_mesh())


def test_a_mesh_axis_is_used_once_per_array():
    box = nn.LogicallyPartitioned(jnp.zeros((4, 4)), names=("width", "width"))
    spec = sharding.state_shardings(box, sharding.make_mesh(fsdp=4)).spec
    assert spec == PartitionSpec(("fsdp",), None)


@pytest.mark.parametrize("active", [False, True])
def test_born_sharded_holds_the_same_values_on_any_mesh(active):
    key = jax.random.key(3)
    expected = sharding.born_sharded(create, sharding.make_mesh(devices=jax.devices()[:1]), key)
    mesh = sharding.make_mesh(fsdp=4, tensor=2)
    if active:
        with sharding.activate(mesh):
            state = sharding.born_sharded(create, mesh, key)
            abstract = sharding.abstract_sharded(create, mesh, key)
    else:
        state = sharding.born_sharded(create, mesh, key)
        abstract = sharding.abstract_sharded(create, mesh, key)
    # Bit for bit: keys are partitionable, so a device draws exactly its part.
    jax.tree.map(np.testing.assert_array_equal, state, expected)
    kernel = state.params["fc1"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (WIDTH // 4, HIDDEN // 2)
    described = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.sharding), state)
    assert described == jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.sharding), abstract)


@pytest.mark.parametrize("jitted", [False, True])
def test_parameters_and_ema_do_not_share_buffers(jitted):
    if jitted:
        state = sharding.born_sharded(create, sharding.make_mesh(), jax.random.key(0))
    else:
        state = train_state.create({"w": jnp.ones((4,))}, OPTIMIZER)
    step = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    assert int(step(state).train_step) == 1


@pytest.mark.parametrize("sizes", [{}, {"fsdp": 4}, {"fsdp": 4, "tensor": 2}, {"fsdp": 8}])
def test_eight_devices_train_as_one(sizes):
    alone = sharding.make_mesh(devices=jax.devices()[:1])
    states = []
    for mesh in (alone, sharding.make_mesh(**sizes)):
        with sharding.activate(mesh):
            state = sharding.born_sharded(create, mesh, jax.random.key(0))
            batch = sharding.assemble_global_batch(make_batch(), mesh)
            for _ in range(3):
                state = train(state, batch)
        states.append(state)
    # Sums over the batch are taken in another order; Adam divides by small numbers.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), *states)
    assert float(loss_fn(states[0].params, make_batch())) < float(
        loss_fn(create(jax.random.key(0)).params, make_batch())
    )


def test_constraints_bind_when_active_and_do_nothing_otherwise():
    mesh = sharding.make_mesh(fsdp=4, tensor=2)

    def constrain(x):
        return nn.with_logical_constraint(x, ("batch", "activation_mlp"))

    x = jnp.zeros((BATCH, HIDDEN))
    assert len(jax.jit(constrain)(x).sharding.device_set) == 1
    with sharding.activate(mesh):
        result = jax.jit(constrain)(x)
    assert result.addressable_shards[0].data.shape == (BATCH // 4, HIDDEN // 2)
    assert len(jax.jit(lambda x: constrain(x) + 1)(x).sharding.device_set) == 1


def test_layers_that_initialize_in_another_shape_apply_under_a_mesh():
    init = sharding.with_logical_axes(nn.initializers.normal(), ("width", "heads", "head_width"))
    layer = nn.DenseGeneral((2, 4), use_bias=False, kernel_init=init)
    mesh = sharding.make_mesh(fsdp=4, tensor=2)
    with sharding.activate(mesh):
        params = sharding.born_sharded(layer.init, mesh, jax.random.key(0), jnp.ones((1, WIDTH)))
        out = jax.jit(layer.apply)(params, jnp.ones((BATCH, WIDTH)))
    assert params["params"]["kernel"].sharding.spec == PartitionSpec(("fsdp",), ("tensor",), None)
    assert out.shape == (BATCH, 2, 4)


def test_global_batch_is_split_over_data_and_fsdp():
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    local = make_batch()
    batch = sharding.assemble_global_batch(local, mesh)
    assert batch["x"].addressable_shards[0].data.shape == (BATCH // 4, WIDTH)
    jax.tree.map(np.testing.assert_array_equal, batch, local)
    np.testing.assert_array_equal(sharding.batch_rows(BATCH, mesh), np.arange(BATCH))


def test_indivisible_batch_is_refused():
    mesh = sharding.make_mesh(data=2, fsdp=4)
    sharding.check_batch_divides(16, mesh)
    with pytest.raises(UserError, match=r"batch of 60 .*multiple of 8, such as 64\."):
        sharding.check_batch_divides(60, mesh)
    with pytest.raises(UserError, match=r"3 processes; use a multiple of 24, such as 24\."):
        sharding.check_batch_divides(16, mesh, process_count=3)
    with pytest.raises(UserError, match=r"batch of 0 "):
        sharding.check_batch_divides(0, mesh)


def test_indivisible_axes_are_refused():
    mesh = sharding.make_mesh(tensor=4)
    sharding.check_axes_divide(mesh, heads=4, mlp=16, batch=6)
    with pytest.raises(UserError, match=r"heads 6 .*tensor=4; use a multiple of 4"):
        sharding.check_axes_divide(mesh, mlp=16, heads=6)


def test_apply_gradients_averages_the_new_parameters():
    params = {"w": jnp.array([1.0, 2.0])}
    optimizer = optax.sgd(0.5)
    state = train_state.create(params, optimizer)
    np.testing.assert_array_equal(state.ema_params["w"], params["w"])
    state = train_state.apply_gradients(state, {"w": jnp.array([2.0, 0.0])}, optimizer, 0.75)
    np.testing.assert_array_equal(state.params["w"], [0.0, 2.0])
    np.testing.assert_array_equal(state.ema_params["w"], [0.75, 2.0])
    assert state.train_step.dtype == jnp.int32 and int(state.train_step) == 1


@dataclasses.dataclass(frozen=True)
class DescribedDevice:
    """As much of a device as a mesh asks for."""

    id: int
    slice_index: int
    process_index: int = 0
    platform: str = "tpu of another kind"
    device_kind: str = "described"
    coords: tuple[int, int, int] = (0, 0, 0)
    core_on_chip: int = 0


def test_a_mesh_axis_may_be_a_part_of_an_axis_of_the_torus():
    """fsdp=16 on 8 x 8 chips."""
    devices = [
        DescribedDevice(8 * y + x, slice_index=0, platform="tpu", coords=(x, y, 0))
        for y in range(8)
        for x in range(8)
    ]
    mesh = sharding.make_mesh(fsdp=16, devices=devices)
    assert mesh.shape == {"data": 4, "fsdp": 16, "tensor": 1}
    for group in mesh.devices[:, :, 0]:
        near = {device.coords for device in group}
        for x, y, _ in near:  # each has a neighbour in its group
            assert near & {((x + 1) % 8, y, 0), ((x - 1) % 8, y, 0)}


def test_data_goes_across_slices():
    devices = [DescribedDevice(i, slice_index=i % 2) for i in range(8)]
    mesh = sharding.make_mesh(fsdp=2, devices=devices)
    assert mesh.shape == {"data": 4, "fsdp": 2, "tensor": 1}
    slices = [[device.slice_index for device in row] for row in mesh.devices[:, :, 0]]
    assert slices == [[0, 0], [0, 0], [1, 1], [1, 1]]
    with pytest.raises(UserError, match="data=1 does not divide over 2 slices"):
        sharding.make_mesh(data=1, fsdp=8, devices=devices)
