"""Files of the safetensors format, and autoencoders kept in them."""

import json

import golden_vae
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cfjax import autoencoder_files
from cfjax.errors import UserError
from cfjax.tensor_files import TensorFile, write_tensors

ARRAYS = {
    "b": np.arange(6, dtype=np.float32).reshape(2, 3),
    "a/é": np.float32(7.0).reshape(()),
    "empty": np.zeros((0, 4), np.float32),
}


def written(path, arrays=ARRAYS):
    shapes = {name: array.shape for name, array in arrays.items()}
    write_tensors(path, shapes, arrays.items())
    return path


def test_what_is_written_is_read(tmp_path):
    file = TensorFile(written(tmp_path / "x.safetensors"))
    assert list(file) == list(ARRAYS) and len(file) == 3
    assert file.shapes() == {name: array.shape for name, array in ARRAYS.items()}
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(file[name], array)
        assert file[name].dtype == np.float32
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


def test_metadata_come_back(tmp_path):
    path = tmp_path / "x.safetensors"
    write_tensors(path, {"b": (2, 3)}, [("b", ARRAYS["b"])], {"source": "é"})
    file = TensorFile(path)
    assert file.metadata == {"source": "é"} and list(file) == ["b"]
    np.testing.assert_array_equal(file["b"], ARRAYS["b"])
    assert TensorFile(written(tmp_path / "y.safetensors")).metadata == {}
    path.write_bytes(path.read_bytes().replace(rb'{"source": "\u00e9"}', rb'["source", "\u00e9"]'))
    with pytest.raises(UserError, match="its metadata have no names"):
        TensorFile(path)


@pytest.mark.parametrize(
    ("name", "dtype"), [("BF16", jnp.bfloat16), ("F16", np.float16), ("I64", np.int64)]
)
def test_other_dtypes_are_read(tmp_path, name, dtype):
    array = np.arange(8).astype(dtype)
    path = written(tmp_path / "x", {"x": np.frombuffer(array.tobytes(), np.float32)})
    length = int.from_bytes(path.read_bytes()[:8], "little")
    header = json.loads(path.read_bytes()[8 : 8 + length])
    header["x"] |= {"dtype": name, "shape": [8]}
    text = json.dumps(header).encode().ljust(length)
    path.write_bytes(length.to_bytes(8, "little") + text + array.tobytes())
    file = TensorFile(path)
    assert file["x"].dtype == dtype
    np.testing.assert_array_equal(file["x"], array)


@pytest.mark.parametrize("other", [np.zeros((3, 2), np.float32), np.zeros((2, 3))])
def test_arrays_of_another_shape_or_dtype_leave_no_file(tmp_path, other):
    path = tmp_path / "x"
    with pytest.raises(ValueError, match="where b"):
        write_tensors(path, {"b": (2, 3)}, [("b", other)])
    assert not path.exists()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: data[:-1],
        lambda data: data[:20],
        lambda data: data[:3],
        lambda data: b"",
        lambda data: data.replace(b"F32", b"F99"),
        lambda data: data.replace(b'"shape": [2, 3]', b'"shape": [2, 9]'),
        lambda data: b"PK" + data[2:],
    ],
)
def test_damaged_files_are_refused(tmp_path, spoil):
    path = written(tmp_path / "x", {"b": ARRAYS["b"]})
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(UserError, match="not a whole safetensors file"):
        TensorFile(path)
    with pytest.raises(UserError, match="there is no file"):
        TensorFile(tmp_path / "nowhere")


def test_autoencoder_is_loaded_as_it_was_saved(tmp_path):
    checksum = autoencoder_files.save(tmp_path / "vae", golden_vae.module(), golden_vae.params())
    loaded = autoencoder_files.load(tmp_path / "vae")
    assert loaded.module == golden_vae.module() and loaded.checksum == checksum
    jax.tree.map(np.testing.assert_array_equal, loaded.params, golden_vae.params())
    half = autoencoder_files.load(tmp_path / "vae", jnp.bfloat16).module
    assert half == golden_vae.module().clone(dtype=jnp.bfloat16)
    again = autoencoder_files.save(tmp_path / "again", loaded.module, loaded.params)
    assert again == checksum


def test_damaged_autoencoders_are_refused(tmp_path):
    folder = tmp_path / "vae"
    with pytest.raises(UserError, match="there is no autoencoder"):
        autoencoder_files.load(folder)
    autoencoder_files.save(folder, golden_vae.module(), golden_vae.params())
    config_file, weights = folder / "config.json", folder / "weights.safetensors"
    config = json.loads(config_file.read_text())
    whole = weights.read_bytes()

    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(UserError, match="sha256"):
        autoencoder_files.load(folder)
    weights.write_bytes(whole)

    config_file.write_text(json.dumps(config | {"channels": 64}))
    with pytest.raises(UserError, match="don't fit its config"):
        autoencoder_files.load(folder)
    config_file.write_text(json.dumps(config | {"chanels": 64}))
    with pytest.raises(UserError, match="chanels"):
        autoencoder_files.load(folder)
    config_file.write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        autoencoder_files.load(folder)
