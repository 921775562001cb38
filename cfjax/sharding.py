"""Meshes, logical axes and global batches: the only builder of meshes.

Parameters and activations carry logical names; `LOGICAL_AXIS_RULES` says along which mesh axis each
name is split. The same code runs on one device, on several, and on several processes.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from flax.core import meta
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from cfjax.errors import UserError

MESH_AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")

LOGICAL_AXIS_RULES = (
    # Parameters, and what mirrors them (EMA, optimizer moments).
    ("layers", None),  # the scanned layers
    ("width", "fsdp"),  # D
    ("vector_width", None),  # D of a bias or a scale: whole, too small to be worth a gather
    ("mlp", "tensor"),  # hidden width of an MLP
    ("qkv", None),  # queries, keys, values
    ("heads", "tensor"),  # H
    ("head_width", None),
    ("classes", None),  # rows of the label table
    ("condition_width", BATCH_AXES),  # its columns: n condition tokens of width D
    ("condition", None),  # condition tokens
    ("vocabulary", None),  # ids of text tokens
    ("position_width", None),  # D of a position table: whole, small and added in float32
    ("tokens", None),  # L, position of an image token
    ("token_width", None),  # values of one image token
    ("features", None),  # sinusoidal features of a timestep
    # Activations.
    ("batch", BATCH_AXES),
    ("sequence", None),  # T
    ("activation_width", None),
    ("activation_mlp", "tensor"),
    ("activation_heads", "tensor"),
    ("activation_head_width", None),
)


def make_mesh(
    data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """A mesh with the axes `data`, `fsdp` and `tensor` over all devices of all processes.

    On several TPU slices `data` goes across them: what it communicates, gradients, suits the slower
    network between slices.

    Args:
      data: copies of the parameters; each takes its part of the batch.
      fsdp: parts into which parameters, EMA and optimizer state are split; the batch is split too.
      tensor: parts into which heads and MLP are split.
      devices: instead of all devices.

    One of the sizes may be -1: it takes what the others leave.

    Raises:
      UserError: the sizes do not multiply to the number of devices, or a slice would hold a part of
        a copy.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [data, fsdp, tensor]
    named = ", ".join(f"{axis}={size}" for axis, size in zip(MESH_AXES, sizes, strict=True))
    if any(size < 1 and size != -1 for size in sizes) or sizes.count(-1) > 1:
        raise UserError(f"mesh sizes must be positive and at most one of them -1, got {named}.")
    known = math.prod(size for size in sizes if size != -1)
    if len(devices) % known or (-1 not in sizes and known != len(devices)):
        raise UserError(
            f"mesh {named} does not fit {len(devices)} devices: the sizes must multiply to"
            f" {len(devices)}, and one of them may be -1 to take what the others leave."
        )
    shape = tuple(len(devices) // known if size == -1 else size for size in sizes)
    # Logical constraints fail under the explicit axes that newer jax makes by default.
    axis_types = (AxisType.Auto,) * 3
    num_slices = len({getattr(device, "slice_index", 0) for device in devices})
    if shape[0] % num_slices:
        raise UserError(
            f"mesh data={shape[0]} does not divide over {num_slices} slices; use a multiple of"
            f" {num_slices}, so that each slice holds whole copies."
        )
    if num_slices == 1:
        arrange = functools.partial(mesh_utils.create_device_mesh, shape, devices)
    else:
        within, across = (shape[0] // num_slices, *shape[1:]), (num_slices, 1, 1)
        arrange = functools.partial(
            mesh_utils.create_hybrid_device_mesh, within, across, devices=devices
        )
    try:
        arranged = arrange()
    except NotImplementedError:  # a mesh axis is not whole axes of the torus: 4 x 16 of 8 x 8
        arranged = arrange(allow_split_physical_axes=True)
    return Mesh(arranged, MESH_AXES, axis_types=axis_types)


@contextlib.contextmanager
def activate(mesh: Mesh) -> Iterator[None]:
    """Makes the model's logical constraints bind to `mesh`; outside they do nothing."""
    with jax.set_mesh(mesh), nn.logical_axis_rules(LOGICAL_AXIS_RULES):
        yield


def active_mesh() -> AbstractMesh | None:
    """The mesh that is active, or None.

    Its `abstract_device` tells the platform that a program is for, wherever it is compiled.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty else mesh


def partition_spec(names: tuple[str | None, ...]) -> PartitionSpec:
    """Along which mesh axes an array with these logical axes is split."""
    return PartitionSpec(*(_mesh_axes(name) or None for name in names))


def with_logical_axes(
    init_fn: nn.initializers.Initializer, names: tuple[str, ...]
) -> nn.initializers.Initializer:
    """An initializer whose parameter carries one logical name a dimension.

    Flax's own wrapper would also constrain the value wherever it is unboxed, which fails while a
    mesh is active in layers that initialize in another shape (`nn.DenseGeneral`).
    """
    return nn.with_logical_partitioning(init_fn, names, rules=())


def constrain(x: jax.Array, names: tuple[str | None, ...]) -> jax.Array:
    """Splits the first dimensions of `x` by their logical names, the others not at all.

    A dimension that the active mesh does not divide is left whole; outside `activate` nothing
    happens.
    """
    if not nn.get_logical_axis_rules():
        return x
    mesh = jax.sharding.get_abstract_mesh()
    spec = [
        _mesh_axes(name) if size % _num_parts(name, mesh) == 0 else None
        for name, size in zip(names, x.shape, strict=False)
    ]
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))


def _mesh_axes(name: str | None) -> tuple[str, ...]:
    """The mesh axes along which a logical axis is split."""
    axes = None if name is None else dict(LOGICAL_AXIS_RULES)[name]
    return (axes,) if isinstance(axes, str) else axes or ()


def _num_parts(name: str | None, mesh: Mesh) -> int:
    return math.prod(mesh.shape[axis] for axis in _mesh_axes(name))


def unbox(tree: Any) -> Any:
    """The tree without flax's boxes of logical names."""
    return jax.tree.map(
        lambda leaf: leaf.value if meta.is_axis_metadata(leaf) else leaf,
        tree,
        is_leaf=meta.is_axis_metadata,
    )


def _unconstrained(init_fn: Callable[..., Any]) -> Callable[..., Any]:
    """`init_fn` outside `activate`, whose constraints refuse what `state_shardings` replicates."""

    def init(*args):
        with nn.logical_axis_rules(()):
            return init_fn(*args)

    return init


def _leaf_sharding(leaf: Any, mesh: Mesh, min_size: int) -> NamedSharding:
    names = leaf.names if meta.is_axis_metadata(leaf) else ()
    shape = unbox(leaf).shape
    if len(names) != len(shape):
        return NamedSharding(mesh, PartitionSpec())
    num_values = math.prod(n for name, n in zip(names, shape, strict=True) if name != "layers")
    spec, used = [], set()
    for name, size in zip(names, shape, strict=True):
        axes = () if name == "width" and num_values < min_size else _mesh_axes(name)
        if size % _num_parts(name, mesh) or used.intersection(axes):
            axes = ()
        used.update(axes)
        spec.append(axes or None)
    return NamedSharding(mesh, PartitionSpec(*spec))


def state_shardings(abstract_state: Any, mesh: Mesh, min_size: int = 0) -> Any:
    """Shardings of a state from the logical axes of its leaves.

    A dimension that the mesh axis does not divide (a bias of 10 over fsdp=4), a second dimension
    along the same mesh axis, and leaves without logical axes are replicated.

    Args:
      abstract_state: a tree of arrays or `ShapeDtypeStruct`s, boxed by flax with logical names
        where they have any.
      mesh: from `make_mesh`.
      min_size: leaves of fewer values, of one layer where they are stacked, are not split over
        their width: what is small costs more to gather than it saves.

    Returns:
      The tree without boxes, each leaf a `NamedSharding`.

    Raises:
      KeyError: a logical name that `LOGICAL_AXIS_RULES` does not know.
    """
    return jax.tree.map(
        lambda leaf: _leaf_sharding(leaf, mesh, min_size),
        abstract_state,
        is_leaf=meta.is_axis_metadata,
    )


def abstract_sharded(init_fn: Callable[..., Any], mesh: Mesh, *args: Any, min_size: int = 0) -> Any:
    """What `born_sharded` would return, as `ShapeDtypeStruct`s with shardings; allocates nothing.

    The target of a restore.
    """
    boxed = jax.eval_shape(_unconstrained(init_fn), *args)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        unbox(boxed),
        state_shardings(boxed, mesh, min_size),
    )


def born_sharded(init_fn: Callable[..., Any], mesh: Mesh, *args: Any, min_size: int = 0) -> Any:
    """`init_fn(*args)` without its metadata boxes, every leaf made where it will live.

    No device ever holds more than its part. The values do not depend on the mesh.

    Args:
      init_fn: makes a state whose leaves may be boxed with logical names, such as
        `lambda key: train_state.create(model.init(key, ...)["params"], optimizer)`.
      mesh: from `make_mesh`.
      *args: arrays, the same in every process.
      min_size: see `state_shardings`.
    """
    init_fn = _unconstrained(init_fn)
    shardings = state_shardings(jax.eval_shape(init_fn, *args), mesh, min_size)
    return jax.jit(lambda *args: unbox(init_fn(*args)), out_shardings=shardings)(*args)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Splits the first dimension of a batch over `data` and `fsdp`."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def num_batch_shards(mesh: Mesh) -> int:
    """Into how many parts `batch_sharding` splits a batch."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_rows(global_batch_size: int, mesh: Mesh) -> np.ndarray:
    """The rows of the global batch, ascending, that live on this process's devices.

    What this process has to read for `assemble_global_batch`. On one process these are all rows;
    on several, a mesh that follows the wiring of a pod need not give a process consecutive ones.
    """
    slices = batch_sharding(mesh).addressable_devices_indices_map((global_batch_size,)).values()
    rows = np.arange(global_batch_size)
    return np.unique(np.concatenate([rows[index] for index in slices]))


def assemble_global_batch(local_batch: Any, mesh: Mesh) -> Any:
    """Joins the processes' parts of a batch to global arrays, split by `batch_sharding`.

    Args:
      local_batch: a tree of NumPy arrays `[local_batch, ...]`, the rows `batch_rows` of this
        process.
      mesh: from `make_mesh`.

    Returns:
      The tree of global arrays `[global_batch_size, ...]`.
    """
    return jax.make_array_from_process_local_data(batch_sharding(mesh), local_batch)


def check_batch_divides(
    global_batch_size: int, mesh: Mesh, process_count: int | None = None
) -> None:
    """Refuses a batch that cannot be split evenly over devices and processes.

    Args:
      global_batch_size: examples over all processes.
      mesh: from `make_mesh`.
      process_count: by default, that of this run.

    Raises:
      UserError: the batch is not divisible, or the processes would read the same rows.
    """
    process_count = jax.process_count() if process_count is None else process_count
    parts = _num_parts("batch", mesh)
    multiple = math.lcm(parts, process_count)
    if global_batch_size < 1 or global_batch_size % multiple:
        nearest = max(1, round(global_batch_size / multiple)) * multiple
        raise UserError(
            f"a batch of {global_batch_size} does not divide over data={mesh.shape['data']} x"
            f" fsdp={mesh.shape['fsdp']} devices of {process_count} processes; use a multiple of"
            f" {multiple}, such as {nearest}."
        )
    if jax.process_count() > 1:
        rows = len(batch_rows(global_batch_size, mesh))
        if rows * process_count != global_batch_size:
            raise UserError(
                f"mesh tensor={mesh.shape['tensor']} spans several processes, which would read"
                f" the same examples; use a divisor of the {jax.local_device_count()} devices of"
                " one process."
            )


def check_microbatches_divide(global_batch_size: int, num_microbatches: int, mesh: Mesh) -> None:
    """Refuses microbatches that cannot be split evenly over the devices.

    Raises:
      UserError: there are none, or they don't divide the batch of a device.
    """
    of_device = global_batch_size // _num_parts("batch", mesh)
    if num_microbatches < 1 or of_device % num_microbatches:
        raise UserError(
            f"train.num_microbatches is {num_microbatches}, but must divide the {of_device} examples"
            " of a device."
        )


def check_axes_divide(mesh: Mesh, **sizes: int) -> None:
    """Refuses sizes of logical axes that the mesh does not divide, such as `heads=6, mlp=384`.

    Parameters would be replicated, but activations cannot be.

    Raises:
      UserError: the first such size.
    """
    for name, size in sizes.items():
        parts = _num_parts(name, mesh)
        if size % parts:
            axes = " x ".join(f"{axis}={mesh.shape[axis]}" for axis in _mesh_axes(name))
            raise UserError(
                f"{name} {size} does not divide over mesh {axes}; use a multiple of {parts} or a"
                " smaller mesh axis."
            )
