"""Generates images: `python -m cfjax.sample --checkpoint runs/mnist --out samples.png`.

A model of documents draws them after a text (`--prompt`, or `--prompts_file` with one a line) and after
other images (`--prompt_images`), and with `--images_per_document` one after the other.

`--out` is a picture of all samples (`.png`), an array file as the ADM suite reads it (`.npz`, images
in `arr_0`, classes in `labels`), a set that training reads (`.array_record`), or a folder of PNGs.
Image i depends on the seed, i and its class or prompt alone, to the bit. Images are written as they come; run
again, a killed run goes on where it was.

A JSON beside the output says how it was made; `--from_json` makes the same bytes again.
"""

import collections
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from absl import flags, logging
from jax.experimental import multihost_utils
from tqdm import tqdm

from cfjax import program, sampling
from cfjax.documents import Document
from cfjax.errors import UserError
from cfjax.generation_prompts import (
    PROMPT_FLAGS,
    define_prompt_flags,
    documents_of,
    prompt_from_flags,
    prompt_indices,
    recipe_of_prompts,
)
from cfjax.generation_request import (
    Request,
    check_recipe,
    recipe_of,
    request_from_flags,
    request_from_recipe,
)
from cfjax.sample_outputs import open_output, read_recipe
from cfjax.sampler import Sampler
from cfjax.sampling_flags import (
    define_device_flags,
    define_sampling_flags,
    mesh_from_flags,
    refuse_other_flags,
)

# Flags that a recipe has values for, besides those of sampling.
OF_REQUEST = (
    *("classes", "num_samples", "autoencoder", "guide", "tokenizer"),
    *("images", "source_classes", "source_seed", "keep", "keep_box", "keep_ratio", "kept_as"),
    *(*PROMPT_FLAGS, "caption", "num_candidates"),
)


class Part(NamedTuple):
    """Images that are made in one way; `known` tokens and `num_candidates` are those of an edit.

    With `documents` they follow those, `images_per_document` each, and the labels say which prompt
    each is of.
    """

    labels: np.ndarray
    settings: sampling.SamplingSettings
    known: sampling.Known | None = None
    documents: Sequence[Document] | None = None
    images_per_document: int = 1
    num_candidates: int = 1

    def stream(
        self, model: Sampler, seed: int, num_done: int = 0, batch_size: int = 256
    ) -> Iterator[np.ndarray]:
        """Yields batches uint8 `[n, H, W, C]`, without the first `num_done` images."""
        first, passed_over = divmod(num_done, self.images_per_document)
        rest = self.known and sampling.Known(*(rows[first:] for rows in self.known))
        if self.documents is None:
            yield from model.stream(
                *(self.labels[first:], self.settings, seed, first, batch_size, rest),
                num_candidates=self.num_candidates,
            )
            return
        batches = model.stream_documents(
            self.documents[first:],
            *(self.settings, self.images_per_document, seed, first, batch_size, rest),
        )
        for images in batches:
            yield images.reshape(-1, *images.shape[2:])[passed_over:]
            passed_over = 0


