"""Prepares images: `python -m cfjax.prepare_images --source pictures --out prepared`.

From a folder with one sub-folder a class, a tar file whose members lie in a folder a class, or a
folder of tar files, one a class, to shards that training reads at random
(`--config.data.name=array_record --config.data.path=prepared`). Each image is decoded once, so that
what is broken is found now. Run it again after a kill, and it makes what is missing.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from absl import flags, logging

from cfjax import program
from cfjax.data.image_listing import ListedImage, list_images
from cfjax.data.image_records import STORED_AS, Storing
from cfjax.data.image_shards import write_image_set
from cfjax.data.records import ON_CORRUPT, verify_checksums
from cfjax.data.splits import HELD_OUT_SHARE, held_out
from cfjax.errors import UserError


def split_images(
    images: Sequence[ListedImage], held_out_images: Sequence[ListedImage] | None, share: float
) -> tuple[dict[str, list[ListedImage]], list[str]]:
    """Which images are for training and which are held out.

    Args:
      images: in the order of their classes.
      held_out_images: those of the source for that, if there is one.
      share: of `images` that is held out if there is none.

    Returns:
      The images of each split that has any, and the names of the classes.

    Raises:
      UserError: an image is held out whose class has none for training.
    """
    class_names = sorted({image.class_name for image in images})
    if held_out_images is not None:
        others = {image.class_name for image in held_out_images} - set(class_names)
        if others:
            raise UserError(
                f"the held-out images have a class {min(others)!r} that is not among those for"
                f" training, such as {class_names[0]!r}; give both the same folders."
            )
        return {"train": list(images), "held_out": list(held_out_images)}, class_names
    labels = {name: label for label, name in enumerate(class_names)}
    is_held_out = held_out(
        [image.name for image in images], [labels[image.class_name] for image in images], share
    )
    splits: dict[str, list[ListedImage]] = {"train": [], "held_out": []}
    for image, held in zip(images, is_held_out, strict=True):
        splits["held_out" if held else "train"].append(image)
    return {name: members for name, members in splits.items() if members}, class_names


def main(_: Sequence[str]) -> None:
    """Runs the program."""
    values = flags.FLAGS.flag_values_dict()
    storing = Storing(values["store"], values["size"], values["channels"], values["jpeg_quality"])
    images = list_images(values["source"])
    held_out_source = values["held_out_source"]
    held_out_images = list_images(held_out_source) if held_out_source else None
    splits, class_names = split_images(images, held_out_images, values["held_out_share"])
    program.check_workdir_writable(values["out"])
    for split, members in splits.items():
        folder = Path(values["out"]).expanduser() / split
        manifest = write_image_set(
            folder,
            members,
            class_names,
            storing,
            examples_per_shard=values["examples_per_shard"],
            on_corrupt=values["on_corrupt"],
            num_processes=values["processes"] or os.cpu_count(),
        )
        for skipped in manifest["skipped"]:
            logging.warning("skipped: %s", skipped["reason"])
        if values["verify"]:
            verify_checksums(folder, manifest)
        logging.info(
            "%s: %d images of %d classes in %d shards, %d skipped%s.",
            folder,
            manifest["num_records"],
            len(class_names),
            len(manifest["shards"]),
            manifest["num_skipped"],
            ", checksums verified" if values["verify"] else "",
        )


def define_flags() -> None:
    """Defines the program's flags."""
    flags.DEFINE_string("source", None, "Folder or tar file of the images.", required=True)
    define_set_flags()


def define_set_flags() -> None:
    """Defines the flags of a set of images, with or without captions."""
    flags.DEFINE_string("out", None, "Folder of the shards.", required=True)
    flags.DEFINE_string("held_out_source", None, "The same with images that are held out.")
    flags.DEFINE_float(
        "held_out_share",
        HELD_OUT_SHARE,
        "Share of --source that is held out if there is no --held_out_source.",
        lower_bound=0.0,
        upper_bound=0.9,
    )
    flags.DEFINE_enum("store", "original", STORED_AS, "Files as they are, or crops of --size.")
    flags.DEFINE_integer("size", 0, "Height and width of the crops.", lower_bound=0)
    flags.DEFINE_integer("channels", 3, "Of the crops: 1 (grey) or 3 (RGB).")
    flags.DEFINE_integer("jpeg_quality", 95, "Of --store=jpeg.", lower_bound=1, upper_bound=100)
    flags.DEFINE_integer("examples_per_shard", 8192, "Images in a shard.", lower_bound=1)
    flags.DEFINE_integer("processes", 0, "That decode; 0 for one a core.", lower_bound=0)
    flags.DEFINE_enum("on_corrupt", "refuse", ON_CORRUPT, "What to do with what is broken.")
    flags.DEFINE_bool("verify", False, "Read all shards again and compare the checksums.")


if __name__ == "__main__":
    define_flags()
    program.run(main)
