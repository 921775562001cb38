"""Files of PyTorch, to ours and back, read by torch itself; run by `launch/test.sh --all`."""

import argparse
import fractions
import json
import os
import pickle
import sys
import types
import zipfile

import autoencoders
import golden_data
import golden_vae
import jax
import numpy as np
import pytest
import tiny
from converting import convert
from golden_data import assert_close_to_max, published_params
from test_convert import full_size
from test_convert_autoencoder import published as published_autoencoder

import cfjax
from cfjax import autoencoder_files, checkpoints
from cfjax.config_loading import config_from_json
from cfjax.convert import causal_fusion, position_table, torch_files
from cfjax.errors import UserError

torch = pytest.importorskip("torch")

pytestmark = [
    pytest.mark.oracle,
    # ml_collections loads config files that way.
    pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning"),
]
CONFIG = f"{tiny.CONFIGS}/imagenet256.py:ablation"
SIZES_OF_A = [
    *("--config.model.width=64", "--config.model.depth=3", "--config.model.num_heads=4"),
    *("--config.data.num_classes=10", "--config.model.patch_size=1"),
    *("--config.data.channels=16", "--config.model.position_embedding=learned"),
]


def tensors(arrays):
    return {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}


def other(arrays):
    """Different weights of the same names and shapes."""
    return {name: array + np.float32(0.5) for name, array in arrays.items()}


def save(path, document):
    torch.save(document, path)
    return path


def checkpoint_of(letter):
    """As the published training program saves it, but for its optimizer (`test_convert_optimizer`)."""
    model = tensors(published_params(letter))
    return {
        "model": model,
        "ema": tensors(other(published_params(letter))),
        "args": argparse.Namespace(model="CausalFusion-L", betas=(0.9, 0.95), extra=None),
        "epoch": 3,
    }


def assert_same(tensors_by_name, arrays):
    assert set(tensors_by_name) == set(arrays)
    for name, array in arrays.items():
        tensor = tensors_by_name[name]
        assert tensor.dtype == torch.float32 and tensor.is_contiguous()
        np.testing.assert_array_equal(tensor.numpy(), array, err_msg=name)


def assert_readable_and_aligned(path):
    """Not compressed, and each tensor at a multiple of 64 bytes, as mapping it wants."""
    content = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        entries = [entry for entry in archive.infolist() if "/data/" in entry.filename]
    assert entries
    for entry in entries:
        lengths = content[entry.header_offset + 26 : entry.header_offset + 30]
        name, extra = (int.from_bytes(half, "little") for half in (lengths[:2], lengths[2:]))
        assert (entry.header_offset + 30 + name + extra) % 64 == 0
        assert entry.compress_type == zipfile.ZIP_STORED


@pytest.mark.parametrize("letter", golden_data.MODELS)
def test_published_to_ours_and_back_bit_for_bit(tmp_path, letter):
    source = save(tmp_path / "published.pt", checkpoint_of(letter))
    ours = convert(source, tmp_path / "run", "--from=published")
    ema = jax.tree.leaves(checkpoints.restore_ema(ours))
    model = golden_data.model(letter, position_embedding="learned")
    expected = causal_fusion.params_from_published(
        other(published_params(letter)), golden_data.param_shapes(model), model.grid
    )
    jax.tree.map(np.testing.assert_array_equal, ema, jax.tree.leaves(expected))

    back = convert(ours, tmp_path / "back.pt", "--to=published")
    for mmap in (False, True):
        document = torch.load(back, weights_only=True, mmap=mmap)
        assert list(document) == ["model", "ema"]
        assert_same(document["model"], published_params(letter))
        assert_same(document["ema"], other(published_params(letter)))
    report = json.loads((tmp_path / "back.pt.conversion.json").read_text())
    assert {e["published"]: tuple(e["shape"]) for e in report["names"]} == {
        name: array.shape for name, array in published_params(letter).items()
    }
    assert report["result"]["sha256"] == autoencoder_files.sha256(back)
    assert_readable_and_aligned(back)


