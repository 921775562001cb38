"""Endless training batches: shuffled, split over processes, resumable at any example.

The data are one endless stream of positions: position p holds an example that depends on the seed
and p alone, and each epoch is shuffled anew. How many processes read the stream, and where a run
was interrupted, changes nothing.
"""

import zlib
from collections.abc import Callable, Iterator
from typing import Self, TypeVar

import grain
import numpy as np

from cfjax.data.document_rows import PackedDocuments
from cfjax.data.images import to_model_range
from cfjax.data.sources import Source
from cfjax.errors import UserError

_PREFETCHED_BATCHES = 4
_ENDLESS = 2**60

_Batch = TypeVar("_Batch")


class TrainLoader:
    """Iterator of batches; a context manager that ends its threads.

    Each batch is `{"image": float32 [rows, H, W, C] in [-1, 1], "label": int32 [rows]}`; of latents,
    instead of images, `"moments": float32 [rows, H, W, 2 C]`. Of documents, a batch is rows as
    `cfjax.documents.lay_out` makes them, of which "image" is float32 too.
    """

    def __init__(
        self,
        source: Source | PackedDocuments,
        *,
        seed: int,
        rows: np.ndarray,
        global_batch_size: int,
        examples_seen: int = 0,
        horizontal_flip: bool = False,
        num_threads: int = 4,
    ):
        """Starts to read ahead.

        Args:
          source: the images.
          seed: of the shuffle and the flips.
          rows: rows of the global batch that this process reads, ascending, from
            `sharding.batch_rows`.
          global_batch_size: examples of a batch over all processes.
          examples_seen: position in the stream of the first batch.
          horizontal_flip: mirror each example with probability 1/2.
          num_threads: that read and decode ahead, each a batch; with 0, a batch is read when it
            is asked for.

        Raises:
          UserError: `num_threads` is negative.
        """
        seed %= 2**64
        stream = grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat()
        _ = stream[0]  # grain sets itself up at the first access, which threads must not share

        def read(batch: int) -> dict[str, np.ndarray]:
            positions = examples_seen + batch * global_batch_size + rows
            indices = np.array([stream[position] for position in positions.tolist()])
            if isinstance(source, PackedDocuments):
                return _as_trained_on_documents(source.rows_at(indices, positions))
            flip = _is_flipped(seed, positions) if horizontal_flip else np.zeros(len(rows), bool)
            return _as_trained_on(source.examples_at(indices), flip)

        self._batches = read_ahead(read, _ENDLESS, num_threads)

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        """The next batch; raises a `UserError` if an image can no longer be read."""
        return next(self._batches)

    def close(self) -> None:
        """Ends the threads; no batch can be read after."""
        self._batches.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_ahead(
    read: Callable[[int], _Batch], count: int, num_threads: int
) -> grain.DatasetIterator[_Batch]:
    """The batches `read(0)`, `read(1)` and so on, in order; its `close()` ends the threads.

    Args:
      read: from several threads, each another batch.
      count: of the batches.
      num_threads: that read ahead; with 0, a batch is read when it is asked for.

    Raises:
      UserError: `num_threads` is negative.
    """
    if num_threads < 0:
        raise UserError(f"data.num_threads must be at least 0, got {num_threads}.")
    options = grain.ReadOptions(
        num_threads=num_threads, prefetch_buffer_size=max(_PREFETCHED_BATCHES, num_threads)
    )
    return iter(grain.MapDataset.range(count).map(read).to_iter_dataset(options))


def _as_trained_on(examples: dict[str, np.ndarray], flip: np.ndarray) -> dict[str, np.ndarray]:
    if "moments" in examples:
        moments = examples["moments"][np.arange(len(flip)), flip.astype(int)]
        return {"moments": moments.astype(np.float32), "label": examples["label"]}
    images = examples["image"]
    images[flip] = images[flip, :, ::-1]
    return {"image": to_model_range(images), "label": examples["label"]}


def _as_trained_on_documents(rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return rows | {"image": to_model_range(rows["image"])}


def _is_flipped(seed: int, positions: np.ndarray) -> np.ndarray:
    """A coin toss at each of the ascending positions, bool `[n]`."""
    # Philox yields four words a count, so it starts anywhere in the stream at once.
    first = int(positions[0]) // 4
    key = np.array([seed, zlib.crc32(b"horizontal_flip")], np.uint64)
    words = np.random.Philox(key=key, counter=first).random_raw(int(positions[-1]) - 4 * first + 1)
    return words[positions - 4 * first] >= 2**63
