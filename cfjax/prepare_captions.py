"""Prepares captioned images: `python -m cfjax.prepare_captions --source pictures --out prepared`.

From a folder of images with a `captions.jsonl`, whose lines are
`{"image": "relative/path.jpg", "captions": ["...", ...]}` or
`{"image": "relative/path.jpg", "caption": "..."}`, to shards that training reads at random. Each image
is decoded once, so that what is broken is found now. Run it again after a kill, and it makes what is
missing.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags, logging

from cfjax import program
from cfjax.data.caption_listing import CAPTIONS_FILE, CaptionedImage, list_captioned, pack_captions
from cfjax.data.captioned_records import KIND, read_captions
from cfjax.data.image_records import Storing
from cfjax.data.image_shards import write_image_set
from cfjax.data.records import verify_checksums
from cfjax.data.splits import held_out
from cfjax.prepare_images import define_set_flags


def split_captioned(
    images: Sequence[CaptionedImage], share: float
) -> dict[str, list[CaptionedImage]]:
    """Which images are for training and which are held out, each with all its captions.

    Args:
      images: in order.
      share: that is held out, chosen by a hash of the names; 0 for none.

    Returns:
      The images of each split that has any.
    """
    names = [it.image.name for it in images]
    is_held_out = held_out(names, [0] * len(names), share)
    splits: dict[str, list[CaptionedImage]] = {"train": [], "held_out": []}
    for image, held in zip(images, is_held_out, strict=True):
        splits["held_out" if held else "train"].append(image)
    return {name: members for name, members in splits.items() if members}


def write_captioned_set(
    folder: Path,
    images: Sequence[CaptionedImage],
    skipped_lines: Sequence[dict[str, str]],
    storing: Storing,
    *,
    examples_per_shard: int,
    on_corrupt: str,
    num_processes: int,
) -> dict[str, Any]:
    """Makes what is missing of a set; see `cfjax.data.image_shards.write_image_set`.

    Args:
      folder: of the set.
      images: with their captions, in order.
      skipped_lines: `{"name", "reason"}` of lines that were left out, for the manifest.
      storing: how the images are stored.
      examples_per_shard: images in a shard, but for the last one and what is skipped.
      on_corrupt: "refuse" an image that can't be decoded, or "skip" it and say so in the manifest.
      num_processes: that decode and encode; with 1, this one.

    Returns:
      The manifest, see `cfjax.data.records.read_manifest`.

    Raises:
      UserError: images are broken and to be refused; the folder holds another set, or can't be
        written to.
    """
    return write_image_set(
        folder,
        [it.image for it in images],
        (),
        storing,
        examples_per_shard=examples_per_shard,
        on_corrupt=on_corrupt,
        num_processes=num_processes,
        kind=KIND,
        about={"skipped_lines": list(skipped_lines)},
        files={CAPTIONS_FILE: pack_captions((it.image.name, it.captions) for it in images)},
    )


def main(_: Sequence[str]) -> None:
    """Runs the program."""
    values = flags.FLAGS.flag_values_dict()
    storing = Storing(values["store"], values["size"], values["channels"], values["jpeg_quality"])
    images, skipped_lines = list_captioned(values["source"], values["on_corrupt"])
    splits, skipped = {"train": images}, {"train": skipped_lines}
    if values["held_out_source"]:
        splits["held_out"], skipped["held_out"] = list_captioned(
            values["held_out_source"], values["on_corrupt"]
        )
    else:
        splits = split_captioned(images, values["held_out_share"])
    program.check_workdir_writable(values["out"])
    for split, members in splits.items():
        lines = skipped.get(split, [])
        for line in lines:
            logging.warning("skipped: %s, %s", CAPTIONS_FILE, line["reason"])
        folder = Path(values["out"]).expanduser() / split
        manifest = write_captioned_set(
            folder,
            members,
            lines,
            storing,
            examples_per_shard=values["examples_per_shard"],
            on_corrupt=values["on_corrupt"],
            num_processes=values["processes"] or os.cpu_count(),
        )
        for image in manifest["skipped"]:
            logging.warning("skipped: %s", image["reason"])
        captions = read_captions(folder, manifest)
        if values["verify"]:
            verify_checksums(folder, manifest)
        logging.info(
            "%s: %d images with %d captions in %d shards, %d skipped%s.",
            folder,
            manifest["num_records"],
            sum(len(texts) for _, texts in captions),
            len(manifest["shards"]),
            manifest["num_skipped"],
            ", checksums verified" if values["verify"] else "",
        )


def define_flags() -> None:
    """Defines the program's flags."""
    flags.DEFINE_string("source", None, "Folder of images with a captions.jsonl.", required=True)
    define_set_flags()


if __name__ == "__main__":
    define_flags()
    program.run(main)
