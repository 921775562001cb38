"""Autoencoders in files of safetensors, to ours and back; no torch is needed."""

import json
import sys

import golden_vae
import jax
import numpy as np
import pytest
from converting import convert

from cfjax import autoencoder_files
from cfjax.convert import autoencoder, autoencoder_kl
from cfjax.convert.report import checksum
from cfjax.errors import UserError
from cfjax.tensor_files import TensorFile, write_tensors


def published(layout="diffusers", module=None, params=None):
    """The golden autoencoder's weights by names of a layout."""
    module = module or golden_vae.module()
    flat = {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params or golden_vae.params())
    }
    names, shapes = autoencoder.published_shapes(module, layout)
    return {
        name: autoencoder_kl.to_published(flat[path], shapes[name]) for path, name in names.items()
    }


def write(folder, arrays, config=None):
    """A folder as of diffusers."""
    folder.mkdir()
    shapes = {name: array.shape for name, array in arrays.items()}
    write_tensors(folder / autoencoder.DIFFUSERS_WEIGHTS, shapes, arrays.items())
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def assert_same_arrays(before, after):
    assert set(before) == set(after)
    for name in before:
        np.testing.assert_array_equal(before[name], after[name], err_msg=name)


CONFIG = {"_class_name": "AutoencoderKL", "scaling_factor": 0.2325, "norm_num_groups": 32}


@pytest.mark.parametrize("layout", ["diffusers", "diffusers_old"])
def test_published_to_ours_and_back_bit_for_bit(tmp_path, layout):
    source = write(tmp_path / "source", published(layout), CONFIG)
    ours = convert(source, tmp_path / "ours", f"--from={layout}")
    loaded = autoencoder_files.load(ours)
    assert loaded.module == golden_vae.module()
    jax.tree.map(np.testing.assert_array_equal, loaded.params, golden_vae.params())
    back = convert(ours, tmp_path / "back", f"--to={layout}")
    before, after = (TensorFile(path / autoencoder.DIFFUSERS_WEIGHTS) for path in (source, back))
    assert_same_arrays(before, after)
    config = json.loads((back / "config.json").read_text())
    assert config["scaling_factor"] == 0.2325
    assert config["down_block_types"] == ["DownEncoderBlock2D"] * 4 + ["AttnDownEncoderBlock2D"]
    assert config["up_block_types"] == ["UpDecoderBlock2D"] * 5


@pytest.mark.parametrize(("source_format", "scale"), [("mar", 0.2325), ("ldm", 0.18215)])
@pytest.mark.parametrize("prefix", ["", "first_stage_model."])
def test_names_of_latent_diffusion(tmp_path, source_format, scale, prefix):
    weights = golden_vae.published_params()
    assert_same_arrays(published("ldm"), weights)
    source = write(tmp_path / "source", {prefix + name: array for name, array in weights.items()})
    file = source / autoencoder.DIFFUSERS_WEIGHTS
    loaded = autoencoder_files.load(convert(file, tmp_path / "ours", f"--from={source_format}"))
    assert loaded.module == golden_vae.module().clone(scale=scale)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, golden_vae.params())


def test_report_lists_names_shapes_and_checksums(tmp_path):
    source = write(tmp_path / "source", published(), CONFIG)
    ours = convert(source, tmp_path / "ours", "--from=diffusers")
    report = json.loads((ours / "conversion.json").read_text())
    shapes = {entry["published"]: tuple(entry["shape"]) for entry in report["names"]}
    assert shapes == {name: array.shape for name, array in published().items()}
    paths = [entry["ours"] for entry in report["names"]]
    assert sorted(paths) == list(autoencoder_files.flat_shapes(golden_vae.module()))
    assert {
        "published": "decoder.up_blocks.0.resnets.0.conv1.bias",
        "shape": [64],
        "ours": "decoder/level4_block0/conv1/bias",
    } in report["names"]
    assert report["source"] == checksum(source) and report["result"] == checksum(ours)
    weights = ours / autoencoder_files.WEIGHTS_FILE
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    assert report["result"] != checksum(ours)


@pytest.mark.parametrize(
    ("config", "arguments", "scale"),
    [
        (None, [], 0.18215),
        ({"_class_name": "Other", "scaling_factor": 3.0}, [], 0.18215),
        (CONFIG, [], 0.2325),
        (CONFIG, ["--scale=0.5"], 0.5),
    ],
)
def test_scale(tmp_path, config, arguments, scale):
    source = write(tmp_path / "source", published(), config)
    ours = convert(source, tmp_path / "ours", "--from=diffusers", *arguments)
    assert autoencoder_files.load(ours).module.scale == scale
    remarks = json.loads((ours / "conversion.json").read_text())["remarks"]
    assert any(f"multiplied by {scale};" in remark for remark in remarks) == (not arguments)


