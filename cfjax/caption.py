"""Describes images: `python -m cfjax.caption --checkpoint runs/mnist_scenes --images pictures --out
captions.jsonl`.

`--images` are a folder of pictures, which are cropped and scaled, one of them, or a `.npz`. `--out` gets
a line `{"image": name, "caption": text}` for each, as it comes; run again, a killed run goes on where it
was. The caption of image i depends on the seed, i and the image alone. A JSON of the recipe lies beside
it, `<out>.json`.

With `--references`, a file of such lines (or `"captions"`, a list), BLEU-4 and CIDEr-D go to
`<out>_scores.json`.
"""

import dataclasses
import hashlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags, logging
from jax.experimental import multihost_utils
from tqdm import tqdm

import cfjax
from cfjax import build_documents, program
from cfjax.caption_outputs import PROGRAM, CaptionsFile
from cfjax.checkpoint_folders import find
from cfjax.data.image_files import image_paths, map_with_progress, read_image, write_whole
from cfjax.data.image_sets import of_npz
from cfjax.document_sampler import DocumentSampler
from cfjax.edit import read_pictures
from cfjax.errors import UserError, listed
from cfjax.evaluation.caption_scores import bleu, cider_d
from cfjax.generation_request import params_checksum
from cfjax.sampler import OF_MODEL
from cfjax.sampling_flags import define_device_flags, define_model_flags, load_sampler
from cfjax.text_flags import define_text_flags, text_overrides


@dataclasses.dataclass(frozen=True)
class Pictures:
    """Images to be described.

    Attributes:
      names: of all.
      sha256: of their names and contents.
      read: (first, end) to uint8 `[end - first, H, W, C]`.
    """

    names: Sequence[str]
    sha256: str
    read: Callable[[int, int], np.ndarray]


def open_pictures(path: str, image_shape: tuple[int, int, int]) -> Pictures:
    """Opens images of the model's size, or that are cropped and scaled to it.

    Args:
      path: a folder of pictures, one, or a `.npz`, whose images must have that size.
      image_shape: (H, W, C) of the model's.

    Raises:
      UserError: there is none, one is broken, or those of the `.npz` are of another size.
    """
    place = Path(path).expanduser()
    if not place.exists():
        raise UserError(f"there are no images at {path}; pass a folder, a picture or a .npz.")
    if place.suffix == ".npz":
        images = of_npz(place)
        if images.image_shape != image_shape:
            raise UserError(
                f"the images of {path} are {list(images.image_shape)}, but those of the model"
                f" {list(image_shape)}; pass a folder of pictures, which are cropped and scaled."
            )
        names = [f"{index:06d}" for index in range(images.count)]
        return Pictures(
            names, _sha256(place), lambda first, end: next(images.read(first, end - first))
        )
    files = image_paths(place) if place.is_dir() else [place]

    def read(first: int, end: int) -> np.ndarray:
        with ThreadPool() as pool:
            some = pool.map(lambda file: read_pictures(file, image_shape), files[first:end])
        return np.concatenate(some)

    def checked(file: Path) -> str:
        read_image(file, only_check=True)  # so that what is broken is found now
        return f"{file.name} {_sha256(file)}\n"

    contents = "".join(map_with_progress(checked, files, f"checking {path}"))
    digest = hashlib.sha256(contents.encode()).hexdigest()
    return Pictures([file.name for file in files], digest, read)


def _sha256(file: Path) -> str:
    try:
        with file.open("rb") as content:
            return hashlib.file_digest(content, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{file} can't be read: {error.strerror or error}.") from error


def read_references(path: str, names: Sequence[str]) -> list[list[str]]:
    """The captions that people wrote of the images of these names.

    Args:
      path: of lines `{"image": name, "caption": text}` or `{"image": name, "captions": [texts]}`; an
        image may have several.
      names: of the images; others in the file are passed over.

    Raises:
      UserError: it can't be read, a line is something else, or an image has none.
    """
    references: dict[str, list[str]] = {name: [] for name in names}
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no UTF-8 text"
        raise UserError(f"the references {path} can't be read: {reason}.") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
            texts = values["captions"] if "captions" in values else [values["caption"]]
            if not all(isinstance(text, str) for text in texts):
                raise TypeError
            references.get(os.path.normpath(values["image"]), []).extend(texts)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f'line {number} of {path} is not {{"image": name, "caption": text}}; mend it.'
            ) from error
    without = [name for name in names if not references[name]]
    if without:
        raise UserError(
            f"{path} has no caption of {listed(without)}; write one for each image, by its name."
        )
    return list(references.values())


