"""Encoded images: moments of the autoencoder's latents as records of one fixed layout.

A record holds the moments of an image and of its mirror image, so that training picks the flip
without the autoencoder, and samples from the moments anew each time. They are what
`AutoencoderKL.encode_parameters` gives, the log-variances unclipped, and `split_moments` reads them.
"""

from collections.abc import Sequence
from os import PathLike

import ml_dtypes
import numpy as np

from cfjax.data.records import RecordReader, RecordSource, read_manifest, shards_of
from cfjax.errors import UserError, check_choice
from cfjax.paths import absolute

KIND = "moments"
# By name, how numbers lie in a record and what they are; NumPy has no bfloat16 of its own.
DTYPES = {
    "bfloat16": (np.dtype("<u2"), np.dtype(ml_dtypes.bfloat16)),
    "float32": (np.dtype("<f4"), np.dtype(np.float32)),
}


def record_dtype(size: int, channels: int, dtype: str) -> np.dtype:
    """The layout of a record, little-endian and without gaps.

    Args:
      size: H = W of the latents.
      channels: C of the latents; moments have 2 C, means and log-variances.
      dtype: "bfloat16" or "float32".

    Returns:
      A structured dtype: `label` int32, `source_id` int64 (the image's number in what was encoded),
      `moments [2, H, W, 2 C]`, of the image and of its mirror image.

    Raises:
      UserError: another dtype.
    """
    check_choice("dtype of moments", dtype, DTYPES)
    stored, _ = DTYPES[dtype]
    moments = ("moments", stored, (2, size, size, 2 * channels))
    return np.dtype([("label", "<i4"), ("source_id", "<i8"), moments])


def pack(moments: np.ndarray, label: int, source_id: int) -> bytes:
    """A record of moments `[2, H, W, 2 C]` in bfloat16 or float32."""
    _, size, _, channels = moments.shape
    record = np.empty((), record_dtype(size, channels // 2, moments.dtype.name))
    record["label"], record["source_id"] = label, source_id
    record["moments"] = moments.view(record["moments"].dtype)
    return record.tobytes()


def unpack(records: Sequence[bytes], dtype: np.dtype) -> np.ndarray:
    """Records as one structured array `[n]`."""
    return np.frombuffer(b"".join(records), dtype)


class LatentsSource(RecordSource):
    """Moments that `cfjax.encode` wrote. See `cfjax.data.sources.Source`.

    Attributes:
      folder: of the split.
      description: how the set was made, from its manifest.
    """

    def __init__(
        self,
        path: str | PathLike,
        split: str,
        size: int,
        channels: int,
        on_corrupt: str = "refuse",
    ):
        """Opens all shards.

        Args:
          path: the folder of the set, with a folder a split.
          split: "train" or "held_out".
          size: H = W of the latents.
          channels: C of the latents.
          on_corrupt: "refuse" a damaged shard or record, or "skip" it and name it in the log.

        Raises:
          UserError: the set is missing, damaged, or of other latents.
        """
        folder = absolute(path) / split
        if not str(path) or not folder.exists():
            raise UserError(
                f"there is no folder {folder}; set data.path to one that cfjax.encode made."
            )
        manifest = read_manifest(folder, KIND)
        self.folder, self.description = folder, manifest["description"]
        found = tuple(self.description[name] for name in ("size", "channels"))
        if found != (size, channels):
            raise UserError(
                f"data.size {size} with data.channels {channels} does not fit {folder}, whose latents"
                f" have {found[0]} and {found[1]}; set them to those."
            )
        self.class_names = tuple(self.description["class_names"])
        self.image_shape = (size, size, channels)
        self._stored = record_dtype(size, channels, self.description["dtype"])
        _, self._dtype = DTYPES[self.description["dtype"]]
        mend = "delete it and run cfjax.encode again"
        self._reader = RecordReader(shards_of(folder, manifest), on_corrupt, mend)

    def examples_at(self, indices: Sequence[int]) -> dict[str, np.ndarray]:
        records = unpack(self._reader.records_at(indices), self._stored)
        return {
            "moments": records["moments"].view(self._dtype),
            "label": records["label"].astype(np.int32),
            "source_id": records["source_id"].astype(np.int64),
        }


def check_autoencoder(source: LatentsSource, checksum: str, scale: float) -> None:
    """Refuses latents that are not those of an autoencoder, or not for its scale.

    Args:
      source: the latents.
      checksum: sha256 of the autoencoder's weights.
      scale: by which its latents are to be multiplied.

    Raises:
      UserError: they are of another autoencoder, or for another scale.
    """
    found = source.description.get("autoencoder_sha256")
    if found != checksum:
        raise UserError(
            f"the latents in {source.folder} are those of an autoencoder whose weights have the"
            f" sha256 {found}, but that of autoencoder.path has {checksum}; set autoencoder.path to"
            " the former or run cfjax.encode again into another folder."
        )
    found = source.description.get("scale")
    if found != scale:
        raise UserError(
            f"the latents in {source.folder} were encoded for the scale {found}, but that of the"
            f" autoencoder is {scale}; convert the autoencoder with --scale={found} or run cfjax.encode"
            " again into another folder."
        )