def test_converted_checkpoint_samples_and_knows_its_config(tmp_path):
    source = save(tmp_path / "published.pt", checkpoint_of("A"))
    ours = convert(source, tmp_path / "run", "--from=published")
    config = config_from_json(checkpoints.read_config(ours))
    assert (config.data.size, config.data.channels, config.model.patch_size) == (8, 16, 1)
    with pytest.raises(UserError, match="names no autoencoder; pass one that decodes them"):
        cfjax.load(ours)
    autoencoders.make(tmp_path / "vae", 3, latent_channels=16, scale=config.autoencoder.scale)
    sampler = cfjax.load(ours, autoencoder=tmp_path / "vae")
    assert sampler.model.clone(dtype=np.float32) == golden_data.model(
        "A", attention="splash", remat_policy=config.model.remat_policy, dtype=np.float32
    )
    report = json.loads((ours / "conversion.json").read_text())
    sizes, left_out = report["remarks"]
    assert "width 64, depth 3, num_heads 4, " in sizes and "num_classes 10;" in sizes
    assert left_out == "Left out: args, epoch, as they are not weights."
    assert list(report["left_out"]) == ["args", "epoch"]


@pytest.mark.parametrize("section", ["model", "ema", None])
def test_one_state_dict_is_both(tmp_path, section):
    weights = tensors(published_params("A"))
    source = save(tmp_path / "x.pt", {section: weights} if section else weights)
    ours = convert(source, tmp_path / "run", "--from=published")
    back = torch.load(convert(ours, tmp_path / "back.pt", "--to=published"), weights_only=True)
    assert_same(back["model"], published_params("A"))
    assert_same(back["ema"], published_params("A"))


def test_halves_become_float32_and_that_is_said(tmp_path):
    weights = {name: t.bfloat16() for name, t in tensors(published_params("A")).items()}
    ours = convert(save(tmp_path / "x.pt", weights), tmp_path / "run", "--from=published")
    remarks = json.loads((ours / "conversion.json").read_text())["remarks"]
    assert "Arrays of bfloat16 became float32." in remarks
    back = torch.load(convert(ours, tmp_path / "back.pt", "--to=published"), weights_only=True)
    assert_same(back["model"], {name: t.float().numpy() for name, t in weights.items()})


def test_larger_images_interpolate_the_position_table(tmp_path):
    source = save(tmp_path / "published.pt", checkpoint_of("A"))
    larger = [f"--config={CONFIG}", "--config.data.size=16", *SIZES_OF_A]
    ours = convert(source, tmp_path / "run", "--from=published", *larger)
    remarks = json.loads((ours / "conversion.json").read_text())["remarks"]
    assert remarks[1:] == [
        "The position table of 8x8 tokens is interpolated bicubically to the 16x16 of the config."
    ]
    back = torch.load(convert(ours, tmp_path / "back.pt", "--to=published"), weights_only=True)
    expected = dict(published_params("A"))
    table = torch.from_numpy(expected.pop("pos_embed"))
    assert_same({k: v for k, v in back["model"].items() if k != "pos_embed"}, expected)
    # Float32 rounding of theirs: 16 products of values of order 1.
    assert_close_to_max(back["model"]["pos_embed"].numpy(), resized_by_torch(table, 8, 16), 1e-6)


def test_position_tables_of_two_grids_are_refused(tmp_path):
    document = checkpoint_of("A")
    document["model"]["pos_embed"] = torch.zeros(1, 16, 64)
    source = save(tmp_path / "published.pt", document)
    with pytest.raises(UserError, match="have pos_embed for 4x4 and 8x8 tokens"):
        convert(source, tmp_path / "run", "--from=published")


def resized_by_torch(table, side, new_side):
    """A table `[1, side**2, D]` as `[1, new_side**2, D]`."""
    images = table.reshape(1, side, side, -1).permute(0, 3, 1, 2)
    resized = torch.nn.functional.interpolate(
        images, (new_side, new_side), mode="bicubic", align_corners=False
    )
    return resized.flatten(2).mT.numpy()


@pytest.mark.parametrize(("side", "new_side"), [(16, 32), (3, 7), (8, 5), (2, 3), (1, 4)])
def test_tables_are_interpolated_as_torch_does(side, new_side):
    table = np.random.default_rng(0).normal(size=(side**2, 5)).astype(np.float32)
    ours = position_table.interpolate(table, (side, side), (new_side, new_side))
    theirs = resized_by_torch(torch.from_numpy(table)[None], side, new_side)
    # Float32 rounding of theirs: 16 products of values of order 1.
    assert_close_to_max(ours[None], theirs, 1e-6)


