"""Encoding what is damaged: refused and named, or left out, named and counted."""

import numpy as np
import pytest
import tiny_encoding
from tiny_encoding import CHANNELS, SIZE, contents, run

from cfjax.data.images import to_model_range
from cfjax.data.latents import LatentsSource
from cfjax.errors import UserError


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    folder, _ = tiny_encoding.save_autoencoder(tmp_path_factory.mktemp("vae"))
    return folder


def corrupt(path, content):
    """Flips a bit within a record of a shard."""
    whole = bytearray(path.read_bytes())
    whole[whole.find(content) + 50] ^= 1
    path.write_bytes(whole)


def test_broken_images_are_refused_and_the_other_shards_kept(vae, tmp_path):
    writer = tiny_encoding.make_records(tmp_path / "images")
    corrupt(writer.path(3), tiny_encoding.file_bytes(tiny_encoding.picture(20), "PNG"))
    options = {"dataset": f"array_record:{tmp_path / 'images'}", "splits": ["train"]}
    words = (
        r"^4 images can't be encoded \(the image cut.jpg can't be decoded, the image empty.png has zero"
        r" bytes, the image text.png is no image, record 2 of the shard .*images-00003-of-00004.* is"
        r" corrupt\); mend or remove them, or set data.on_corrupt=skip\.$"
    )
    with pytest.raises(UserError, match=words):
        run(None, vae, tmp_path / "out", examples_per_shard=6, **options)
    kept = sorted(path.name for path in tmp_path.glob("out/train/*.array_record"))
    assert kept == [f"moments-0000{shard}-of-00004.array_record" for shard in (0, 2)]
    before = contents(tmp_path / "out")
    manifest = run(
        *(None, vae, tmp_path / "out"),
        examples_per_shard=6,
        overrides={"data__on_corrupt": "skip"},
        **options,
    )["train"]
    assert before.items() <= contents(tmp_path / "out").items()
    assert (manifest["num_records"], manifest["num_skipped"]) == (20, 4)
    mend = "remove or mend it."
    corrupted = f"record 2 of the shard {writer.path(3)} is corrupt; delete it and run"
    assert manifest["skipped"] == [
        {"name": "image 9", "reason": f"the image cut.jpg can't be decoded; {mend}"},
        {"name": "image 10", "reason": f"the image empty.png has zero bytes; {mend}"},
        {"name": "image 11", "reason": f"the image text.png is no image; {mend}"},
        {"name": "image 20", "reason": f"{corrupted} cfjax.prepare_images again."},
    ]
    # None is replaced by a neighbour, and those beside it are as if it were sound.
    examples = LatentsSource(tmp_path / "out", "train", SIZE, CHANNELS).examples_at(range(20))
    ids = [i for i in range(24) if i not in (9, 10, 11, 20)]
    np.testing.assert_array_equal(examples["source_id"], ids)
    by_id = dict(zip(ids, examples["moments"].astype(np.float32), strict=True))
    sound = [i for i in ids if i // 6 != 1]
    pixels = np.stack([to_model_range(tiny_encoding.crop(i)) for i in sound])
    expected = tiny_encoding.apply(pixels, "encode_parameters")
    found = np.stack([by_id[i][0] for i in sound])
    np.testing.assert_allclose(found, expected, rtol=2**-8, atol=1e-5)


def test_damaged_shards_of_the_images_are_refused_or_named(vae, tmp_path):
    writer = tiny_encoding.make_records(tmp_path / "images")
    writer.path(0).unlink()
    writer.path(1).write_bytes(writer.path(1).read_bytes()[:-1000])
    options = {"dataset": f"array_record:{tmp_path / 'images'}", "splits": ["train"]}
    words = r"the shard .*images-00000.* is missing, the shard .*00001.* has \d+ bytes instead of"
    with pytest.raises(UserError, match=words):
        run(None, vae, tmp_path / "out", **options)
    manifest = run(None, vae, tmp_path / "out", overrides={"data__on_corrupt": "skip"}, **options)[
        "train"
    ]
    assert (manifest["num_records"], manifest["num_skipped"]) == (12, 2)
    names = [f"images-0000{shard}-of-00004.array_record" for shard in (0, 1)]
    assert [it["name"] for it in manifest["skipped"]] == names
    assert "00000-of-00004.array_record is missing; delete it" in manifest["skipped"][0]["reason"]
    tiny_encoding.make_records(tmp_path / "images")
    with pytest.raises(UserError, match="made with num_images 12, not 24"):
        run(None, vae, tmp_path / "out", overrides={"data__on_corrupt": "skip"}, **options)


def test_broken_files_of_a_folder_are_named_once(vae, tmp_path):
    tiny_encoding.make_pictures(tmp_path / "images")
    for name, content in tiny_encoding.odd_images().items():
        (tmp_path / "images" / "dog" / name).write_bytes(content)
    with pytest.raises(
        UserError, match=r"3 image files \(.*cut.jpg, .*empty.png, .*text.png\) can"
    ):
        run(tmp_path / "images", vae, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    skip = {"data__on_corrupt": "skip"}
    manifests = run(tmp_path / "images", vae, tmp_path / "out", overrides=skip)
    assert sum(manifest["num_records"] for manifest in manifests.values()) == 3 * 14 + 3
    named = [it["name"] for it in manifests["train"]["skipped"]]
    assert named == ["dog/cut.jpg", "dog/empty.png", "dog/text.png"]
    assert not manifests["held_out"]["skipped"]


def test_a_set_without_held_out_images(vae, tmp_path):
    tiny_encoding.make_records(tmp_path / "images")
    with pytest.raises(UserError, match=r"there is no folder .*images/held_out"):
        run(None, vae, tmp_path / "out", dataset=f"array_record:{tmp_path / 'images'}")
