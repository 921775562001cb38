"""Captioned sets of TFDS: prepared and read without TensorFlow, as COCO's are."""

import io
import logging
import sys

import numpy as np
import pytest
from PIL import Image

from cfjax.data.images import center_crop
from cfjax.data.tfds_captions import TfdsCaptionsSource
from cfjax.errors import UserError

COUNT = 12


def picture(split, index):
    pixels = np.random.default_rng([len(split), index]).integers(0, 256, (20, 30, 3), np.uint8)
    return Image.fromarray(pixels)


def encoded(split, index):
    content = io.BytesIO()
    picture(split, index).save(content, "PNG")
    return content.getvalue()


def captions_of(split, index):
    return [f"{split} {index}, ä {number} 猫" for number in range(1 + index % 3)]


def coco_features(tfds):
    return {
        "image": tfds.features.Image(encoding_format="png"),
        "image/filename": tfds.features.Text(),
        "objects": tfds.features.Sequence({"bbox": tfds.features.BBoxFeature()}),
        "captions": tfds.features.Sequence({"text": np.str_, "id": np.int64}),
    }


def as_coco(split, index):
    texts = captions_of(split, index)
    return {
        "image": io.BytesIO(encoded(split, index)),
        "image/filename": f"{index}.png",
        "objects": [],
        "captions": [{"text": text, "id": number} for number, text in enumerate(texts)],
    }


def build(
    folder,
    features=coco_features,
    example=as_coco,
    splits=("train", "val", "test"),
    name="tiny_captions",
    configs=(),
):
    """Prepares a tiny set by TFDS's own writer."""
    import tensorflow_datasets as tfds

    class TinyCaptions(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")
        BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=it) for it in configs]  # noqa: RUF012

        def _info(self):
            of_all = tfds.features.FeaturesDict(features(tfds))
            return tfds.core.DatasetInfo(builder=self, features=of_all)

        def _split_generators(self, _):
            return {split: self._generate_examples(split) for split in splits}

        def _generate_examples(self, split):
            for i in range(COUNT):
                yield i, example(split, i)

    TinyCaptions.name = name
    TinyCaptions(data_dir=str(folder), file_format="array_record").download_and_prepare()
    return folder / name / "1.0.0"


def opened(folder, split="train", on_corrupt="refuse"):
    return TfdsCaptionsSource("tiny_captions", folder, split, 16, 3, on_corrupt)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds captions")
    build(folder)
    return folder


def assert_belong_together(source):
    images = source.images_at(np.arange(len(source)))
    assert images.dtype == np.uint8
    for caption, image in zip(source.captions, images, strict=True):
        split, index = caption.split(",")[0].split()
        expected = center_crop(picture(split, int(index)), 16)
        np.testing.assert_array_equal(image, np.asarray(expected))


def test_pairs_of_cocos_kind_belong_together(prepared, caplog):
    with caplog.at_level(logging.INFO, logger="absl"):
        for split, tfds_split in (("train", "train"), ("held_out", "val")):
            source = opened(prepared, split)
            expected = [text for index in range(COUNT) for text in captions_of(tfds_split, index)]
            assert sorted(source.captions) == sorted(expected)
            assert len(source) == 24
            assert source.image_shape == (16, 16, 3)
            assert source.left_out == ()
            assert_belong_together(source)
    assert f"reading the captions of {COUNT} records of the TFDS set tiny_captions" in caplog.text
    assert "tensorflow" not in sys.modules


@pytest.mark.parametrize("name", ["coco_captions", "coco_captions/2014", "coco_captions:1.0.0"])
def test_coco_is_read_without_its_code_which_needs_tensorflow(tmp_path, name):
    build(tmp_path, name="coco_captions", configs=["2014"])
    source = TfdsCaptionsSource(name, tmp_path, "held_out", 16, 3)
    assert {text.split()[0] for text in source.captions} == {"val"}
    assert_belong_together(source)


def test_captions_are_read_without_decoding_images(prepared, monkeypatch):
    monkeypatch.setattr("cfjax.data.tfds_captions.decode_image", None)
    assert len(opened(prepared).captions) == 24


@pytest.mark.parametrize("key", ["caption", "text", "captions"])
def test_captions_may_be_one_text_or_several(tmp_path, key):
    def features(tfds):
        text = tfds.features.Text()
        of_captions = tfds.features.Sequence(text) if key == "captions" else text
        return {"image": tfds.features.Image(encoding_format="png"), key: of_captions}

    def example(split, index):
        texts = captions_of(split, index)
        return {
            "image": io.BytesIO(encoded(split, index)),
            key: texts if key == "captions" else f" {texts[0]} ",
        }

    build(tmp_path, features, example, ["train"])
    source, held_out = opened(tmp_path), opened(tmp_path, "held_out")
    expected = [
        text
        for index in range(COUNT)
        for text in (
            captions_of("train", index) if key == "captions" else captions_of("train", index)[:1]
        )
    ]
    assert sorted([*source.captions, *held_out.captions]) == sorted(expected)
    assert 0 < len(held_out) < len(source)
    assert_belong_together(source)
    assert_belong_together(held_out)