def test_frozen_positions_give_way_to_those_of_larger_images(tmp_path):
    source = save(tmp_path / "published.pt", tensors(published_params("B")))
    sizes = [
        f"--config={CONFIG}",
        "--config.model.width=48",
        "--config.model.depth=2",
        "--config.model.num_heads=3",
    ]
    sizes += ["--config.data.num_classes=5", "--config.model.num_condition_tokens=2"]
    sizes += ["--config.data.size=16"]
    ours = convert(source, tmp_path / "run", "--from=published", *sizes)
    assert "token_positions" not in checkpoints.restore_ema(ours)
    same, remark = json.loads((ours / "conversion.json").read_text())["remarks"]
    assert "same, as the file has one" in same
    assert "4x4 tokens is the frozen sin-cos table, and gives way to that of 8x8" in remark
    spoiled = save(tmp_path / "spoiled.pt", tensors(other(published_params("B"))))
    with pytest.raises(UserError, match="differs from the frozen"):
        convert(spoiled, tmp_path / "other", "--from=published", *sizes)
    assert not (tmp_path / "other").exists()


def test_what_does_not_fit_is_listed_and_nothing_is_made(tmp_path):
    document = checkpoint_of("A")
    del document["ema"]["x_proj.bias"]
    document["ema"]["blocks.0.more"] = torch.zeros(1)
    source = save(tmp_path / "published.pt", document)
    with pytest.raises(UserError, match=r"missing x_proj\.bias; extra blocks\.0\.more;"):
        convert(source, tmp_path / "run", "--from=published")
    del document["ema"]["pos_embed"]
    with pytest.raises(UserError, match="lack pos_embed"):
        convert(save(source, document), tmp_path / "run", "--from=published")
    document["ema"]["pos_embed"] = torch.zeros(3)
    with pytest.raises(UserError, match="other dimensions"):
        convert(save(source, document), tmp_path / "run", "--from=published")
    with pytest.raises(UserError, match="has no weights under model or ema, but args, epoch"):
        rest = {"args": document["args"], "epoch": 3}
        convert(save(source, rest), tmp_path / "run", "--from=published")
    assert not (tmp_path / "run").exists()


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("source_format", ["published", "mar", "ldm"])
@pytest.mark.parametrize("is_old_format", [False, True])
def test_malicious_pickle_is_refused_and_creates_nothing(tmp_path, source_format, is_old_format):
    trap, source = tmp_path / "trap", tmp_path / "x.pt"
    document = {"model": tensors(published_params("A")), "args": Malicious(trap)}
    torch.save(document, source, _use_new_zipfile_serialization=not is_old_format)
    with pytest.raises(UserError, match=r"besides arrays \(\w+\.mkdir\).*--allow_pickle"):
        convert(source, tmp_path / "run", f"--from={source_format}")
    source.write_bytes(pickle.dumps(Malicious(trap), protocol=2))
    with pytest.raises(UserError):
        convert(source, tmp_path / "run", f"--from={source_format}")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.pt"]
    # The trap works: whoever opens it by choice springs it.
    torch_files.read(save(source, document), allow_pickle=True)
    assert trap.exists()


def test_other_objects_are_read_by_choice(tmp_path):
    document = checkpoint_of("A") | {"rate": fractions.Fraction(1, 3)}
    source = save(tmp_path / "published.pt", document)
    with pytest.raises(UserError, match=r"fractions\.Fraction"):
        convert(source, tmp_path / "run", "--from=published")
    ours = convert(source, tmp_path / "run", "--from=published", "--allow_pickle")
    assert checkpoints.train_steps(ours) == [0]


def test_objects_of_missing_code_are_named(tmp_path, monkeypatch):
    module = types.ModuleType("lightning_of_old")
    module.Callback = type("Callback", (), {"__module__": module.__name__})
    monkeypatch.setitem(sys.modules, module.__name__, module)
    source = save(tmp_path / "x.pt", checkpoint_of("A") | {"callback": module.Callback()})
    monkeypatch.delitem(sys.modules, module.__name__)
    with pytest.raises(UserError, match=r"not installed .*lightning_of_old"):
        convert(source, tmp_path / "run", "--from=published", "--allow_pickle")


