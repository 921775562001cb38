"""Encodes images once: `python -m cfjax.encode --config CONFIG --dataset NAME[:PATH] --out FOLDER`.

`--config` is that of a training on latents, for which the set is made: its `data.size` and
`data.channels` are those of the latents. `--dataset` names the pixels: `mnist`, `image_folder:PATH`,
`array_record:PATH` or `tfds:NAME:DATA_DIR`; they are centre-cropped to what the autoencoder makes
`data.size` of. Training reads the result by `--config.data.path=FOLDER`.

A record holds the moments of an image and of its mirror image. The bytes depend on the images, the
autoencoder, the flags and the kind of device, not on the number of devices and processes; every
process works on shards of its own. Run it again after a kill, and it makes what is missing.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from absl import flags, logging
from ml_collections import ConfigDict

from cfjax import build_data, processes, program
from cfjax.autoencoder_files import Autoencoder
from cfjax.build_data import DTYPES
from cfjax.config_loading import define_config_flag
from cfjax.data import latents
from cfjax.data.latent_shards import write_latent_set
from cfjax.data.record_shards import check_on_disk
from cfjax.data.sources import SPLITS, Source, open_dataset, parse_dataset
from cfjax.encode_verify import verify
from cfjax.errors import UserError, check_choice
from cfjax.latent_encoder import LatentEncoder


def load_autoencoder(config: ConfigDict, folder: str | None) -> Autoencoder:
    """The autoencoder that makes the latents of a config.

    Args:
      config: of a training on latents.
      folder: of the autoencoder, instead of `config.autoencoder.path`.

    Raises:
      UserError: the config sees pixels; no autoencoder is named, or it is missing, damaged, or does
        not fit the config.
    """
    if not build_data.sees_latents(config):
        raise UserError(
            f"the config sees pixels of data.name {config.data.name!r}; pass one of a training on"
            " latents, or set data.name=latents with the size and the channels of the latents."
        )
    folder = folder or config.autoencoder.path
    if not folder:
        raise UserError("no autoencoder is named; pass its folder by --vae or autoencoder.path.")
    config = config.copy_and_resolve_references()
    config.autoencoder.path = folder
    return build_data.autoencoder(config)


def describe(
    config: ConfigDict,
    autoencoder: Autoencoder,
    split: str,
    dataset: str,
    dtype: str,
    images_per_device: int,
) -> dict[str, Any]:
    """What fixes the bytes of a set, but for the images themselves, as JSON values.

    Args:
      config: of the training.
      autoencoder: that encodes.
      split: of the dataset.
      dataset: as `--dataset` has it; where its data lie doesn't matter.
      dtype: of the moments.
      images_per_device: at a time; on some devices the last bits of a result depend on it.
    """
    module, (name, _, tfds_name) = autoencoder.module, parse_dataset(dataset)
    return {
        "dataset": f"{name}:{tfds_name}" if tfds_name else name,
        "split": split,
        "autoencoder_sha256": autoencoder.checksum,
        "autoencoder_dtype": config.autoencoder.dtype,
        "scale": module.scale,
        "size": config.data.size,
        "channels": module.latent_channels,
        "dtype": dtype,
        "crop": "adm",
        "image_size": config.data.size * module.downsampling,
        "image_channels": module.image_channels,
        "batch_size": images_per_device,
    }


def encode(
    config: ConfigDict,
    dataset: str,
    out: str,
    *,
    vae: str | None = None,
    splits: Sequence[str] = SPLITS,
    dtype: str = "bfloat16",
    examples_per_shard: int = 8192,
    images_per_device: int = 8,
    num_verified: int = 0,
) -> dict[str, dict[str, Any]]:
    """Makes what is missing of the sets of a dataset.

    Args:
      config: of a training on latents.
      dataset: of pixels, see `parse_dataset`.
      out: folder of the sets, one a split; on several hosts, on storage that all share.
      vae: folder of the autoencoder, instead of `config.autoencoder.path`.
      splits: "train", "held_out".
      dtype: of the moments, "bfloat16" or "float32".
      examples_per_shard: images in a shard.
      images_per_device: that a device takes at a time.
      num_verified: images of each split whose reconstructions are compared with them.

    Returns:
      The manifest of each split.

    Raises:
      UserError: bad input, or images are broken and to be refused.
    """
    check_on_disk(out)
    parse_dataset(dataset)
    check_choice("dtype of moments", dtype, DTYPES)
    autoencoder = load_autoencoder(config, vae)
    sources = {
        split: open_dataset(
            dataset,
            split,
            size=config.data.size * autoencoder.module.downsampling,
            channels=autoencoder.module.image_channels,
            num_classes=config.data.num_classes,
            on_corrupt=config.data.on_corrupt,
            replaces=False,
        )
        for split in splits
    }
    program.check_workdir_writable(out)
    encoder = LatentEncoder(autoencoder, images_per_device, DTYPES[dtype])
    manifests = {}
    for split, source in sources.items():
        folder = Path(out).expanduser() / split
        manifests[split] = write_latent_set(
            folder,
            source,
            encoder.encode,
            describe(config, autoencoder, split, dataset, dtype, images_per_device),
            rows=encoder.rows,
            examples_per_shard=examples_per_shard,
            on_corrupt=config.data.on_corrupt,
            num_threads=config.data.num_threads,
        )
        _report(folder, manifests[split])
        if num_verified and jax.process_index() == 0:
            _verify(folder, source, autoencoder, num_verified)
        processes.wait_for_all(f"the verification of {folder}")
    return manifests


def _report(folder: Path, manifest: dict[str, Any]) -> None:
    for skipped in manifest["skipped"]:
        logging.info("skipped: %s", skipped["reason"])
    logging.info(
        "%s: moments of %d images of %d classes in %d shards, %d skipped.",
        folder,
        manifest["num_records"],
        len(manifest["description"]["class_names"]),
        len(manifest["shards"]),
        manifest["num_skipped"],
    )


def _verify(folder: Path, source: Source, autoencoder: Autoencoder, count: int) -> None:
    verified = verify(folder, source, autoencoder, count)
    logging.info(
        "%s: checksums verified; reconstructions of %d images and their mirror images have a PSNR of"
        " %.2f dB on average and %.2f dB at least; see %s.",
        folder,
        len(verified.psnr),
        verified.psnr.mean(),
        verified.psnr.min(),
        verified.picture,
    )


def main(_: Sequence[str]) -> None:
    """Runs the program."""
    program.initialize_distributed()
    values = flags.FLAGS.flag_values_dict()
    encode(
        values["config"],
        values["dataset"],
        values["out"],
        vae=values["vae"],
        splits=SPLITS if values["split"] == "both" else (values["split"],),
        dtype=values["dtype"],
        examples_per_shard=values["examples_per_shard"],
        images_per_device=values["batch_size"],
        num_verified=values["verify"],
    )


def define_flags() -> None:
    """Defines the program's flags."""
    define_config_flag()
    flags.DEFINE_string(
        "dataset",
        None,
        "mnist, image_folder:PATH, array_record:PATH or tfds:NAME:DATA_DIR.",
        required=True,
    )
    flags.DEFINE_string("vae", None, "Folder of the autoencoder; by default autoencoder.path.")
    flags.DEFINE_string("out", None, "Folder of the sets, one a split.", required=True)
    flags.DEFINE_enum("split", "both", (*SPLITS, "both"), "Which part of the dataset.")
    flags.DEFINE_enum("dtype", "bfloat16", [*latents.DTYPES], "Of the moments that are stored.")
    flags.DEFINE_integer("examples_per_shard", 8192, "Images in a shard.", lower_bound=1)
    flags.DEFINE_integer("batch_size", 8, "Images at a time on each device.", lower_bound=1)
    flags.DEFINE_integer(
        "verify", 0, "Compare all checksums, and so many reconstructions.", lower_bound=0
    )
    program.define_distributed_flags()


if __name__ == "__main__":
    define_flags()
    program.run(main)
