"""Ranges, the centre-crop, and image files."""

import numpy as np
import pytest
from golden_data import load
from PIL import Image

from cfjax.data import image_files
from cfjax.data.images import center_crop, to_model_range, to_uint8
from cfjax.errors import UserError


@pytest.mark.parametrize("i", range(4))
def test_the_centre_crop_is_the_published_one(i):
    golden = load("helpers")
    image = Image.fromarray(golden[f"crop/{i}/image_hwc"])
    cropped = center_crop(image, int(golden[f"crop/{i}/size"]))
    np.testing.assert_array_equal(cropped, golden[f"crop/{i}/out_hwc"])


def test_to_uint8_is_the_published_one():
    golden = load("helpers")
    ours = to_uint8(golden["denorm/x_nchw"].transpose(0, 2, 3, 1))
    np.testing.assert_array_equal(ours, golden["denorm/uint8_nhwc"])


def test_every_grey_level_returns():
    levels = np.arange(256, dtype=np.uint8)
    in_range = to_model_range(levels)
    assert in_range.dtype == np.float32
    assert (in_range[0], in_range[-1]) == (-1.0, 1.0)
    # Truncation of 127.5 x + 128 adds half a level, so that rounding can't lose one.
    np.testing.assert_array_equal(to_uint8(in_range), levels)


@pytest.mark.parametrize("channels", [1, 3])
def test_files_return_what_was_written(channels, tmp_path):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (3, 5, 7, channels), dtype=np.uint8)
    folder = tmp_path / "with space"
    folder.mkdir()
    for i, image in enumerate(images):
        image_files.write_png(folder / f"{i}.png", image)
    again, labels = image_files.read_images(folder)
    np.testing.assert_array_equal(again, images)
    assert labels is None
    image_files.write_npz(tmp_path / "samples.npz", images, np.arange(3, dtype=np.int32))
    again, labels = image_files.read_images(tmp_path / "samples.npz")
    np.testing.assert_array_equal(again, images)
    np.testing.assert_array_equal(labels, np.arange(3))


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "samples.npz"
    image_files.write_npz(path, np.zeros((1, 2, 2, 1), np.uint8), np.zeros(1, np.int32))
    before = path.read_bytes()

    def fail(file, **_):
        file.write(b"half")
        raise OSError("no space")

    monkeypatch.setattr(np, "savez", fail)
    with pytest.raises(UserError, match=r"samples.npz can't be written: no space\."):
        image_files.write_npz(path, np.ones((1, 2, 2, 1), np.uint8), np.zeros(1, np.int32))
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["samples.npz"]
    with pytest.raises(UserError, match=r"a.png can't be written: No such file"):
        image_files.write_png(tmp_path / "nowhere" / "a.png", np.zeros((2, 2, 1), np.uint8))


def test_a_folder_is_read_in_the_order_of_names_without_what_is_hidden(tmp_path):
    for i in (2, 0, 1):
        image_files.write_png(tmp_path / f"{i}.png", np.full((4, 4, 3), i, np.uint8))
    (tmp_path / "._0.png").write_bytes(b"what a Mac leaves beside a file")
    (tmp_path / "notes.txt").write_text("")
    images, _ = image_files.read_images(tmp_path)
    np.testing.assert_array_equal(images[:, 0, 0, 0], [0, 1, 2])


def test_what_is_no_images_is_refused(tmp_path):
    empty, mixed, broken = (tmp_path / name for name in ("empty", "mixed", "broken"))
    for folder in (empty, mixed, broken):
        folder.mkdir()
    for i, size in enumerate((4, 5)):
        image_files.write_png(mixed / f"{i}.png", np.zeros((size, 4, 1), np.uint8))
    (broken / "a.png").write_bytes(b"no picture")
    with (tmp_path / "array.npz").open("wb") as file:
        np.save(file, np.zeros((2, 4, 4, 1), np.uint8))
    np.savez(tmp_path / "floats.npz", arr_0=np.zeros((2, 4, 4, 1)))
    np.savez(tmp_path / "other.npz", images=np.zeros((2, 4, 4, 1), np.uint8))
    np.savez(tmp_path / "odd.npz", arr_0=np.zeros((2, 4, 4, 1), np.uint8), labels=np.zeros(3))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "odd.npz").read_bytes()[:100])
    for name, words in {
        "nowhere": "there are no samples at .*nowhere",
        "empty": "empty has no images",
        "mixed": r"1.png is \(5, 4, 1\), but 0.png is \(4, 4, 1\)",
        "broken": "the image .*a.png is no image; remove or mend it",
        "floats.npz": "must hold uint8 images",
        "other.npz": "must hold uint8 images",
        "odd.npz": r"2 images but labels of shape \(3,\)",
        "cut.npz": "cut.npz can't be read as .npz",
        "array.npz": "array.npz can't be read as .npz",
    }.items():
        with pytest.raises(UserError, match=words) as error:
            image_files.read_images(tmp_path / name)
        assert "\n" not in str(error.value)


def test_sixteen_bits_keep_their_range(tmp_path):
    ramp = np.linspace(0, 0xFFFF, 400).reshape(20, 20)
    Image.fromarray(ramp.astype(np.uint16)).save(tmp_path / "16.png")
    Image.fromarray(ramp.astype(np.int32)).save(tmp_path / "32.tif")
    for name in ("16.png", "32.tif"):
        for channels, mode in ((None, "L"), (1, "L"), (3, "RGB")):
            image = image_files.read_image(tmp_path / name, channels)
            assert image.mode == mode
            np.testing.assert_array_equal(image.convert("L"), ramp.astype(int) >> 8)
    Image.fromarray((ramp / 0xFFFF).astype(np.float32)).save(tmp_path / "float.tif")
    Image.fromarray(np.full((4, 4), 1 << 20, np.int32)).save(tmp_path / "deep.tif")
    for name in ("float.tif", "deep.tif"):
        with pytest.raises(UserError, match=f"{name} can't be decoded"):
            image_files.read_image(tmp_path / name)


@pytest.mark.parametrize("only_check", [False, True])
@pytest.mark.parametrize("form", ["jpeg", "png"])
def test_a_cut_file_is_found(form, only_check, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (200, 300, 3), dtype=np.uint8)
    path = tmp_path / f"picture.{form}"
    Image.fromarray(pixels).save(path)
    image_files.read_image(path, 3, only_check)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 9 // 10])
    with pytest.raises(UserError, match=r"picture.* can't be decoded; remove or mend it"):
        image_files.read_image(path, 3, only_check)
