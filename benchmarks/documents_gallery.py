"""Pictures of what models of documents do: `python -m benchmarks.documents_gallery --scenes=RUN --out=docs`.

From the repository's root, with any of `--scenes`, `--progressions` and `--transforms`, each a run's
workdir. All prompts are held out: the first that show each kind, none is picked by what comes of it.
Where images are given, they are framed.

- `documents_prompts.png`: captions, and images that the model draws of each;
- `documents_captions.png`: images, and the captions that the model writes of them;
- `documents_progressions.png`: three images, and how the model goes on; a row a rule;
- `documents_transforms.png`: examples, a query, and the model's answer; a row a transform.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags, logging

import cfjax
from cfjax import build_documents, program
from cfjax.data.progressions import NUM_TELLING, RULES
from cfjax.data.transforms import TRANSFORM_NAMES
from cfjax.document_sampler import DocumentSampler
from cfjax.errors import UserError
from cfjax.visualization import save_captioned, save_strips

NUM_PROMPTS, IMAGES_OF_PROMPT = 8, 4
NUM_CAPTIONED, CAPTIONED_COLUMNS = 12, 4
PROGRESSION_LENGTH = 18  # images of a row


def draw_prompts(model: DocumentSampler, source: Any, out: Path, seed: int) -> None:
    """Held-out captions with several images each."""
    captions = source.captions[:NUM_PROMPTS]
    prompts = [[caption] for caption in captions for _ in range(IMAGES_OF_PROMPT)]
    images = model.generate(prompt=prompts, seed=seed)
    images = images.reshape(NUM_PROMPTS, IMAGES_OF_PROMPT, *images.shape[1:])
    save_captioned(out / "documents_prompts.png", images, captions, num_columns=2)


def draw_captions(model: DocumentSampler, source: Any, out: Path, seed: int) -> None:
    """Other held-out images with the caption that the model writes of each."""
    images = source.images_at(np.arange(NUM_PROMPTS, NUM_PROMPTS + NUM_CAPTIONED))
    captions = model.caption(images, seed=seed)
    save_captioned(
        out / "documents_captions.png", images[:, None], captions, num_columns=CAPTIONED_COLUMNS
    )


def draw_progressions(model: DocumentSampler, source: Any, out: Path, seed: int) -> None:
    """A row a rule."""
    indices = _first_of_each(source.rules_at(np.arange(len(source))), len(RULES))
    given = source.sequences_at(indices)[:, :NUM_TELLING]
    num_generated = PROGRESSION_LENGTH - NUM_TELLING
    generated = model.generate(prompt=[list(it) for it in given], n=num_generated, seed=seed)
    save_strips(
        out / "documents_progressions.png",
        np.concatenate([given, generated], axis=1),
        NUM_TELLING,
        [rule.name for rule in RULES],
    )


def draw_transforms(model: DocumentSampler, source: Any, out: Path, seed: int) -> None:
    """A row a transform."""
    indices = _first_of_each(source.transforms_at(np.arange(len(source))), len(TRANSFORM_NAMES))
    given = source.sequences_at(indices)[:, :-1]
    answers = model.generate(prompt=[list(it) for it in given], seed=seed)
    save_strips(
        out / "documents_transforms.png",
        np.concatenate([given, answers[:, None]], axis=1),
        given.shape[1],
        TRANSFORM_NAMES,
    )


# What is drawn of a run of each set.
PICTURES: dict[str, Sequence[Callable[[DocumentSampler, Any, Path, int], None]]] = {
    "scenes": (draw_prompts, draw_captions),
    "progressions": (draw_progressions,),
    "transforms": (draw_transforms,),
}


def _first_of_each(kinds: np.ndarray, num_kinds: int) -> np.ndarray:
    return np.array([np.flatnonzero(kinds == kind)[0] for kind in range(num_kinds)])


def main(_: Sequence[str]) -> None:
    """Draws all pictures of the runs that are given."""
    values = flags.FLAGS.flag_values_dict()
    if not any(values[name] for name in PICTURES):
        raise UserError("there is no run to draw; pass --scenes, --progressions or --transforms.")
    out = Path(values["out"])
    program.check_workdir_writable(out)
    for name, pictures in PICTURES.items():
        if values[name] is None:
            continue
        model = cfjax.load(values[name])
        if model.config.data.name != name:
            raise UserError(f"the run {values[name]} is of {model.config.data.name}, not {name}.")
        source = build_documents.source(model.config, "held_out")
        for draw in pictures:
            draw(model, source, out, values["seed"])
    logging.info("The pictures are in %s.", out)


def define_flags() -> None:
    """Defines the program's flags."""
    for name in PICTURES:
        flags.DEFINE_string(name, None, f"A run's workdir, of {name}.")
    flags.DEFINE_string("out", "docs", "Folder of the pictures.")
    flags.DEFINE_integer("seed", 0, "Of all that is drawn.")


if __name__ == "__main__":
    define_flags()
    program.run(main)
