"""Prompts of the programs that generate: texts, and images that come before them, as JSON values.

A prompt is `{"texts": [...], "images": [paths], "images_per_document": n}`: document i begins with the
images, goes on with text i (over and over) and then with n images that are generated.
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from cfjax import build_documents
from cfjax.data.image_files import read_pixels
from cfjax.document_sampler import DocumentSampler
from cfjax.documents import Document, ImageSegment, TextSegment
from cfjax.errors import UserError
from cfjax.sampler import Sampler

PROMPT_FLAGS = ("prompt", "prompts_file", "prompt_images", "images_per_document")


def define_prompt_flags() -> None:
    """Defines the flags that `prompt_from_flags` reads."""
    flags.DEFINE_string("prompt", None, 'A text for all images; "" for none.')
    flags.DEFINE_string("prompts_file", None, "Texts of the images, one a line, over and over.")
    flags.DEFINE_list("prompt_images", [], "Files of images with which each document begins.")
    flags.DEFINE_integer(
        "images_per_document",
        1,
        "How many images follow one another in each of --num_samples documents.",
        lower_bound=1,
    )


def prompt_from_flags() -> dict[str, Any]:
    """What the documents begin with, as JSON values; empty if the flags name no prompt.

    Raises:
      UserError: flags that contradict each other, or a file of prompts that can't be read or has none.
    """
    values = flags.FLAGS.flag_values_dict()
    if values["prompt"] is not None and values["prompts_file"] is not None:
        raise UserError("both --prompt and --prompts_file are given; drop one of them.")
    texts = None if values["prompt"] is None else [values["prompt"]]
    if values["prompts_file"] is not None:
        texts = read_prompts(values["prompts_file"])
    if texts is None and not values["prompt_images"]:
        if values["images_per_document"] > 1:
            raise UserError(
                "--images_per_document is of documents; pass a --prompt too, or --prompt_images."
            )
        return {}
    if values["classes"]:
        raise UserError("both a prompt and --classes are given; drop one of them.")
    return {
        "texts": [""] if texts is None else texts,
        "images": list(values["prompt_images"]),
        "images_per_document": values["images_per_document"],
    }


def read_prompts(path: str) -> list[str]:
    """The lines of a file that are not empty.

    Raises:
      UserError: it can't be read, is no UTF-8, or all lines are empty.
    """
    try:
        content = Path(path).expanduser().read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no UTF-8 text"
        raise UserError(
            f"the file of prompts {path} can't be read ({reason}); write one prompt a line."
        ) from error
    texts = [line.strip() for line in content.split("\n") if line.strip()]
    if not texts:
        raise UserError(f"the file of prompts {path} is empty; write one prompt a line.")
    return texts


def check_takes_prompts(model: Sampler, what: str) -> DocumentSampler:
    """The model, if it is one of documents.

    Args:
      model: that was loaded.
      what: is asked for, such as "a prompt".

    Raises:
      UserError: it is one of classes.
    """
    if not isinstance(model, DocumentSampler):
        raise UserError(
            f"{what} needs a model with a text head; this one has none, so pass --classes, or a"
            " checkpoint that was trained with text.tokenizer."
        )
    return model


def documents_of(prompt: Mapping[str, Any], num_documents: int, model: Sampler) -> list[Document]:
    """The documents that images are to follow.

    Raises:
      UserError: the model takes no prompts, or a text or an image does not fit it.
    """
    model = check_takes_prompts(model, "a prompt")
    images = tuple(ImageSegment(read_pixels(path)) for path in prompt["images"])
    distinct = [
        (*images, TextSegment(text)) if text else images for text in prompt["texts"][:num_documents]
    ]
    for document in distinct:
        model.check_document(document)
    return [distinct[index % len(distinct)] for index in range(num_documents)]


def prompt_indices(prompt: Mapping[str, Any], num_documents: int) -> np.ndarray:
    """Which text each generated image is of, int32 `[num_documents * images_per_document]`."""
    indices = np.resize(np.arange(len(prompt["texts"]), dtype=np.int32), num_documents)
    return np.repeat(indices, prompt["images_per_document"])


def recipe_of_prompts(model: Sampler, documents: Sequence[Document]) -> dict[str, Any]:
    """What fixes the tokens of prompts besides their text, as JSON values."""
    digest = hashlib.sha256()
    for part in documents[0]:
        if isinstance(part, ImageSegment):
            digest.update(np.ascontiguousarray(part.pixels))
    return {
        "tokenizer": build_documents.tokenizer(model.config).checksum,
        "prompt_images_sha256": digest.hexdigest(),
    }
