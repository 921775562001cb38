"""What the programs of evaluation share: the extractor, features of images, and the reference."""

import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from absl import flags
from jax.experimental import multihost_utils
from tqdm import tqdm

from cfjax import inception_files, processes
from cfjax.data.image_files import image_paths
from cfjax.data.image_sets import ImageSet, open_images
from cfjax.data.sources import Source
from cfjax.errors import UserError
from cfjax.evaluation import references
from cfjax.evaluation.classifier import load_or_train
from cfjax.evaluation.extractors import ClassifierExtractor, Extractor, Features, InceptionExtractor
from cfjax.evaluation.references import Reference, ReferenceBuilder

Sources = tuple[Source, Source]  # training and held-out


def define_inception_flags(required: bool) -> None:
    """Defines the flags that `inception_from_flags` reads."""
    flags.DEFINE_string(
        "inception_weights",
        None,
        "From cfjax.convert --from=inception." + ("" if required else " By default a classifier."),
        required=required,
    )
    flags.DEFINE_integer(
        "inception_images_per_device", 32, "At a time; others round otherwise.", lower_bound=1
    )


def inception_from_flags(mesh: jax.sharding.Mesh) -> InceptionExtractor:
    """The extractor that the flags name; see `inception`."""
    values = flags.FLAGS.flag_values_dict()
    return inception(values["inception_weights"], mesh, values["inception_images_per_device"])


def inception(
    path: str, mesh: jax.sharding.Mesh, images_per_device: int = 32
) -> InceptionExtractor:
    """The ADM suite's extractor.

    Raises:
      UserError: the weights are missing, or are others.
    """
    return InceptionExtractor(inception_files.load(path), mesh, images_per_device)


def classifier(folder: Path, sources: Sources, dataset: str) -> ClassifierExtractor | None:
    """The classifier of the real images, on the first process, which trains it; None on others."""
    made = None
    if jax.process_index() == 0:
        made = ClassifierExtractor(load_or_train(folder, *sources), dataset)
    processes.wait_for_all("the classifier")
    return made


def features_of(
    extractor: Extractor | None, batches: Iterator[np.ndarray], first: int
) -> Iterator[Features]:
    """Features of images, batch by batch, on the first process; all processes call it.

    Args:
      extractor: None on processes that only take part in making the images.
      batches: uint8 `[n, H, W, C]`, the same on all processes.
      first: index of the first image.
    """
    for images in batches:
        if extractor is not None and (extractor.is_collective or jax.process_index() == 0):
            features = extractor(images, first)
            if jax.process_index() == 0:
                yield features
        first += len(images)


def same_on_all(number: int) -> int:
    """The first process's number."""
    if jax.process_count() == 1:
        return number
    return int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def reference_of_images(
    images: ImageSet, name: str, extractor: Extractor | None, batch_size: int, state: Path | None
) -> Reference | None:
    """The reference of real images, on the first process; all processes call it.

    Args:
      images: at least 2.
      name: of the reference.
      extractor: of the features.
      batch_size: images that are read at a time.
      state: file that keeps what is done, so that a killed program goes on; or None.

    Raises:
      UserError: see `ImageSet` and `ReferenceBuilder`.
    """
    is_first = jax.process_index() == 0
    builder = None
    if is_first:
        builder = ReferenceBuilder(
            name, images.count, images.image_shape, state, extractor.description
        )
    first = same_on_all(builder.num_done if builder is not None else 0)
    with progress("reference", images.count, first) as bar:
        for features in features_of(extractor, images.read(first, batch_size), first):
            builder.add(features)
            bar.update(len(features))
    return builder.finish() if builder is not None else None


def reference_of_file(
    path: str, extractor: Extractor | None, batch_size: int, state: Path | None
) -> Reference | None:
    """The reference that a `.npz` or a folder of images is, on the first process.

    Statistics are taken as they are; images beside them, in `arr_0`, give the features for
    precision, recall and KID, as in the ADM suite.

    Raises:
      UserError: nothing is there, or it is of other features.
    """
    if not Path(path).expanduser().exists():
        raise UserError(f"there is no reference at {path}; pass a .npz or a folder of images.")
    if Path(path).expanduser().is_dir():
        images = open_images(path)
        name = f"{images.count} images in {path}, sha256 {checksum_of(path)}"
        return reference_of_images(images, name, extractor, batch_size, state)
    # Every process looks, so that all know whether images are to be read.
    found = references.load(path, extractor) if extractor is not None else None
    if found is not None and (found.features is not None or not references.has_images(path)):
        return found
    images = open_images(path)
    name = f"{Path(path).name}: {images.count} images, sha256 {references.file_checksum(path)}"
    of_images = reference_of_images(images, name, extractor, batch_size, state)
    return of_images if found is None else references.with_images(found, of_images)


def read_with_progress(images: ImageSet, first: int, batch_size: int) -> Iterator[np.ndarray]:
    """Batches from image `first` on; a bar shows rate and time left."""
    with progress("samples", images.count, first) as bar:
        for batch in images.read(first, batch_size):
            bar.update(len(batch))
            yield batch


def checksum_of(path: str) -> str:
    """SHA-256 of a file, or of the names and contents of a folder's images."""
    if Path(path).is_file():
        return references.file_checksum(path)
    files = image_paths(Path(path).expanduser())
    listed = "".join(f"{it.name} {references.file_checksum(it)}\n" for it in files)
    return hashlib.sha256(listed.encode()).hexdigest()[:12]


def progress(title: str, total: int, initial: int) -> tqdm:
    """A bar with rate and time left, on the first process."""
    return tqdm(
        total=total,
        initial=initial,
        unit="image",
        desc=title,
        disable=jax.process_index() != 0,
        file=sys.stderr,
    )