def stream_with_progress(
    model: Sampler, parts: Sequence[Part], seed: int, batch_size: int, num_done: int = 0
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields batches of images uint8 `[n, H, W, C]` and their labels; a bar shows rate and ETA.

    The parts come one after the other, the indices of each from 0. The first `num_done` images are
    left out, as they are there.
    """
    total = sum(len(part.labels) for part in parts)
    with tqdm(
        total=total,
        initial=num_done,
        unit="image",
        desc=f"{len(parts[0].settings.split_sizes)} AR steps",
        disable=jax.process_index() != 0,
        file=sys.stderr,
    ) as bar:
        for part in parts:
            labels = part.labels
            done, num_done = min(num_done, len(labels)), max(num_done - len(labels), 0)
            if done == len(labels):
                continue
            for images in part.stream(model, seed, done, batch_size):
                bar.update(len(images))
                yield images, labels[done : done + len(images)]
                done += len(images)


def asked_for(name: str, from_flags: Callable[[], Request]) -> tuple[Request, dict | None]:
    """The request, and the JSON that it is from, if it is.

    Args:
      name: of the program.
      from_flags: the request that the flags make.

    Raises:
      UserError: flags that contradict each other, or a JSON of something else.
    """
    values = flags.FLAGS.flag_values_dict()
    path = values["from_json"]
    if path is None:
        if values["checkpoint"] is None:
            raise UserError("pass --checkpoint, or --from_json to repeat what was made before.")
        return from_flags(), None
    refuse_other_flags("--from_json says how to sample", OF_REQUEST)
    document = read_recipe(path)
    if document["recipe"].get("program") != name:
        raise UserError(f"{path} is of {document['recipe'].get('program')}; repeat it with that.")
    return request_from_recipe(document["recipe"], values["checkpoint"]), document


def write(
    recipe: dict, repeated: dict | None, model: Sampler, parts: Sequence[Part], seed: int
) -> Iterator[tuple[int, np.ndarray]]:
    """Makes the output that the flags name, or what an earlier run left of it.

    All processes call it; the first writes.

    Args:
      recipe: of the images.
      repeated: the JSON of those that are made again, or None.
      model: that makes them.
      parts: of the output, one after the other.
      seed: of the noise and the token orders.

    Yields:
      Batches as they are written: the index of the first image, and images uint8 `[n, H, W, C]`.

    Raises:
      UserError: another run is there, or it can't be written to.
    """
    values = flags.FLAGS.flag_values_dict()
    out, num_samples = Path(values["out"]), sum(len(part.labels) for part in parts)
    if repeated is not None:
        check_recipe(repeated["recipe"], recipe)
    output = None
    if jax.process_index() == 0:
        program.check_workdir_writable(out.absolute().parent)
        output = open_output(out, recipe, model.image_shape, num_samples, values["overwrite"])
        if output.is_complete:
            logging.info("All images are in %s already.", out)
    num_done = output.num_done if output is not None else 0
    if jax.process_count() > 1:
        num_done = int(multihost_utils.broadcast_one_to_all(np.int32(num_done)))
    batches = stream_with_progress(model, parts, seed, values["batch_size"], num_done)
    for images, labels in batches:
        if output is not None:
            output.append(images, labels)
        yield num_done, images
        num_done += len(images)
    if output is None:
        return
    made = output.finish()
    logging.info("%d images are in %s.", num_samples, out)
    if repeated is not None:
        is_same = made["results"]["images_sha256"] == repeated["results"]["images_sha256"]
        (logging.info if is_same else logging.warning)(
            "The images are %s those of %s.",
            "to the byte" if is_same else "not to the byte",
            values["from_json"],
        )


def main(_: Sequence[str]) -> None:
    """Runs the program."""
    program.initialize_distributed()
    request, repeated = asked_for(
        "cfjax.sample",
        lambda: request_from_flags(flags.FLAGS["num_samples"].value, prompt=prompt_from_flags()),
    )
    model = request.load(mesh_from_flags())
    settings = request.settings(model)
    recipe = recipe_of("cfjax.sample", request, model, settings)
    if request.prompt:
        documents = documents_of(request.prompt, request.num_samples, model)
        labels = prompt_indices(request.prompt, request.num_samples)
        number = request.prompt["images_per_document"]
        part = Part(labels, settings, documents=documents, images_per_document=number)
        recipe |= recipe_of_prompts(model, documents)
    else:
        part = Part(request.labels(model), settings)
    collections.deque(write(recipe, repeated, model, [part], request.seed), maxlen=0)


def define_output_flags() -> None:
    """Defines the flags of what is written."""
    flags.DEFINE_string("out", None, "A .png, a .npz, a .array_record or a folder.", required=True)
    flags.DEFINE_bool("overwrite", False, "Replace the output of another run.")
    flags.DEFINE_list("classes", [], "Classes of the images, over and over.")
    flags.DEFINE_string("from_json", None, "The JSON of an output, to make the same bytes again.")


def define_flags() -> None:
    """Defines the program's flags."""
    define_sampling_flags(checkpoint_is_required=False)
    define_device_flags()
    define_output_flags()
    define_prompt_flags()
    flags.DEFINE_integer(
        "num_samples", 100, "How many images; after prompts, how many documents.", lower_bound=1
    )


if __name__ == "__main__":
    define_flags()
    program.run(main)
