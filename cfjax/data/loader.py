"""Endless training batches: shuffled, split over processes, resumable at any example.

The data are one endless stream of positions: position p holds an example that depends on the seed
and p alone, and each epoch is shuffled anew. How many processes read the stream, and where a run
was interrupted, changes nothing.
"""

from collections.abc import Iterator
from typing import Self

import grain
import numpy as np

from cfjax.data.images import to_model_range
from cfjax.data.sources import Source

_PREFETCHED_BATCHES = 4
_ENDLESS = 2**60


class TrainLoader:
    """Iterator of batches; a context manager that ends its threads.

    Each batch is `{"image": float32 [rows, H, W, C] in [-1, 1], "label": int32 [rows]}`.
    """

    def __init__(
        self,
        source: Source,
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
          rows: rows of the global batch that this process reads, from `sharding.batch_rows`.
          global_batch_size: examples of a batch over all processes.
          examples_seen: position in the stream of the first batch.
          horizontal_flip: mirror each example with probability 1/2.
          num_threads: that read and decode ahead.
        """
        stream = grain.MapDataset.source(source).seed(seed).shuffle().repeat()

        def read(batch: int) -> dict[str, np.ndarray]:
            positions = examples_seen + batch * global_batch_size + rows
            examples = [stream[int(position)] for position in positions]
            images = np.stack([example["image"] for example in examples])
            if horizontal_flip:
                flip = [_is_flipped(seed, position) for position in positions]
                images[flip] = images[flip, :, ::-1]
            labels = np.array([example["label"] for example in examples], np.int32)
            return {"image": to_model_range(images), "label": labels}

        options = grain.ReadOptions(
            num_threads=num_threads, prefetch_buffer_size=_PREFETCHED_BATCHES
        )
        self._batches = iter(grain.MapDataset.range(_ENDLESS).map(read).to_iter_dataset(options))

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        return next(self._batches)

    def close(self) -> None:
        """Ends the threads; no batch can be read after."""
        self._batches.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _is_flipped(seed: int, position: int) -> bool:
    return bool(np.random.default_rng((seed, int(position))).random() < 0.5)