def recipe_of(model: DocumentSampler, images: Pictures) -> dict[str, Any]:
    """What fixes the bytes of the captions, as JSON values; all processes of a run call it."""
    values = flags.FLAGS.flag_values_dict()
    module = model.autoencoder
    return {
        "program": PROGRAM,
        "checkpoint": values["checkpoint"],
        "train_step": int(find(values["checkpoint"], values["train_step"]).name),
        "sampling": {name: model.config.sampling[name] for name in OF_MODEL},
        "text": dataclasses.asdict(model.text_sampling(text_overrides())),
        "seed": values["seed"],
        "images": values["images"],
        "images_sha256": images.sha256,
        "tokenizer": build_documents.tokenizer(model.config).checksum,
        "params_sha256": params_checksum(model.params),
        "autoencoder_params_sha256": module and params_checksum(module.params),
        "versions": {
            "cfjax": cfjax.__version__,
            "jax": jax.__version__,
            "numpy": np.__version__,
            "device": model.mesh.devices.flat[0].device_kind,
        },
    }


def write_captions(model: DocumentSampler, images: Pictures) -> list[str] | None:
    """Makes the file that the flags name, or what an earlier run left of it.

    Returns:
      All captions; None but on the first process.

    Raises:
      UserError: another run is there, or it can't be written to.
    """
    values = flags.FLAGS.flag_values_dict()
    recipe, count = recipe_of(model, images), len(images.names)
    file = None
    if jax.process_index() == 0:
        file = CaptionsFile(
            values["out"], recipe, images.names, model.image_shape, values["overwrite"]
        )
    done = len(file.captions) if file is not None else 0
    if jax.process_count() > 1:
        done = int(multihost_utils.broadcast_one_to_all(np.int32(done)))
    at_once = model.documents_at_once
    batch_size = -(-values["batch_size"] // at_once) * at_once
    with tqdm(
        total=count,
        initial=done,
        unit="image",
        desc="captions",
        disable=jax.process_index() != 0,
        file=sys.stderr,
    ) as bar:
        while done < count:
            end = min((done // batch_size + 1) * batch_size, count)
            texts = model.caption(
                images.read(done, end), seed=values["seed"], first_index=done, **text_overrides()
            )
            if file is not None:
                file.append(texts)
            bar.update(end - done)
            done = end
    if file is None:
        return None
    file.finish()
    logging.info("%d captions are in %s.", count, values["out"])
    return file.captions


def save_scores(captions: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    """Writes BLEU-4 and CIDEr-D beside the captions.

    Raises:
      UserError: the file can't be written.
    """
    values = flags.FLAGS.flag_values_dict()
    scores = {
        "bleu_4": bleu(captions, references),
        "cider_d": cider_d(captions, references)[0],
        "num_images": len(captions),
        "num_references": sum(map(len, references)),
        "references": values["references"],
        "references_sha256": _sha256(Path(values["references"]).expanduser()),
    }
    out = Path(values["out"]).expanduser()
    path = out.with_name(f"{out.stem}_scores.json")
    write_whole(path, lambda file: file.write((json.dumps(scores, indent=1) + "\n").encode()))
    logging.info(
        "BLEU-4 %.1f, CIDEr-D %.1f (times 100, as papers print them) are in %s.",
        *(100 * scores["bleu_4"], 100 * scores["cider_d"], path),
    )


def main(_: Sequence[str]) -> None:
    """Runs the program."""
    program.initialize_distributed()
    values = flags.FLAGS.flag_values_dict()
    model = load_sampler()
    if not isinstance(model, DocumentSampler):
        raise UserError(
            f"the model in {values['checkpoint']} has no text head and can't write captions; pass a"
            " checkpoint that was trained with text.tokenizer."
        )
    model.text_sampling(text_overrides())
    images = open_pictures(values["images"], model.image_shape)
    references = None
    if values["references"] is not None:
        references = read_references(values["references"], images.names)
        if len(references) < 2:
            raise UserError(
                "--references needs 2 images or more, as CIDEr-D of one is not defined."
            )
    captions = write_captions(model, images)
    if references is not None and captions is not None:
        save_scores(captions, references)


def define_flags() -> None:
    """Defines the program's flags."""
    define_model_flags()
    define_device_flags()
    flags.DEFINE_string(
        "images", None, "A folder of pictures, one, or a .npz of the model's size.", required=True
    )
    flags.DEFINE_string("out", None, "The file of captions, a line an image.", required=True)
    flags.DEFINE_bool("overwrite", False, "Replace the output of another run.")
    flags.DEFINE_string("references", None, "A file of captions to compare with.")
    flags.DEFINE_integer("seed", 0, "Of the tokens that are drawn.")
    define_text_flags()


if __name__ == "__main__":
    define_flags()
    program.run(main)
