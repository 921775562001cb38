"""Inception's published files to ours: a frozen graph, and PyTorch's names in safetensors."""

import json
import struct

import flax.traverse_util
import numpy as np
import pytest
from converting import convert

from cfjax import inception_files
from cfjax.autoencoder_files import sha256
from cfjax.convert.frozen_graph import read_constants
from cfjax.errors import UserError
from cfjax.tensor_files import TensorFile, write_tensors

# Where each layer of torch-fidelity's network is in the graph, by the kind of its block.
A = {
    **{"branch1x1": "conv", "branch_pool": "tower_2/conv"},
    **{"branch5x5_1": "tower/conv", "branch5x5_2": "tower/conv_1"},
    **{"branch3x3dbl_1": "tower_1/conv", "branch3x3dbl_2": "tower_1/conv_1"},
    "branch3x3dbl_3": "tower_1/conv_2",
}
B = {
    **{"branch3x3": "conv", "branch3x3dbl_1": "tower/conv"},
    **{"branch3x3dbl_2": "tower/conv_1", "branch3x3dbl_3": "tower/conv_2"},
}
C = {
    **{"branch1x1": "conv", "branch_pool": "tower_2/conv"},
    **{"branch7x7_1": "tower/conv", "branch7x7_2": "tower/conv_1", "branch7x7_3": "tower/conv_2"},
    **{"branch7x7dbl_1": "tower_1/conv", "branch7x7dbl_2": "tower_1/conv_1"},
    **{"branch7x7dbl_3": "tower_1/conv_2", "branch7x7dbl_4": "tower_1/conv_3"},
    "branch7x7dbl_5": "tower_1/conv_4",
}
D = {
    **{"branch3x3_1": "tower/conv", "branch3x3_2": "tower/conv_1"},
    **{"branch7x7x3_1": "tower_1/conv", "branch7x7x3_2": "tower_1/conv_1"},
    **{"branch7x7x3_3": "tower_1/conv_2", "branch7x7x3_4": "tower_1/conv_3"},
}
E = {
    **{"branch1x1": "conv", "branch_pool": "tower_2/conv", "branch3x3_1": "tower/conv"},
    **{"branch3x3_2a": "tower/mixed/conv", "branch3x3_2b": "tower/mixed/conv_1"},
    **{"branch3x3dbl_1": "tower_1/conv", "branch3x3dbl_2": "tower_1/conv_1"},
    "branch3x3dbl_3a": "tower_1/mixed/conv",
    "branch3x3dbl_3b": "tower_1/mixed/conv_1",
}
BLOCKS = {
    **{"Mixed_5b": ("mixed", A), "Mixed_5c": ("mixed_1", A), "Mixed_5d": ("mixed_2", A)},
    **{"Mixed_6a": ("mixed_3", B), "Mixed_6b": ("mixed_4", C), "Mixed_6c": ("mixed_5", C)},
    **{"Mixed_6d": ("mixed_6", C), "Mixed_6e": ("mixed_7", C), "Mixed_7a": ("mixed_8", D)},
    **{"Mixed_7b": ("mixed_9", E), "Mixed_7c": ("mixed_10", E)},
}
# Ours, of the graph, of PyTorch.
LAYERS = {
    "Conv2d_1a_3x3": ("conv", "Conv2d_1a_3x3"),
    "Conv2d_2a_3x3": ("conv_1", "Conv2d_2a_3x3"),
    "Conv2d_2b_3x3": ("conv_2", "Conv2d_2b_3x3"),
    "Conv2d_3b_1x1": ("conv_3", "Conv2d_3b_1x1"),
    "Conv2d_4a_3x3": ("conv_4", "Conv2d_4a_3x3"),
    **{
        f"{block}/{layer}": (f"{in_graph}/{place}", f"{block}.{layer}")
        for block, (in_graph, kind) in BLOCKS.items()
        for layer, place in kind.items()
    },
}
WHAT = {
    "kernel": ("conv2d_params", "conv.weight"),
    "gamma": ("batchnorm/gamma", "bn.weight"),
    "beta": ("batchnorm/beta", "bn.bias"),
    "mean": ("batchnorm/moving_mean", "bn.running_mean"),
    "variance": ("batchnorm/moving_variance", "bn.running_var"),
}
NAMES = {
    f"{layer}/{what}": (f"{in_graph}/{for_graph}", f"{in_torch}.{for_torch}")
    for layer, (in_graph, in_torch) in LAYERS.items()
    for what, (for_graph, for_torch) in WHAT.items()
} | {"logits/kernel": ("softmax/weights", "fc.weight")}
SPLAT = "conv_1/batchnorm/gamma"  # values of one kind in the graph, written once
LISTED = "conv_2/batchnorm/gamma"  # not as bytes
FLOAT, INT32 = 1, 3


