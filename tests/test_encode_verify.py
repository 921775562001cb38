"""Reading encoded images back, and how near their reconstructions are."""

import logging as python_logging
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_encoding
from PIL import Image
from tiny_encoding import CHANNELS, CLASSES, IMAGE_SIZE, SIZE, run

from cfjax import autoencoder_files
from cfjax.data.images import to_model_range, to_uint8
from cfjax.data.latents import LatentsSource
from cfjax.data.sources import open_dataset
from cfjax.encode_verify import verify
from cfjax.errors import UserError


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("some") / "pictures"
    tiny_encoding.make_pictures(folder)
    return folder


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    folder, _ = tiny_encoding.save_autoencoder(tmp_path_factory.mktemp("vae"))
    return folder


def test_verification_compares_reconstructions(pictures, vae, tmp_path, caplog):
    with caplog.at_level(python_logging.INFO, logger="absl"):
        run(pictures, vae, tmp_path, splits=["train"], num_verified=5)
    values = {"size": IMAGE_SIZE, "channels": 3, "num_classes": len(CLASSES)}
    source = open_dataset(f"image_folder:{pictures}", "train", **values)
    latents = LatentsSource(tmp_path, "train", SIZE, CHANNELS)
    chosen = np.linspace(0, len(source) - 1, 5).astype(int)
    images, found = source.examples_at(chosen)["image"], latents.examples_at(chosen)
    means = found["moments"].astype(np.float32)[..., :CHANNELS]
    decoded = [np.asarray(tiny_encoding.apply(means[:, flip], "decode")) for flip in (0, 1)]
    pairs = []
    for of_flip, originals in zip(decoded, (images, images[:, :, ::-1]), strict=True):
        error = np.clip(of_flip, -1, 1) - to_model_range(originals)
        pairs.append(10 * np.log10(4 / np.square(error).mean(axis=(1, 2, 3))))
    autoencoder = autoencoder_files.load(vae)
    verified = verify(tmp_path / "train", source, autoencoder, 5)
    # In batches of other sizes sums may run in another order.
    np.testing.assert_allclose(verified.psnr, np.stack(pairs, axis=1), atol=1e-3)
    mean, lowest = verified.psnr.mean(), verified.psnr.min()
    assert f"{mean:.2f} dB on average and {lowest:.2f} dB at least" in caplog.text
    assert "checksums verified" in caplog.text
    picture = np.asarray(Image.open(tmp_path / "train_reconstructions.png"))
    cell = IMAGE_SIZE + 4
    assert picture.shape == (2 * cell, 8 * cell, 3)
    for number, (row, column) in enumerate([(0, 0), (0, 2), (0, 4), (0, 6), (1, 0)]):
        tiles = [
            picture[row * cell + 2 :, (column + i) * cell + 2 :][:IMAGE_SIZE, :IMAGE_SIZE]
            for i in (0, 1)
        ]
        np.testing.assert_array_equal(tiles[0], images[number])
        assert np.abs(tiles[1].astype(int) - to_uint8(decoded[0][number])).max() <= 1

    everything = verify(tmp_path / "train", source, autoencoder, 10_000)
    assert len(everything.psnr) == len(source)
    relabelled = SimpleNamespace(
        image_shape=source.image_shape,
        examples_at=lambda indices: source.examples_at(indices) | {"label": np.full(5, 2)},
    )
    with pytest.raises(UserError, match=r"image 0 in .*train has another label than the image"):
        verify(tmp_path / "train", relabelled, autoencoder, 5)
    shard = tmp_path / "train" / "moments-00000-of-00004.array_record"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(UserError, match=r"moments-00000-of-00004.array_record of .* or changed"):
        run(pictures, vae, tmp_path, splits=["train"], num_verified=5)
