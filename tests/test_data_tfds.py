"""Sets of TFDS: prepared and read without TensorFlow."""

import io
import json
import sys

import numpy as np
import pytest
from PIL import Image

from cfjax.data import sources
from cfjax.data.images import center_crop
from cfjax.data.sources import open_dataset, open_source
from cfjax.data.tfds_images import TfdsSource
from cfjax.errors import UserError

COUNTS = {"train": 20, "validation": 6}


def picture(split, index):
    pixels = np.random.default_rng([len(split), index]).integers(0, 256, (20, 30, 3), np.uint8)
    return Image.fromarray(pixels)


def encoded(split, index):
    content = io.BytesIO()
    picture(split, index).save(content, "PNG")
    content.seek(0)
    return content


def build(folder, counts=COUNTS, features=None, file_format="array_record"):
    """Prepares a tiny set by TFDS's own writer; the name of its folder is `tiny_set`."""
    import tensorflow_datasets as tfds

    features = features or {
        "image": tfds.features.Image(encoding_format="png"),
        "label": tfds.features.ClassLabel(names=["cat", "dog", "owl"]),
        "file_name": tfds.features.Text(),
    }

    class TinySet(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, _):
            return {split: self._generate_examples(split) for split in counts}

        def _generate_examples(self, split):
            for i in range(counts[split]):
                values = {"image": encoded(split, i), "label": i % 3, "file_name": f"{i}.png"}
                yield i, {name: values[name.split("2")[0]] for name in features}

    builder = TinySet(data_dir=str(folder), file_format=file_format)
    builder.download_and_prepare()
    return folder / "tiny_set" / "1.0.0"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("a tfds")
    build(folder)
    return folder


def test_images_are_those_that_were_prepared(prepared):
    for split, tfds_split in (("train", "train"), ("held_out", "validation")):
        source = TfdsSource("tiny_set", prepared, split, 16, 3)
        assert source.class_names == ("cat", "dog", "owl")
        assert source.image_shape == (16, 16, 3)
        images, labels = sources.all_images(source)
        assert (images.dtype, labels.dtype) == (np.uint8, np.int32)
        expected = {
            center_crop(picture(tfds_split, i), 16).tobytes(): i % 3
            for i in range(COUNTS[tfds_split])
        }
        found = {image.tobytes(): label for image, label in zip(images, labels, strict=True)}
        assert found == expected
    grey = open_source(
        "tfds",
        str(prepared),
        "train",
        size=8,
        channels=1,
        num_classes=3,
        tfds_name="tiny_set:1.0.0",
    )
    assert grey.examples_at([0, 3])["image"].shape == (2, 8, 8, 1)
    assert "tensorflow" not in sys.modules


def test_a_set_with_one_split_is_parted(tmp_path):
    build(tmp_path, {"train": 20})
    parts = [TfdsSource("tiny_set", tmp_path, split, 20, 3) for split in sources.SPLITS]
    assert [len(part) for part in parts] == [18, 2]
    train, held_out = ({i.tobytes() for i in sources.all_images(part)[0]} for part in parts)
    assert len(train | held_out) == 20


def test_a_prepared_tfrecord_set_is_refused_with_the_command(tmp_path):
    place = build(tmp_path)
    info = place / "dataset_info.json"
    info.write_text(info.read_text().replace('"array_record"', '"tfrecord"'))
    for path in place.glob("*.array_record-*"):
        path.rename(place / path.name.replace("array_record", "tfrecord"))
    words = (
        r"'tiny_set' is prepared as tfrecord, which has no random access; run 'tfds convert_format"
        rf" --out_file_format=array_record --dataset_version_dir={place}'"
    )
    with pytest.raises(UserError, match=words):
        TfdsSource("tiny_set", tmp_path, "train", 16, 3)


