"""Images to score are read batch by batch; other layouts are refused by name."""

import numpy as np
import pytest
import tiny_features

from cfjax.data import image_sets
from cfjax.data.image_files import write_npz, write_png
from cfjax.errors import UserError

IMAGES = tiny_features.images(7, channels=3)


@pytest.fixture(params=["npz", "compressed", "folder"])
def place(request, tmp_path):
    if request.param == "folder":
        for index, image in enumerate(IMAGES):
            write_png(tmp_path / f"{index}.png", image)
        return tmp_path
    save = np.savez if request.param == "npz" else np.savez_compressed
    save(tmp_path / "samples.npz", arr_0=IMAGES, labels=np.arange(7))
    return tmp_path / "samples.npz"


@pytest.mark.parametrize(("first", "batch_size"), [(0, 3), (0, 7), (0, 100), (4, 2), (6, 1)])
def test_batches_are_the_images_from_the_first_on(place, first, batch_size):
    opened = image_sets.open_images(place)
    assert (opened.count, opened.image_shape) == (7, (8, 8, 3))
    batches = list(opened.read(first, batch_size))
    assert [len(batch) for batch in batches[:-1]] == [batch_size] * (len(batches) - 1)
    np.testing.assert_array_equal(np.concatenate(batches), IMAGES[first:])


def test_labels_are_read(tmp_path):
    write_npz(tmp_path / "samples.npz", IMAGES, np.arange(7))
    np.testing.assert_array_equal(
        image_sets.open_images(tmp_path / "samples.npz").labels, np.arange(7)
    )
    np.savez(tmp_path / "bare.npz", arr_0=IMAGES)
    assert image_sets.open_images(tmp_path / "bare.npz").labels is None


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"images": IMAGES}, "has no array 'arr_0'"),
        (
            {"arr_0": IMAGES / np.float32(255)},
            r"'arr_0' of float32 .* multiply images in \[-1, 1\]",
        ),
        ({"arr_0": IMAGES.astype(np.int32)}, "'arr_0' of int32 .* cast it"),
        ({"arr_0": IMAGES.transpose(0, 3, 1, 2)}, r"looks like \[N, C, H, W\]: transpose it"),
        ({"arr_0": IMAGES[..., :2]}, "with 1 or 3 channels"),
        ({"arr_0": IMAGES[0]}, r"must be uint8 \[N, H, W, C\]"),
        ({"arr_0": IMAGES[:0]}, r"must be uint8 \[N, H, W, C\]"),
        ({"arr_0": np.asfortranarray(IMAGES)}, "in Fortran order"),
        ({"arr_0": IMAGES, "labels": np.arange(3)}, r"7 images but labels of shape \(3,\)"),
    ],
)
def test_other_layouts_are_refused(arrays, words, tmp_path):
    np.savez(tmp_path / "odd.npz", **arrays)
    with pytest.raises(UserError, match=words):
        image_sets.open_images(tmp_path / "odd.npz")


def test_what_is_missing_or_damaged_is_refused(tmp_path):
    with pytest.raises(UserError, match="there are no samples at"):
        image_sets.open_images(tmp_path / "nowhere.npz")
    (tmp_path / "no.npz").write_bytes(b"PK" * 100)
    with pytest.raises(UserError, match=r"no\.npz can't be read as \.npz"):
        image_sets.open_images(tmp_path / "no.npz")
    write_npz(tmp_path / "samples.npz", IMAGES, np.arange(7))
    content = bytearray((tmp_path / "samples.npz").read_bytes())
    content[len(content) // 2] ^= 0xFF
    (tmp_path / "flipped.npz").write_bytes(content)
    with pytest.raises(UserError, match=r"flipped\.npz can't be read as \.npz"):
        list(image_sets.open_images(tmp_path / "flipped.npz").read(0, 7))


def test_a_corrupt_image_and_one_of_another_size_are_named(tmp_path):
    for index, image in enumerate(IMAGES):
        write_png(tmp_path / f"{index}.png", image)
    (tmp_path / "5.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"5\.png is no image"):
        list(image_sets.open_images(tmp_path).read(0, 3))
    write_png(tmp_path / "5.png", IMAGES[5, :4])
    with pytest.raises(UserError, match=r"5\.png is \(4, 8, 3\), but 0\.png is \(8, 8, 3\)"):
        list(image_sets.open_images(tmp_path).read(0, 3))