def varint(value):
    value %= 1 << 64
    groups = []
    while value >= 128:
        groups.append(value & 127 | 128)
        value >>= 7
    return bytes([*groups, value])


def field(number, value):
    """A field of a protocol buffer: an integer, or bytes."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def tensor(shape, *values, dtype=FLOAT):
    """A TensorProto; `values` are its further fields."""
    dims = b"".join(field(2, field(1, size)) for size in shape)
    return b"".join([field(1, dtype), field(2, dims), *values])


def node(name, op, **attributes):
    entries = [field(1, key.encode()) + field(2, value) for key, value in attributes.items()]
    parts = [
        field(1, name.encode()),
        field(2, op.encode()),
        *(field(5, entry) for entry in entries),
    ]
    return field(1, b"".join(parts))


def constant(name, proto):
    return node(name, "Const", dtype=field(6, FLOAT), value=field(8, proto))


def encoded(name, array):
    if name == SPLAT:
        return constant(name, tensor(array.shape, field(5, array[:1].tobytes())))
    if name == LISTED:
        one_by_one = [varint(5 << 3 | 5) + struct.pack("<f", value) for value in array]
        return constant(name, tensor(array.shape, *one_by_one))
    return constant(name, tensor(array.shape, field(4, array.tobytes())))


OTHERS = [
    node("ExpandDims", "ExpandDims", T=field(6, FLOAT)),
    constant("ResizeBilinear/size", tensor((2,), field(4, bytes(8)), dtype=INT32)),
    constant("Sub/y", tensor((), field(5, struct.pack("<f", 128)))),
    constant("softmax/biases", tensor((1008,), field(5, struct.pack("<f", 1)))),
]
VERSIONS = field(4, field(1, 22))


def random_arrays():
    """By our path."""
    rng = np.random.default_rng(0)
    shapes = inception_files.flat_shapes()
    made = {path: rng.random(shape, np.float32) for path, shape in shapes.items()}
    made["Conv2d_2a_3x3/gamma"][:] = 1.5
    return made


def write_graph(path, arrays):
    with path.open("wb") as file:
        file.writelines(OTHERS)
        for name, array in arrays.items():
            file.write(encoded(NAMES[name][0], array))
        file.write(VERSIONS)
    return path


@pytest.fixture(scope="module")
def arrays():
    return random_arrays()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("inception")


@pytest.fixture(scope="module")
def from_graph(arrays, folder):
    source = write_graph(folder / "graph.pb", arrays)
    return convert(source, folder / "from_graph.safetensors", "--from=inception")


def for_torch(arrays):
    axes = {1: (0,), 2: (1, 0), 4: (3, 2, 0, 1)}
    published = {
        NAMES[name][1]: np.ascontiguousarray(array.transpose(axes[array.ndim]))
        for name, array in arrays.items()
    }
    others = ["fc.bias", "AuxLogits.fc.weight", "Conv2d_1a_3x3.bn.num_batches_tracked"]
    return published | {name: np.zeros(1, np.float32) for name in others}


def write(path, published):
    shapes = {name: array.shape for name, array in published.items()}
    write_tensors(path, shapes, published.items())
    return path


@pytest.fixture(scope="module")
def from_torch(arrays, folder):
    source = write(folder / "torch.safetensors", for_torch(arrays))
    return convert(source, folder / "from_torch.safetensors", "--from=inception")


@pytest.mark.parametrize("road", ["from_graph", "from_torch"])
def test_every_array_has_its_place(arrays, road, request):
    loaded = inception_files.load(request.getfixturevalue(road))
    flat = flax.traverse_util.flatten_dict(loaded.params, sep="/")
    assert flat.keys() == arrays.keys() == NAMES.keys() and len(flat) == 5 * 94 + 1
    for name, array in arrays.items():
        np.testing.assert_array_equal(flat[name], array, name)
        assert flat[name].dtype == np.float32


def test_both_roads_have_the_same_checksum(from_graph, from_torch):
    first, second = (inception_files.load(path) for path in (from_graph, from_torch))
    assert first.checksum == second.checksum and len(first.checksum) == 12


def test_the_report_lists_what_was_mapped_and_left_out(from_graph, from_torch):
    report = json.loads(from_graph.with_name(from_graph.name + ".conversion.json").read_text())
    assert len(report["names"]) == 5 * 94 + 1
    entry = {
        "published": "mixed_3/tower/conv_2/conv2d_params",
        "ours": "Mixed_6a/branch3x3dbl_3/kernel",
        "shape": [3, 3, 96, 96],
    }
    assert entry in report["names"]
    assert report["left_out"].keys() == {"Sub/y", "softmax/biases"}
    report = json.loads(from_torch.with_name(from_torch.name + ".conversion.json").read_text())
    assert report["left_out"] == {
        "fc.bias": "the suite's logits have no bias",
        "AuxLogits.fc.weight": "it only trained the network",
        "Conv2d_1a_3x3.bn.num_batches_tracked": "it counts what the statistics were made of",
    }


def test_unknown_weights_come_with_a_warning(from_graph):
    loaded = inception_files.load(from_graph)
    assert loaded.source_name is None
    assert loaded.warning == (
        f"The feature extractor is of unknown weights (sha256 {loaded.checksum}...): its scores"
        " compare with nothing published."
    )
    report = json.loads(from_graph.with_name(from_graph.name + ".conversion.json").read_text())
    assert loaded.warning in report["remarks"]


def test_public_files_are_named(from_graph, folder, monkeypatch):
    monkeypatch.setitem(inception_files.KNOWN, sha256(folder / "graph.pb"), "the public one")
    loaded = inception_files.load(from_graph)
    assert loaded.source_name == "the public one" and loaded.warning is None
    again = convert(folder / "graph.pb", folder / "new/again.safetensors", "--from=inception")
    report = json.loads(again.with_name(again.name + ".conversion.json").read_text())
    said = f"These are the published weights of the public one, checksum {loaded.checksum}."
    assert said in report["remarks"]


def test_public_checksums_are_whole():
    assert all(len(digest) == 64 and int(digest, 16) for digest in inception_files.KNOWN)
    named = {name: digest for digest, name in inception_files.KNOWN.items()}
    # torch.hub's convention: the name ends with the first digits.
    assert named["pt_inception-2015-12-05-6726825d.pth"].startswith("6726825d")


def test_weights_that_do_not_fit_are_listed(arrays, tmp_path):
    published = for_torch(arrays)
    published["Mixed_7c.branch1x1.bn.bias"] = np.zeros(3, np.float32)
    published["Mixed_8a.conv.weight"] = published.pop("fc.weight")
    source = write(tmp_path / "x.safetensors", published)
    with pytest.raises(UserError) as error:
        convert(source, tmp_path / "ours.safetensors", "--from=inception")
    for part in (
        "missing fc.weight; extra Mixed_8a.conv.weight;",
        "Mixed_7c.branch1x1.bn.bias is (3,) but the model's is (320,); pass classify_image_graph_def.pb",
    ):
        assert part in str(error.value)
    assert not (tmp_path / "ours.safetensors").exists()


def test_other_files_are_refused(tmp_path):
    source = tmp_path / "weights.h5"
    source.write_bytes(b"x")
    with pytest.raises(UserError, match=r"unknown suffix of Inception's weights '.h5'"):
        convert(source, tmp_path / "ours", "--from=inception")
    with pytest.raises(UserError, match="--to=inception is not possible"):
        convert(source, tmp_path / "ours", "--to=inception")


def test_missing_weights_say_where_to_get_them(tmp_path):
    with pytest.raises(UserError) as error:
        inception_files.load(tmp_path / "inception.safetensors")
    for part in (
        *("classify_image_graph_def.pb", "pt_inception-2015-12-05-6726825d.pth"),
        "weights-inception-2015-12-05-6726825d.pth",
        "python -m cfjax.convert --from=inception --source=FILE --out=inception.safetensors",
    ):
        assert part in str(error.value)


def test_damaged_weights_are_refused(from_graph, tmp_path):
    path = write(tmp_path / "x.safetensors", {"x": np.zeros(1, np.float32)})
    with pytest.raises(UserError, match="are not those of Inception; convert them again"):
        inception_files.load(path)
    data = bytearray(from_graph.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="have changed since they were written"):
        inception_files.load(path)
    path.write_bytes(data[:-4])
    with pytest.raises(UserError, match="not a whole safetensors file"):
        inception_files.load(path)


def test_weights_of_no_converter_are_unknown(from_graph, folder, tmp_path, monkeypatch):
    """Such a file may say what it wants, but without a checksum that binds the arrays to it."""
    monkeypatch.setitem(inception_files.KNOWN, "0" * 64, "the public one")
    file = TensorFile(from_graph)
    path = tmp_path / "x.safetensors"
    write_tensors(path, file.shapes(), file.items(), {"source_sha256": "0" * 64})
    loaded = inception_files.load(path)
    assert loaded.source_name is None and loaded.warning
    assert loaded.checksum == inception_files.load(from_graph).checksum


VALUES = np.arange(6, dtype=np.float32)
SMALL = [
    *OTHERS,
    constant("content", tensor((2, 3), field(4, VALUES.tobytes()))),
    constant("short", tensor((2, 3), field(5, VALUES[:4].tobytes()))),
    constant("zeros", tensor((2, 3))),
    constant("empty", tensor((2, 0))),
    VERSIONS,
]


def graph(path, *parts):
    path.write_bytes(b"".join(parts))
    return path


def test_constants_are_read_in_all_their_forms(tmp_path):
    constants = read_constants(graph(tmp_path / "x.pb", *SMALL))
    assert set(constants) == {"Sub/y", "softmax/biases", "content", "short", "zeros", "empty"}
    assert constants["Sub/y"].shape == () and constants["Sub/y"] == 128
    np.testing.assert_array_equal(constants["softmax/biases"], np.ones(1008, np.float32))
    np.testing.assert_array_equal(constants["content"], VALUES.reshape(2, 3))
    np.testing.assert_array_equal(constants["short"], [[0, 1, 2], [3, 3, 3]])
    np.testing.assert_array_equal(constants["zeros"], np.zeros((2, 3)))
    assert constants["empty"].shape == (2, 0)


def test_graphs_that_are_cut_off_are_refused(tmp_path):
    """At any byte; between nodes the rest is a graph, whose missing weights the converter lists."""
    whole = b"".join(SMALL)
    ends = np.cumsum([len(part) for part in SMALL])
    for length in range(len(whole)):
        path = graph(tmp_path / "x.pb", whole[:length])
        if length in ends[2:]:
            assert len(read_constants(path)) < 7
            continue
        with pytest.raises(UserError, match=r"is not a whole frozen graph|no float32 constants"):
            read_constants(path)


@pytest.mark.parametrize(
    ("part", "reason"),
    [
        (constant("x", tensor((7,), field(4, VALUES.tobytes()))), r"x has another size.*\(7,\)"),
        (constant("x", tensor((5,), field(5, VALUES.tobytes()))), r"x has another size.*\(5,\)"),
        (constant("x", tensor((-1,), field(5, VALUES.tobytes()))), "unknown size"),
        (field(1, 7), "a number where a message belongs"),
        (bytes([1 << 3 | 3]), "unknown kind 3"),
        (bytes([0x80] * 11), "an integer without an end"),
        (b"PK\x03\x04" + bytes(range(40)), "is not a whole frozen graph"),
    ],
)
def test_damaged_graphs_are_refused(tmp_path, part, reason):
    path = graph(tmp_path / "x.pb", *SMALL, part)
    with pytest.raises(UserError, match=reason):
        read_constants(path)


def test_files_without_a_graph_are_refused(tmp_path):
    with pytest.raises(UserError, match="there is no file"):
        read_constants(tmp_path / "x.pb")
    with pytest.raises(UserError, match="no float32 constants in it"):
        read_constants(graph(tmp_path / "x.pb", *OTHERS[:2]))
    with pytest.raises(UserError, match="is not a whole frozen graph"):
        read_constants(graph(tmp_path / "x.pb"))
