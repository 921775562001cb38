"""Edits images: `python -m cfjax.edit --checkpoint runs/mnist --images mine.png --keep=top --classes=8
--out edited.png`.

A part of each image is kept, and the rest is generated anew around it, with another class if asked,
without fine-tuning (paper section 4.4). A model of documents takes a text: `--caption` instead of
`--classes`. The images are one's own (`--images`: a `.npz`, a folder, or
one picture) or generated first (`--source_classes`). `--keep_ratio=0.8,0.5,0.2` with `--keep=random`
regenerates a growing share: a class that morphs. `--kept_as=noised` heeds the new class more, and so
does `--num_candidates=4`: of four edits of an image the model keeps the one that fits the class best.

`--out` is as in cfjax.sample; a picture of the images before, the masks and the images after is in
`<out>_strip.png`.
"""

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags, logging

from cfjax import editing, program, sampling
from cfjax.data.image_files import image_paths, read_image, read_images, write_png
from cfjax.data.images import center_crop
from cfjax.errors import UserError
from cfjax.generation_prompts import (
    check_takes_prompts,
    documents_of,
    prompt_indices,
    recipe_of_prompts,
)
from cfjax.generation_request import Request, recipe_of, request_from_flags
from cfjax.sample import Part, asked_for, define_output_flags, write
from cfjax.sampler import Sampler
from cfjax.sampling_flags import (
    define_device_flags,
    define_sampling_flags,
    floats,
    integers,
    mesh_from_flags,
)
from cfjax.visualization import edit_strip

MAX_STRIP_ROWS = 20


def edit_from_flags() -> dict[str, Any]:
    """What is kept of which images, as JSON values.

    Raises:
      UserError: flags that contradict each other.
    """
    values = flags.FLAGS.flag_values_dict()
    sources = integers("source_classes", values["source_classes"])
    if (values["images"] is None) != bool(sources):
        raise UserError(
            "pass either --images, of your own, or --source_classes, of images to be generated first."
        )
    keep, ratios = values["keep"], floats("keep_ratio", values["keep_ratio"])
    if keep == "random" and not ratios:
        raise UserError("--keep=random needs --keep_ratio, the share of the tokens to be kept.")
    if keep != "random" and ratios:
        raise UserError(f"--keep_ratio is for --keep=random, not for --keep={keep}.")
    if values["caption"] is not None and values["classes"]:
        raise UserError("both --caption and --classes are given; drop one of them.")
    return {
        "images": values["images"],
        "source_classes": list(sources),
        "source_seed": values["source_seed"],
        "keep": keep,
        "keep_box": list(integers("keep_box", values["keep_box"])),
        "keep_ratio": list(ratios),
        "kept_as": values["kept_as"],
        "num_candidates": values["num_candidates"],
    }


def read_pictures(path: str, image_shape: tuple[int, int, int]) -> np.ndarray:
    """One's own images, cropped to a square and scaled as the model's training images are.

    Args:
      path: a `.npz`, whose images must have that shape; a folder of images, or one.
      image_shape: (H, W, C) of the model's.

    Returns:
      uint8 `[N, H, W, C]`.

    Raises:
      UserError: there is none, or one can't be read.
    """
    place = Path(path).expanduser()
    if place.suffix == ".npz":
        images = read_images(place)[0]
        if images.shape[1:] != image_shape:
            raise UserError(
                f"the images of {path} are {list(images.shape[1:])}, but those of the model"
                f" {list(image_shape)}; pass a folder of pictures, which are cropped and scaled."
            )
        return images
    files = image_paths(place) if place.is_dir() else [place]
    height, _, channels = image_shape
    return np.stack(
        [center_crop(read_image(file, channels), height).reshape(image_shape) for file in files]
    )


def read_mask(path: str, size: tuple[int, int]) -> np.ndarray:
    """A picture as a mask: bool `[H, W]`, True (kept) where it is brighter than half.

    Raises:
      UserError: it can't be read, or is not of the images' size.
    """
    mask = read_image(path, channels=1)
    if (mask.height, mask.width) != tuple(size):
        raise UserError(
            f"the mask {path} is {mask.height} x {mask.width} pixels, but the images are {size[0]} x"
            f" {size[1]}; scale it to their size."
        )
    return np.asarray(mask) >= 128


def source_images(request: Request, model: Sampler) -> np.ndarray:
    """The images to be edited, uint8 `[N, H, W, C]`."""
    edit = request.edit
    if edit["images"] is not None:
        return read_pictures(edit["images"], model.image_shape)
    labels = model.check_labels(edit["source_classes"])
    batches = model.stream(labels, request.settings(model), edit["source_seed"])
    return np.concatenate(list(batches))


def known_parts(request: Request, model: Sampler, images: np.ndarray) -> list[sampling.Known]:
    """What is kept of all images, for one ratio after the other.

    Raises:
      UserError: a mask or a box that do not fit.
    """
    edit = request.edit
    keep = edit["keep"]
    if keep not in editing.KEEPS and keep.endswith(".png"):
        keep = read_mask(keep, model.image_shape[:2])
    ratios = edit["keep_ratio"] or [0.0]  # read for "random" alone
    return [
        model.known_tokens(images, keep, edit["keep_box"], ratio, request.seed) for ratio in ratios
    ]


