"""From a config to its tokenizer and its documents."""

import functools

from ml_collections import ConfigDict

from cfjax.autoencoder_files import Autoencoder
from cfjax.data.captioned_records import CaptionedRecordSource
from cfjax.data.document_rows import PackedDocuments
from cfjax.data.document_sources import CaptionedImages, ImageSequences
from cfjax.data.progressions import ProgressionsSource
from cfjax.data.scenes import ScenesSource
from cfjax.data.tfds_captions import TfdsCaptionsSource
from cfjax.data.tokenizers import Tokenizer, open_tokenizer
from cfjax.data.transforms import TransformsSource
from cfjax.documents import Slots, Vocabulary
from cfjax.errors import UserError, check_choice

EMBEDDED_SOURCES = ("scenes", "progressions", "transforms")
DOCUMENT_SOURCES = (*EMBEDDED_SOURCES, "captioned_array_record", "captioned_tfds")


def has_text(config: ConfigDict) -> bool:
    """Whether the model is one of documents; configs older than those have no `text`."""
    return "text" in config and bool(config.text.tokenizer)


@functools.lru_cache(maxsize=4)
def _tokenizer(name: str) -> Tokenizer:
    return open_tokenizer(name)


def tokenizer(config: ConfigDict) -> Tokenizer:
    """The tokenizer of a model of documents.

    Raises:
      UserError: it can't be had, or is another one than the model was trained with.
    """
    opened = _tokenizer(config.text.tokenizer)
    if config.text.checksum not in ("", opened.checksum):
        raise UserError(
            f"the tokenizer {opened.name} has the checksum {opened.checksum[:12]}, but the model was"
            f" trained with {config.text.checksum[:12]}; pass that file: text.tokenizer of"
            " training, --tokenizer, or cfjax.load(tokenizer=...)."
        )
    return opened


def vocabulary(config: ConfigDict) -> Vocabulary:
    """The ids of the tokenizer and our own."""
    return Vocabulary(tokenizer(config).vocabulary_size)


def slots(config: ConfigDict) -> Slots:
    """What a row has room for.

    Raises:
      UserError: not even for one token and one image.
    """
    text = config.text
    for name in ("max_length", "tokens_per_row", "images_per_row"):
        if text[name] < 1:
            raise UserError(f"text.{name} is {text[name]}, but must be at least 1.")
    return Slots(text.tokens_per_row, text.images_per_row)


def source(
    config: ConfigDict, split: str, size: int = 0, channels: int = 0
) -> CaptionedImages | ImageSequences:
    """The documents' images and captions, by default at the size and channels of `config.data`.

    Args:
      config: read is `data`.
      split: "train" or "held_out".
      size, channels: of images that are encoded in training.

    Raises:
      UserError: an unknown name, or data that don't fit the model.
    """
    data = config.data
    check_choice("data.name of documents", data.name, DOCUMENT_SOURCES)
    size, channels = size or data.size, channels or data.channels
    if data.name == "captioned_array_record":
        return CaptionedRecordSource(data.path, split, size, channels, data.on_corrupt)
    if data.name == "captioned_tfds":
        return TfdsCaptionsSource(data.tfds_name, data.path, split, size, channels, data.on_corrupt)
    if data.name == "scenes":
        opened = ScenesSource(split, size, data.scene_grid)
    elif data.name == "progressions":
        opened = ProgressionsSource(split, data.sequence_length)
    else:
        opened = TransformsSource(split, data.num_examples)
    if opened.image_shape != (size, size, channels):
        height, width, its_channels = opened.image_shape
        raise UserError(
            f"data.size {size} with data.channels {channels} does not fit {data.name} of"
            f" {height}x{width} pixels and {its_channels} channels; set them to {height} and"
            f" {its_channels}."
        )
    return opened


def documents(config: ConfigDict, split: str, loaded: Autoencoder | None = None) -> PackedDocuments:
    """Rows of documents to train on; `loaded` is what `build_data.autoencoder` gives.

    Raises:
      UserError: see `source`; a caption that is too long, or documents that no row has room for.
    """
    if config.data.horizontal_flip:
        raise UserError(
            "data.horizontal_flip would make captions with left and right untrue; set it to False."
        )
    size = channels = 0
    if loaded is not None:
        size = config.data.size * loaded.module.downsampling
        channels = loaded.module.image_channels
    return PackedDocuments(
        source(config, split, size, channels),
        tokenizer(config),
        slots(config),
        max_text_length=config.text.max_length,
        image_to_text_share=config.data.image_to_text_share,
        text_dropout=config.loss.text_dropout,
        seed=config.seed,
    )