def test_a_set_in_both_formats_is_read(tmp_path):
    """Converted where it lies, as the command above does."""
    place = build(tmp_path)
    info = place / "dataset_info.json"
    info.write_text(info.read_text().replace('"array_record"', '"tfrecord"'))
    values = json.loads(info.read_text())
    values["alternativeFileFormats"] = ["array_record"]
    info.write_text(json.dumps(values))
    assert len(TfdsSource("tiny_set", tmp_path, "train", 16, 3)) == COUNTS["train"]


def test_imagenet_that_is_not_prepared_is_refused_with_the_command(tmp_path):
    words = (
        r"'imagenet2012' is not prepared in .*; run 'tfds build imagenet2012"
        rf" --file_format=array_record --data_dir={tmp_path}'\.$"
    )
    with pytest.raises(UserError, match=words):
        TfdsSource("imagenet2012", tmp_path, "train", 16, 3)


def readable(source, index):
    try:
        source.examples_at([index])
    except UserError:
        return False
    return True


def test_damage_is_refused_or_skipped(tmp_path):
    place = build(tmp_path)
    (path,) = place.glob("*train*")
    content = bytearray(path.read_bytes())
    where = content.find(encoded("train", 4).read()[:60])
    content[where + 55] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"record \d+ of the shard .* is corrupt; copy it anew or"):
        sources.all_images(TfdsSource("tiny_set", tmp_path, "train", 20, 3))
    images, labels = sources.all_images(TfdsSource("tiny_set", tmp_path, "train", 20, 3, "skip"))
    expected = {
        np.asarray(picture("train", i))[:, 5:25].tobytes(): i % 3 for i in range(20) if i != 4
    }
    assert {i.tobytes(): label for i, label in zip(images, labels, strict=True)} == expected
    dataset = f"tfds:tiny_set:1.0.0:{tmp_path}"
    strict = open_dataset(
        dataset, "train", size=20, channels=3, num_classes=3, on_corrupt="skip", replaces=False
    )
    (position,) = [i for i in range(20) if not readable(strict, i)]
    with pytest.raises(
        UserError, match=rf"record {position} of the shard .* prepare the set again\.$"
    ):
        strict.examples_at([position])
    path.write_bytes(content[:-100])
    with pytest.raises(UserError, match=r"has 0 records instead of 20; copy it anew or prepare"):
        TfdsSource("tiny_set", tmp_path, "train", 20, 3)
    path.unlink()
    with pytest.raises(UserError, match=r"train.array_record-00000-of-00001 is missing"):
        TfdsSource("tiny_set", tmp_path, "train", 20, 3)


def test_other_sets_are_refused(tmp_path, prepared):
    import tensorflow_datasets as tfds

    for words, make in {
        r"TFDS has no set 'nonsense'": lambda: TfdsSource("nonsense", prepared, "train", 16, 3),
        r"has no set 'tiny_set:2.0.0'": lambda: TfdsSource(
            "tiny_set:2.0.0", prepared, "train", 16, 3
        ),
        "needs data.tfds_name, such as imagenet2012": lambda: TfdsSource(
            "", prepared, "train", 16, 3
        ),
        "there is no folder .*nowhere; set data.path": lambda: TfdsSource(
            "tiny_set", tmp_path / "nowhere", "train", 16, 3
        ),
    }.items():
        with pytest.raises(UserError, match=words) as error:
            make()
        assert "\n" not in str(error.value)
    image = {"image": tfds.features.Image(), "image2": tfds.features.Image()}
    build(tmp_path / "two", features=image | {"label": tfds.features.ClassLabel(num_classes=3)})
    with pytest.raises(UserError, match="has 2 features of the kind Image, but must have one"):
        TfdsSource("tiny_set", tmp_path / "two", "train", 16, 3)
    build(tmp_path / "none", features={"image": tfds.features.Image()})
    with pytest.raises(UserError, match="has 0 features of the kind ClassLabel"):
        TfdsSource("tiny_set", tmp_path / "none", "train", 16, 3)
    build(tmp_path / "test", {"test": 4})
    with pytest.raises(UserError, match="has no split 'train'"):
        TfdsSource("tiny_set", tmp_path / "test", "train", 16, 3)