def test_missing_extra_and_misshapen_arrays_are_listed_and_nothing_is_made(tmp_path):
    arrays = published()
    del arrays["encoder.conv_norm_out.bias"]
    arrays["decoder.new"] = np.zeros(3, np.float32)
    arrays["quant_conv.weight"] = np.zeros((32, 16, 1, 1), np.float32)
    source = write(tmp_path / "source", arrays, CONFIG)
    with pytest.raises(UserError) as error:
        convert(source, tmp_path / "ours", "--from=diffusers")
    for words in (
        "missing encoder.conv_norm_out.bias;",
        "extra decoder.new;",
        "quant_conv.weight is (32, 16, 1, 1) but the model's is (32, 32, 1, 1);",
    ):
        assert words in str(error.value)
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        (lambda arrays: arrays, ["--from=mar"], "names of diffusers, not of mar"),
        (lambda arrays: arrays, ["--from=diffuser"], "did you mean 'diffusers'"),
        (lambda arrays: arrays, ["--from=cfjax"], "--to=cfjax needs --config, that of the new run"),
        (lambda arrays: arrays, ["--from=mar", "--to=ldm"], "must have cfjax on one side"),
        (lambda _: {"x": np.zeros(1, np.float32)}, ["--from=diffusers"], "the file has none"),
        (
            lambda arrays: arrays | {"second." + name: array for name, array in arrays.items()},
            ["--from=diffusers"],
            "has several",
        ),
        (
            lambda arrays: {k: v for k, v in arrays.items() if "mid_block" not in k},
            ["--from=diffusers"],
            "not those of a KL autoencoder",
        ),
        (
            lambda arrays: {k: v for k, v in arrays.items() if "post_quant" not in k},
            ["--from=diffusers"],
            "lack post_quant_conv.weight",
        ),
        (
            lambda arrays: {k: v for k, v in arrays.items() if "down_blocks" not in k},
            ["--from=diffusers"],
            "lack a level",
        ),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, change, arguments, message):
    source = write(tmp_path / "source", change(published()), CONFIG)
    with pytest.raises(UserError, match=message):
        convert(source, tmp_path / "ours", *arguments)
    assert not (tmp_path / "ours").exists()


def test_places_are_checked(tmp_path):
    source = write(tmp_path / "source", published(), CONFIG | {"shift_factor": 0.1})
    with pytest.raises(UserError, match=r"shift_factor of 0\.1"):
        convert(source, tmp_path / "ours", "--from=diffusers")
    (source / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json is not JSON"):
        convert(source, tmp_path / "ours", "--from=diffusers")
    with pytest.raises(UserError, match="there already"):
        convert(source, source, "--from=diffusers")
    with pytest.raises(UserError, match="there is no"):
        convert(tmp_path / "nothing", tmp_path / "ours", "--from=diffusers")
    with pytest.raises(UserError, match=r"--out=gs://bucket/x must be on disk"):
        convert(source, "gs://bucket/x", "--from=diffusers")
    with pytest.raises(UserError, match="there is no autoencoder"):
        convert(source.parent, tmp_path / "back", "--to=diffusers")


def test_files_of_torch_need_torch(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / "kl16.ckpt").touch()
    with pytest.raises(UserError, match=r"need the package torch; install"):
        convert(tmp_path / "kl16.ckpt", tmp_path / "ours", "--from=mar")


def test_a_prefix_is_found_and_the_rest_left_out_and_named(tmp_path):
    arrays = {"vae." + name: array for name, array in published().items()}
    arrays |= {"unet.x": np.zeros(1, np.float32), "vae.loss.logvar": np.zeros(1, np.float32)}
    ours = convert(write(tmp_path / "source", arrays), tmp_path / "ours", "--from=diffusers")
    jax.tree.map(
        np.testing.assert_array_equal, autoencoder_files.load(ours).params, golden_vae.params()
    )
    left_out = json.loads((ours / "conversion.json").read_text())["left_out"]
    assert left_out == {
        "unet.x": "they don't begin with vae.",
        "vae.loss.logvar": "they belong to the loss that trained the autoencoder",
    }