@pytest.mark.parametrize("spoil", [lambda data: data[:-1000], lambda data: b"", lambda data: b"x"])
def test_damaged_files_are_refused(tmp_path, spoil):
    source = save(tmp_path / "published.pt", checkpoint_of("A"))
    source.write_bytes(spoil(source.read_bytes()))
    with pytest.raises(UserError, match=r"published\.pt"):
        convert(source, tmp_path / "run", "--from=published")


@pytest.mark.parametrize(
    ("size", "name"),
    [("l", "CausalFusion-L"), ("xl", "CausalFusion-XL"), ("h48", "CausalFusion-H")],
)
def test_files_of_full_sizes_have_the_published_names_and_shapes(tmp_path, monkeypatch, size, name):
    """The very file but for the values, which are neither made, written nor read."""
    shapes = causal_fusion.published_shapes(golden_data.param_shapes(full_size(size)), (16, 16))
    monkeypatch.setattr(
        torch_files, "_write_aligned", lambda archive, n, _: archive.writestr(n, "")
    )
    zero = np.float32(0)
    arrays = ((("ema", n), np.broadcast_to(zero, shape)) for n, shape in shapes.items())
    torch_files.write(tmp_path / "x.pt", {"ema": torch_files.entries("ema", shapes)}, arrays)
    with torch._subclasses.FakeTensorMode():
        document = torch.load(tmp_path / "x.pt", weights_only=True)
    expected = dict(golden_data.published_shapes()[name])
    assert sum(t.numel() for t in document["ema"].values()) == expected.pop("__total__")
    assert [(n, list(t.shape)) for n, t in document["ema"].items()] == list(expected.items())
    assert all(t.is_contiguous() for t in document["ema"].values())


@pytest.mark.parametrize(
    ("source_format", "section", "prefix"),
    [("mar", "model", ""), ("ldm", "state_dict", "first_stage_model."), ("ldm", "state_dict", "")],
)
def test_autoencoders_to_ours_and_back_bit_for_bit(tmp_path, source_format, section, prefix):
    weights = golden_vae.published_params()
    rest = {"loss.logvar": torch.zeros(()), "cond_stage_model.x": torch.zeros(2)} if prefix else {}
    document = {section: tensors({prefix + n: a for n, a in weights.items()}) | rest}
    document["global_step"] = 3
    source = save(tmp_path / "x.ckpt", document)
    ours = convert(source, tmp_path / "ours", f"--from={source_format}")
    loaded = autoencoder_files.load(ours)
    scale = {"mar": 0.2325, "ldm": 0.18215}[source_format]
    assert loaded.module == golden_vae.module().clone(scale=scale)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, golden_vae.params())
    left_out = json.loads((ours / "conversion.json").read_text())["left_out"]
    assert set(left_out) == set(rest)
    back = convert(ours, tmp_path / "back.ckpt", f"--to={source_format}")
    document = torch.load(back, weights_only=True)
    written = "first_stage_model." if source_format == "ldm" else ""
    assert_same(document[section], {written + name: array for name, array in weights.items()})


def test_autoencoder_without_weights_is_refused(tmp_path):
    source = save(tmp_path / "x.ckpt", {"model": {"epoch": 3}})
    with pytest.raises(UserError, match="no weights in it"):
        convert(source, tmp_path / "ours", "--from=mar")


def test_safetensors_of_their_own_package(tmp_path):
    from safetensors.numpy import load_file, save_file

    folder = tmp_path / "source"
    folder.mkdir()
    arrays = published_autoencoder()
    halves = {name: array.astype(np.float16) for name, array in arrays.items()}
    save_file(halves, folder / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    ours = convert(folder, tmp_path / "ours", "--from=diffusers")
    remarks = json.loads((ours / "conversion.json").read_text())["remarks"]
    assert "Arrays of float16 became float32." in remarks
    back = convert(ours, tmp_path / "back", "--to=diffusers")
    for name, array in load_file(back / "diffusion_pytorch_model.safetensors").items():
        np.testing.assert_array_equal(array, halves[name].astype(np.float32), err_msg=name)
