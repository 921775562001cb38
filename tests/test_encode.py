"""Encoding once: what is in the records, what is refused, skipped and verified."""

import contextlib

import jax
import ml_dtypes
import numpy as np
import pytest
import tiny
import tiny_encoding
from golden_data import assert_close_to_max
from tiny_encoding import CHANNELS, CLASSES, IMAGE_SIZE, SIZE, contents, run

from cfjax import autoencoder_files
from cfjax.config_loading import load_config
from cfjax.data import latent_shards
from cfjax.data.images import to_model_range
from cfjax.data.latents import LatentsSource, check_autoencoder
from cfjax.data.record_shards import ShardWriter
from cfjax.data.sources import all_images, open_dataset, open_source
from cfjax.encode import encode
from cfjax.errors import UserError

SPLITS = ("train", "held_out")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("some") / "pictures"
    tiny_encoding.make_pictures(folder)
    return folder


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    folder, _ = tiny_encoding.save_autoencoder(tmp_path_factory.mktemp("vae"))
    return folder


def images_of(dataset, split="train"):
    values = {"size": IMAGE_SIZE, "channels": 3, "num_classes": len(CLASSES)}
    return all_images(open_dataset(dataset, split, **values))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_records_are_what_the_autoencoder_gives(pictures, vae, tmp_path, dtype):
    manifests = run(pictures, vae, tmp_path, dtype=dtype)
    for split in SPLITS:
        images, labels = images_of(f"image_folder:{pictures}", split)
        assert manifests[split]["num_records"] == len(images)
        assert len(manifests[split]["shards"]) == -(-len(images) // 10)
        latents = LatentsSource(tmp_path, split, SIZE, CHANNELS)
        examples = latents.examples_at(range(len(latents)))
        np.testing.assert_array_equal(examples["label"], labels)
        np.testing.assert_array_equal(examples["source_id"], np.arange(len(images)))
        assert examples["moments"].dtype.name == dtype
        moments = examples["moments"].astype(np.float32)
        for flip, pixels in enumerate((images, images[:, :, ::-1])):
            expected = tiny_encoding.apply(to_model_range(pixels), "encode_parameters")
            if dtype == "bfloat16":
                # Half a unit in the last of 8 places; near a tie the other neighbour.
                np.testing.assert_allclose(moments[:, flip], expected, rtol=2**-8, atol=1e-5)
            else:
                # In batches of other sizes sums may run in another order.
                assert_close_to_max(moments[:, flip], expected, 1e-6)
        # The mirror image's moments are not the mirrored moments.
        assert np.abs(moments[:, 1] - moments[:, 0, :, ::-1]).max() > 0.1
        assert np.abs(moments[..., CHANNELS:]).max() > 1


def test_bytes_do_not_depend_on_the_devices(pictures, vae, tmp_path, monkeypatch):
    devices = jax.local_devices()
    for count in (8, 3, 1):
        monkeypatch.setattr(jax, "local_devices", lambda count=count: devices[:count])
        run(pictures, vae, tmp_path / str(count))
    expected = contents(tmp_path / "8")
    assert len(expected) == 2 * 2 + 2 * (4 + 1)
    assert contents(tmp_path / "3") == expected
    assert contents(tmp_path / "1") == expected


class Bar(contextlib.nullcontext):
    """Stands for a progress bar."""

    def __init__(self, values):
        super().__init__(self)
        self.values, self.done = values, 0

    def update(self, count):
        self.done += count


def test_only_what_is_missing_is_made_again(pictures, vae, tmp_path, monkeypatch):
    run(pictures, vae, tmp_path)
    expected = contents(tmp_path)
    (tmp_path / "train" / "moments-00001-of-00004.array_record").unlink()
    kept = tmp_path / "train" / "moments-00002-of-00004.array_record"
    before = kept.stat().st_mtime_ns
    write, written = ShardWriter.write, []

    def remember(writer, shard, *args):
        written.append((writer.folder.name, shard))
        write(writer, shard, *args)

    def new_bar(**values):
        bars.append(Bar(values))
        return bars[-1]

    bars = []
    monkeypatch.setattr(ShardWriter, "write", remember)
    monkeypatch.setattr(latent_shards, "tqdm", new_bar)
    run(pictures, vae, tmp_path)
    assert written == [("train", 1)]
    num_train = len(LatentsSource(tmp_path, "train", SIZE, CHANNELS))
    num_held_out = 3 * 14 - num_train
    counts = [(bar.values["total"], bar.values["initial"], bar.done) for bar in bars]
    assert counts == [(num_train, num_train - 10, 10), (num_held_out, num_held_out, 0)]
    assert kept.stat().st_mtime_ns == before
    assert contents(tmp_path) == expected


def test_training_reads_them_and_knows_their_autoencoder(pictures, vae, tmp_path):
    run(pictures, vae, tmp_path)
    values = {"size": SIZE, "channels": CHANNELS}
    source = open_source("latents", str(tmp_path), "train", num_classes=3, **values)
    assert isinstance(source, LatentsSource) and source.class_names == CLASSES
    with pytest.raises(UserError, match=r"data.num_classes is 4, but the data have 3 classes"):
        open_source("latents", str(tmp_path), "train", num_classes=4, **values)
    checksum = autoencoder_files.load(vae).checksum
    check_autoencoder(source, checksum, 0.5)
    with pytest.raises(UserError, match=rf"sha256 {checksum}, but that of autoencoder.path has 00"):
        check_autoencoder(source, "00", 0.5)
    with pytest.raises(UserError, match=r"encoded for the scale 0.5, but that of .* is 0.2; conv"):
        check_autoencoder(source, checksum, 0.2)


def test_the_manifest_says_what_fixed_the_bytes(pictures, vae, tmp_path):
    manifests = run(pictures, vae, tmp_path)
    (tmp_path / "moved").mkdir()
    moved = pictures.rename(tmp_path / "moved" / "pictures")
    assert run(moved, vae, tmp_path) == manifests  # where the images lie doesn't matter
    moved.rename(pictures)
    description = manifests["train"]["description"]
    assert len(description.pop("source_sha256")) == 64
    assert description == {
        "dataset": "image_folder",
        "split": "train",
        "autoencoder_sha256": autoencoder_files.load(vae).checksum,
        "autoencoder_dtype": "float32",
        "scale": 0.5,
        "size": SIZE,
        "channels": CHANNELS,
        "dtype": "bfloat16",
        "crop": "adm",
        "image_size": IMAGE_SIZE,
        "image_channels": 3,
        "batch_size": 3,
        "class_names": list(CLASSES),
        "num_images": manifests["train"]["num_records"],
        "examples_per_shard": 10,
    }


@pytest.mark.parametrize(
    ("overrides", "options", "words"),
    [
        ({}, {"dtype": "float32"}, "made with dtype 'bfloat16', not 'float32'"),
        ({}, {"images_per_device": 4}, "made with batch_size 3, not 4"),
        ({}, {"examples_per_shard": 11}, "made with examples_per_shard 10, not 11"),
        ({"data__size": 4}, {}, "made with size 8, not 4"),
        ({"autoencoder__dtype": "bfloat16"}, {}, "made with autoencoder_dtype 'float32', not 'bf"),
        (
            {"data__channels": 16},
            {},
            "data.channels is 16, but the autoencoder in .* of 4 channels",
        ),
        ({"data__num_classes": 2}, {}, "data.num_classes is 2, but the data have 3 classes"),
        ({"autoencoder__scale": 0.18}, {}, "autoencoder.scale is 0.18, but that of .* is 0.5; set"),
        ({"autoencoder__dtype": "float16"}, {}, "unknown autoencoder.dtype 'float16'"),
        ({"data__on_corrupt": "ignore"}, {}, "unknown data.on_corrupt 'ignore'"),
        ({"data__num_threads": -1}, {"out": "new"}, "data.num_threads must be at least 0, got -1"),
        ({}, {"vae": ""}, "no autoencoder is named; pass its folder by --vae or autoencoder.path"),
        ({}, {"vae": "nowhere"}, "there is no autoencoder in nowhere"),
        ({}, {"dataset": "mnist"}, r"'mnist' can't be read as images of 16x16x3: data"),
        (
            {},
            {"dataset": "latents:x"},
            r"the dataset 'latents:x' is not understood; pass mnist, im",
        ),
        ({}, {"dtype": "int8"}, "unknown dtype of moments 'int8'"),
        ({}, {"out": "gs://bucket/latents"}, "shards can't be written to gs://bucket/latents"),
    ],
)
def test_what_does_not_fit_is_refused(pictures, vae, encoded, tmp_path, overrides, options, words):
    options = {"vae": vae, "out": encoded} | options
    options["out"] = tmp_path / "new" if options["out"] == "new" else options["out"]
    before = contents(encoded)
    with pytest.raises(UserError, match=words):
        run(pictures, overrides=overrides, **options)
    assert contents(encoded) == before


@pytest.fixture(scope="module")
def encoded(pictures, vae, tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoded")
    run(pictures, vae, folder)
    return folder


def test_another_autoencoder_or_other_images_are_refused(pictures, vae, encoded, tmp_path):
    changed = jax.tree.map(lambda x: x + 1, tiny_encoding.params())
    autoencoder_files.save(tmp_path / "other", tiny_encoding.MODULE, changed)
    with pytest.raises(UserError, match="made with autoencoder_sha256 '"):
        run(pictures, str(tmp_path / "other"), encoded)
    tiny_encoding.make_pictures(tmp_path / "more", per_class=15)
    with pytest.raises(UserError, match=r"made with num_images \d+, not \d+"):
        run(tmp_path / "more", vae, encoded)
    tiny_encoding.make_pictures(tmp_path / "changed")
    for path in (tmp_path / "changed").rglob("*.png"):
        path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(UserError, match="made with source_sha256 '"):
        run(tmp_path / "changed", vae, encoded)


def test_a_config_that_sees_pixels_is_refused(pictures, vae, tmp_path):
    with pytest.raises(
        UserError, match=r"the config sees pixels of data.name 'mnist'; pass one of"
    ):
        encode(tiny.config(), f"image_folder:{pictures}", str(tmp_path), vae=vae)
    # With the autoencoder in the loop of training, it sees latents too.
    path = f"{tiny.CONFIGS / 'imagenet256.py'}:l"
    changes = {"data.name": "array_record", "autoencoder.path": vae}
    with pytest.raises(UserError, match=r"data.channels is 16, but"):
        encode(load_config(path, changes), f"image_folder:{pictures}", str(tmp_path))


def test_moments_that_are_not_finite_are_refused(pictures, tmp_path):
    broken = jax.tree.map(np.copy, tiny_encoding.params())
    broken["quant_conv"]["bias"][-1] = np.nan
    autoencoder_files.save(tmp_path / "vae", tiny_encoding.MODULE, broken)
    with pytest.raises(UserError, match=r"the moments of image 0 are not finite; convert the auto"):
        run(pictures, str(tmp_path / "vae"), tmp_path / "out")
    assert not list(tmp_path.glob("out/*/*.array_record"))


def test_bfloat16_is_rounded_to_the_nearest(pictures, vae, tmp_path):
    for dtype in ("float32", "bfloat16"):
        run(pictures, vae, tmp_path / dtype, splits=["held_out"], dtype=dtype)
    exact, rounded = (
        LatentsSource(tmp_path / dtype, "held_out", SIZE, CHANNELS).examples_at([0, 1])["moments"]
        for dtype in ("float32", "bfloat16")
    )
    np.testing.assert_array_equal(exact.astype(ml_dtypes.bfloat16), rounded)


@pytest.mark.long
def test_grey_digits(tmp_path):
    module = tiny_encoding.MODULE.clone(image_channels=1)
    params = module.init(jax.random.key(0), np.zeros((1, 4, 4, 1)))["params"]
    autoencoder_files.save(tmp_path / "vae", module, params)
    manifest = run(
        *(None, str(tmp_path / "vae"), tmp_path / "out", "mnist"),
        overrides={"data__size": 14, "data__num_classes": 10},
        splits=["held_out"],
        examples_per_shard=1000,
        images_per_device=25,
        num_verified=1,
    )["held_out"]
    assert manifest["num_records"] == 1000 and manifest["description"]["dataset"] == "mnist"
    latents = LatentsSource(tmp_path / "out", "held_out", 14, CHANNELS)
    _, labels = all_images(
        open_source("mnist", "", "held_out", size=28, channels=1, num_classes=10)
    )
    np.testing.assert_array_equal(latents.examples_at(range(1000))["label"], labels)