def prompt_of_edit() -> dict[str, Any]:
    """The caption of the flags as `cfjax.generation_prompts` has it; empty if there is none."""
    caption = flags.FLAGS["caption"].value
    if caption is None:
        return {}
    return {"texts": [caption], "images": [], "images_per_document": 1}


def settings_of(
    request: Request, model: Sampler, known: sampling.Known
) -> sampling.SamplingSettings:
    """How the model is to generate what is not kept.

    Raises:
      UserError: a value out of range.
    """
    settings = request.settings(model, int(known.is_known[0].sum()))
    # A recipe of an earlier version does not say it.
    return dataclasses.replace(settings, kept_as=request.edit.get("kept_as", "clean"))


def checksum(array: np.ndarray) -> str:
    """SHA-256 of the bytes."""
    return hashlib.sha256(np.ascontiguousarray(array)).hexdigest()


def main(_: Sequence[str]) -> None:
    """Runs the program."""
    program.initialize_distributed()
    request, repeated = asked_for(
        "cfjax.edit", lambda: request_from_flags(0, edit_from_flags(), prompt_of_edit())
    )
    model = request.load(mesh_from_flags())
    if request.prompt:
        check_takes_prompts(model, "--caption")
    images = source_images(request, model)
    request = dataclasses.replace(request, num_samples=len(images))
    documents = None
    if request.prompt:
        documents = documents_of(request.prompt, len(images), model)
        labels = prompt_indices(request.prompt, len(images))
    else:
        own = tuple(request.edit["source_classes"]) or (model.model.null_class,)
        request = dataclasses.replace(request, classes=request.classes or own)
        labels = request.labels(model)
    knowns = known_parts(request, model, images)
    # A recipe of an earlier version does not say it.
    num_candidates = request.edit.get("num_candidates", 1)
    if request.prompt and num_candidates != 1:
        raise UserError(
            "candidates are chosen by their class, and captions name none; drop --num_candidates."
        )
    if not request.prompt:
        model.check_num_candidates(num_candidates, labels)
    parts = [
        Part(labels, settings_of(request, model, it), it, documents, num_candidates=num_candidates)
        for it in knowns
    ]
    recipe = recipe_of("cfjax.edit", request, model, parts[0].settings) | {
        "source_sha256": checksum(images),
        "is_known_sha256": checksum(np.stack([known.is_known for known in knowns])),
    }
    if documents is not None:
        recipe |= recipe_of_prompts(model, documents)
    shown = images[:MAX_STRIP_ROWS]
    edited = np.zeros((len(parts), *shown.shape), np.uint8)
    is_there = np.zeros(edited.shape[:2], bool)
    for first, batch in write(recipe, repeated, model, parts, request.seed):
        for index, image in enumerate(batch, first):
            part, row = divmod(index, len(images))
            if row < len(shown):
                edited[part, row], is_there[part, row] = image, True
    for part in np.flatnonzero(~is_there.all(axis=1)):  # an earlier run wrote them
        of_shown = parts[part]._replace(
            labels=labels[: len(shown)],
            known=sampling.Known(*(it[: len(shown)] for it in parts[part].known)),
            documents=documents and documents[: len(shown)],
        )
        edited[part] = np.concatenate(list(of_shown.stream(model, request.seed)))
    if jax.process_index() != 0:
        return
    out = Path(flags.FLAGS["out"].value)
    strip = out.with_name(f"{out.stem}_strip.png")
    is_generated = np.stack(
        [
            editing.generated_pixels(
                known.is_known[: len(shown)], model.image_shape[:2], model.model.grid
            )
            for known in knowns
        ]
    )
    write_png(strip, edit_strip(shown, is_generated, edited))
    logging.info("Before, masks and after are in %s.", strip)


def define_flags() -> None:
    """Defines the program's flags."""
    define_sampling_flags(checkpoint_is_required=False)
    define_device_flags()
    define_output_flags()
    flags.DEFINE_string("images", None, "Your own: a .npz, a folder of pictures, or one.")
    flags.DEFINE_string("caption", None, "A text for all results, instead of classes.")
    flags.DEFINE_list("source_classes", [], "Or classes of images that are generated first.")
    flags.DEFINE_integer("source_seed", 0, "Of those.")
    flags.DEFINE_string(
        "keep",
        "center",
        "What is kept: center, outside, top, bottom, left, right, box, random, or a .png of the"
        " images' size, white where they are kept.",
    )
    flags.DEFINE_list("keep_box", [], "Of box, in pixels: TOP,LEFT,BOTTOM,RIGHT.")
    flags.DEFINE_list("keep_ratio", [], "Of random: the share of tokens; of several, all in turn.")
    flags.DEFINE_string(
        "kept_as",
        "clean",
        "How the model sees what is kept: clean, or noised as what is denoised beside it, so that a new"
        " class is heeded more.",
    )
    flags.DEFINE_integer(
        "num_candidates",
        1,
        "Edits of each image, of which the one is kept that fits its class best.",
    )


if __name__ == "__main__":
    define_flags()
    program.run(main)
