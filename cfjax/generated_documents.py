"""Images and texts that a model of documents generates, kept in files: a killed run goes on.

Document i depends on the seed, i and its prompt alone, so that blocks of documents are made and kept
one by one, and a larger number of documents begins with the same ones.
"""

import dataclasses
import hashlib
import json
import sys
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags, logging
from tqdm import tqdm

from cfjax import evaluation_inputs, sharding
from cfjax.data.image_files import write_whole
from cfjax.document_sampler import DocumentSampler
from cfjax.generation_request import Request, recipe_of
from cfjax.sampling_flags import integers, load_overrides, sampling_overrides
from cfjax.text_flags import text_overrides
from cfjax.text_sampling import TextSampling

# Of a recipe's request: where files lie, and how many documents, change none of them.
_NOT_IN_KEY = ("checkpoint", "autoencoder", "guide", "tokenizer", "num_samples")

Prompts = Callable[[np.ndarray], list[list[Any]]]


@dataclasses.dataclass(frozen=True)
class Generator:
    """Generates documents as the flags say, and keeps them in a folder.

    All processes call its methods; the first has the results, the others None.

    Attributes:
      sampler: the model.
      recipe: what fixes the images, as JSON values; the prompts are not in it.
      image_options: keyword arguments of `DocumentSampler.generate` for images.
      text: how text is generated.
      seed: of all that is drawn.
      batch_size: documents of a file, rounded down to what is made at a time, if it is more.
      folder: for the files.
    """

    sampler: DocumentSampler
    recipe: Mapping[str, Any]
    image_options: Mapping[str, Any]
    text: TextSampling
    seed: int
    batch_size: int
    folder: Path

    @classmethod
    def from_flags(cls, program: str, sampler: DocumentSampler, folder: Path) -> "Generator":
        """What the flags ask for, checked; `program` is named in the recipe.

        Raises:
          UserError: a value out of range.
        """
        values = flags.FLAGS.flag_values_dict()
        split_sizes = integers("split_sizes", values["split_sizes"])
        settings = sampler.settings(sampling_overrides(), split_sizes)
        request = Request(
            checkpoint=values["checkpoint"],
            train_step=values["train_step"],
            autoencoder=values["autoencoder"],
            guide=values["guide"],
            sampling=sampling_overrides() | load_overrides(),
            split_sizes=split_sizes,
            seed=values["seed"],
            classes=(),
            num_samples=values["num_samples"],
            tokenizer=values["tokenizer"],
        )
        return cls(
            sampler=sampler,
            recipe=recipe_of(program, request, sampler, settings),
            image_options=sampling_overrides() | {"split_sizes": split_sizes},
            text=sampler.text_sampling(text_overrides()),
            seed=values["seed"],
            batch_size=values["batch_size"],
            folder=folder,
        )

    @property
    def at_once(self) -> int:
        """Documents that are made at a time."""
        return self.sampler.config.sampling.images_per_device * sharding.num_batch_shards(
            self.sampler.mesh
        )

    def images(
        self, name: str, documents: str, prompts: Prompts, count: int, n: int = 1
    ) -> np.ndarray | None:
        """Images that follow prompts, uint8 `[count, n, H, W, C]`.

        Args:
          name: of the task, for the folder and the progress bar.
          documents: what fixes the prompts, such as the fingerprint of their set and its split.
          prompts: indices to documents as lists of parts, see `DocumentSampler.generate`.
          count: how many documents, the first of all.
          n: images that follow one another.
        """
        request = {k: v for k, v in self.recipe["request"].items() if k not in _NOT_IN_KEY}
        key = {**self.recipe, "request": request, "documents": documents, "n": n}

        def make(indices: np.ndarray) -> np.ndarray:
            made = self.sampler.generate(
                prompt=prompts(indices),
                n=n,
                seed=self.seed,
                first_index=int(indices[0]),
                **self.image_options,
            )
            return made[:, None] if n == 1 else made

        blocks = self._blocks(name, key, make, ".npz", count)
        return blocks and np.concatenate(blocks)

    def texts(self, name: str, documents: str, prompts: Prompts, count: int) -> list[str] | None:
        """A text that follows each prompt; the arguments are those of `images`."""
        key = {
            "params_sha256": self.recipe["params_sha256"],
            "versions": self.recipe["versions"],
            "dtype": self.sampler.config.sampling.dtype,
            "at_once": self.at_once,
            "text": dataclasses.asdict(self.text),
            "seed": self.seed,
            "documents": documents,
        }

        def make(indices: np.ndarray) -> list[str]:
            return self.sampler.generate(
                prompt=prompts(indices),
                what="text",
                seed=self.seed,
                first_index=int(indices[0]),
                **dataclasses.asdict(self.text),
            )

        blocks = self._blocks(name, key, make, ".json", count)
        return blocks and [text for block in blocks for text in block]

    def _blocks(self, name, key, make, suffix, count):
        """Blocks of documents, from files or made; another key has another folder."""
        text = json.dumps(key, sort_keys=True, default=str)
        folder = (
            self.folder
            / f"{name.replace(' ', '_')}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
        )
        is_first = jax.process_index() == 0
        if is_first:
            folder.mkdir(parents=True, exist_ok=True)
        block_size = self.at_once * max(1, self.batch_size // self.at_once)
        blocks = []
        with tqdm(
            total=count, unit="document", desc=name, disable=not is_first, file=sys.stderr
        ) as bar:
            for begin in range(0, count, block_size):
                indices = np.arange(begin, min(begin + block_size, count))
                path = folder / f"{begin:08}{suffix}"
                block = _read(path, len(indices)) if is_first else None
                if not evaluation_inputs.same_on_all(int(block is not None)):
                    block = make(indices)
                    if is_first:
                        _write(path, block)
                blocks.append(block)
                bar.update(len(indices))
        return blocks if is_first else None


def _read(path: Path, count: int) -> Sequence | None:
    """The first `count` documents of a block; None if they are not there or can't be read."""
    if not path.exists():
        return None
    try:
        if path.suffix == ".npz":
            with path.open("rb") as file, np.load(file) as arrays:
                block = arrays["images"]
        else:
            block = json.loads(path.read_text())
    except (OSError, ValueError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        logging.warning("%s can't be read (%s) and is made anew.", path, error)
        return None
    return block[:count] if len(block) >= count else None


def _write(path: Path, block: Sequence) -> None:
    if path.suffix == ".npz":
        write_whole(path, lambda file: np.savez(file, images=block))
    else:
        write_whole(path, lambda file: file.write(json.dumps(block, indent=1).encode()))