def test_fingerprints_tell_sets_apart(prepared, tmp_path):
    assert opened(prepared).fingerprint == opened(prepared).fingerprint
    assert opened(prepared).fingerprint != opened(prepared, "held_out").fingerprint

    def in_capitals(split, index):
        example = as_coco(split, index)
        for caption in example["captions"]:
            caption["text"] = caption["text"].upper()
        return example

    build(tmp_path, example=in_capitals)  # shards of the same sizes
    assert opened(prepared).fingerprint != opened(tmp_path).fingerprint


def test_damaged_records_are_refused_or_skipped_by_name(tmp_path):
    place = build(tmp_path)
    (path,) = place.glob("*train*")
    content = bytearray(path.read_bytes())
    content[content.find(encoded("train", 4)[:60]) + 55] ^= 1
    path.write_bytes(content)
    words = r"record (\d+) of the shard .* is corrupt; copy it anew or prepare the set again"
    with pytest.raises(UserError, match=words + r", or set data.on_corrupt=skip\.$"):
        opened(tmp_path)
    source = opened(tmp_path, on_corrupt="skip")
    (left_out,) = source.left_out
    number = left_out["name"].removeprefix("record ").removesuffix(" of tiny_captions")
    assert f"record {number} of the shard" in left_out["reason"]
    expected = [
        text for index in range(COUNT) if index != 4 for text in captions_of("train", index)
    ]
    assert sorted(source.captions) == sorted(expected)
    assert_belong_together(source)
    path.write_bytes(content[:-100])
    with pytest.raises(UserError, match=r"has 0 records instead of 12; copy it anew or prepare"):
        opened(tmp_path)


def test_images_that_can_not_be_decoded_are_passed_over_with_their_captions(tmp_path):
    def example(split, index):
        values = as_coco(split, index)
        return values | ({"image": io.BytesIO(b"\x89PNG no picture")} if index == 5 else {})

    build(tmp_path, example=example)
    source = opened(tmp_path, on_corrupt="skip")
    bad = [i for i, text in enumerate(source.captions) if text.startswith("train 5,")]
    assert len(bad) == 3
    with pytest.raises(UserError, match=r"the image 5.png is no image; remove or mend it\.$"):
        source.images_at(bad)
    with pytest.raises(UserError, match=r"5.png .*mend it, or set data.on_corrupt=skip\.$"):
        opened(tmp_path).examples_at(bad)
    examples = source.examples_at(bad)
    following = (bad[-1] + 1) % len(source)
    np.testing.assert_array_equal(examples["index"], [following] * 3)
    assert examples["caption"] == [source.captions[following]] * 3


def test_records_without_captions_are_refused_or_skipped(tmp_path):
    def example(split, index):
        blank = [{"text": " ", "id": 0}] if index == 5 else []
        return as_coco(split, index) | ({"captions": blank} if index in (5, 7) else {})

    build(tmp_path, example=example)
    words = r"record \d+ of the TFDS set tiny_captions has no captions; copy it anew or prepare the"
    with pytest.raises(UserError, match=rf"{words} set again, or set data.on_corrupt=skip\.$"):
        opened(tmp_path)
    source = opened(tmp_path, on_corrupt="skip")
    assert len(source.left_out) == 2
    assert_belong_together(source)
    assert len({text.split(",")[0] for text in source.captions}) == COUNT - 2


def test_other_sets_are_refused(tmp_path, prepared):
    for words, name, folder in (
        (r"TFDS has no set 'nonsense'", "nonsense", prepared),
        (r"needs data.tfds_name", "", prepared),
        (r"there is no folder .*nowhere", "tiny_captions", tmp_path / "nowhere"),
        (r"'coco_captions' is not prepared in .*; run 'tfds build", "coco_captions", tmp_path),
    ):
        with pytest.raises(UserError, match=words) as error:
            TfdsCaptionsSource(name, folder, "train", 16, 3)
        assert "\n" not in str(error.value)

    def labelled(tfds):
        return {"image": tfds.features.Image(), "label": tfds.features.ClassLabel(num_classes=3)}

    def numbered(tfds):
        return {"image": tfds.features.Image(), "caption": tfds.features.Scalar(np.int64)}

    def unseen(tfds):
        return {"caption": tfds.features.Text()}

    for words, features, values in (
        (
            "'captions' or 'caption' or 'text', but image, label; choose a set",
            labelled,
            {"label": 1},
        ),
        ("'caption' of a TFDS record is neither a text, nor", numbered, {"caption": 1}),
        ("has 0 features of the kind Image, but must have one; choose", unseen, {"caption": "a"}),
    ):
        folder = tmp_path / features.__name__

        def example(split, index, features=features, values=values):
            image = {} if features is unseen else {"image": io.BytesIO(encoded(split, index))}
            return image | values

        build(folder, features, example, ["train"])
        with pytest.raises(UserError, match=words):
            opened(folder)
