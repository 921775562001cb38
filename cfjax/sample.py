"""Generates images: `python -m cfjax.sample --checkpoint runs/mnist --out samples.png`.

`--out` is a picture of all samples (`.png`), an array file as the ADM suite reads it (`.npz`, images
in `arr_0`, classes in `labels`), or a folder of PNGs. Image i depends on the seed, i and its class
alone.
"""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags, logging
from tqdm import tqdm

from cfjax import program, sharding
from cfjax.data.image_files import write_npz, write_png
from cfjax.errors import UserError
from cfjax.sampler import Sampler, load
from cfjax.visualization import image_grid


def define_sampling_flags(checkpoint_is_required: bool = True) -> None:
    """Defines the flags that `sampling_overrides` reads, and those of which checkpoint and keys."""
    flags.DEFINE_string(
        "checkpoint",
        None,
        "A run's workdir, or one checkpoint.",
        required=checkpoint_is_required,
    )
    flags.DEFINE_integer("train_step", None, "Which checkpoint; the latest by default.")
    flags.DEFINE_string("autoencoder", None, "Folder; by default that of the checkpoint's config.")
    flags.DEFINE_integer("seed", 0, "Of the noise and the token orders.")
    flags.DEFINE_integer("batch_size", 256, "Images at a time.", lower_bound=1)
    flags.DEFINE_string("token_order", None, "random, raster, block_raster or dilated.")
    flags.DEFINE_string("denoising_steps", None, "For each AR step: 250, ddim50 or 10,15,20.")
    flags.DEFINE_string("solver", None, "ddpm or ddim.")
    flags.DEFINE_float("guidance_scale", None, "Classifier-free guidance; 1 for none.")
    flags.DEFINE_list("guidance_interval", None, "Guided where LOW <= t < HIGH: LOW,HIGH.")


def define_device_flags() -> None:
    """Defines the flags of the mesh and of several processes."""
    flags.DEFINE_integer("fsdp", 1, "Devices over which the parameters are split.")
    flags.DEFINE_integer("tensor", 1, "Devices over which heads and MLP are split.")
    program.define_distributed_flags()


def load_sampler() -> Sampler:
    """The checkpoint that the flags name, on the mesh that they name."""
    values = flags.FLAGS.flag_values_dict()
    mesh = sharding.make_mesh(fsdp=values["fsdp"], tensor=values["tensor"])
    return load(values["checkpoint"], values["train_step"], mesh, values["autoencoder"])


def sampling_overrides() -> dict[str, Any]:
    """The fields of `config.sampling` that flags override."""
    values = flags.FLAGS.flag_values_dict()
    names = ("token_order", "denoising_steps", "solver", "guidance_scale", "guidance_interval")
    overrides = {name: values[name] for name in names if values[name] is not None}
    if "guidance_interval" in overrides:
        overrides["guidance_interval"] = integers(
            "guidance_interval", overrides["guidance_interval"], 2
        )
    return overrides


def integers(name: str, texts: Sequence[str], count: int | None = None) -> tuple[int, ...]:
    """A flag's list of integers.

    Raises:
      UserError: one is not an integer, or there are not `count`.
    """
    try:
        values = tuple(int(text) for text in texts)
    except ValueError:
        raise UserError(
            f"--{name}={','.join(texts)} must be integers with commas between."
        ) from None
    if count is not None and len(values) != count:
        raise UserError(f"--{name}={','.join(texts)} must be {count} integers.")
    return values


def labels_of(classes: Sequence[int], num_samples: int, num_classes: int) -> np.ndarray:
    """The class of each sample: the given ones, or all, over and over; int32 `[num_samples]`."""
    cycle = np.asarray(classes if len(classes) else np.arange(num_classes), np.int32)
    return np.resize(cycle, num_samples)


def stream_with_progress(
    sampler: Sampler, labels: np.ndarray, seed: int, batch_size: int, stream_args: tuple[Any, Any]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields batches of images uint8 `[n, H, W, C]` and their labels; a bar shows rate and ETA.

    `stream_args` are from `Sampler.settings`.
    """
    done = 0
    with tqdm(
        total=len(labels),
        unit="image",
        desc=f"{len(stream_args[0].split_sizes)} AR steps",
        disable=jax.process_index() != 0,
        file=sys.stderr,
    ) as bar:
        for images in sampler.stream(labels, *stream_args, seed=seed, batch_size=batch_size):
            bar.update(len(images))
            yield images, labels[done : done + len(images)]
            done += len(images)


def main(_: Sequence[str]) -> None:
    """Runs the program."""
    program.initialize_distributed()
    values = flags.FLAGS.flag_values_dict()
    out = Path(values["out"])
    sampler = load_sampler()
    overrides = sampling_overrides()
    if values["num_ar_steps"] is not None:
        overrides["num_ar_steps"] = values["num_ar_steps"]
    split_sizes = integers("split_sizes", values["split_sizes"])
    stream_args = sampler.settings(overrides, split_sizes)
    num_classes = sampler.model.num_classes
    labels = labels_of(integers("classes", values["classes"]), values["num_samples"], num_classes)
    labels = sampler.check_labels(labels)
    folder = out if out.suffix not in (".png", ".npz") else out.parent
    program.check_workdir_writable(folder)

    batches = stream_with_progress(
        sampler, labels, values["seed"], values["batch_size"], stream_args
    )
    images = np.concatenate([images for images, _ in batches])
    if jax.process_index() != 0:
        return
    if out.suffix == ".png":
        write_png(out, image_grid(images, num_columns=min(10, len(images))))
    elif out.suffix == ".npz":
        write_npz(out, images, labels)
    else:
        for index, (image, label) in enumerate(zip(images, labels, strict=True)):
            write_png(out / f"{index:06d}_class{label}.png", image)
    logging.info("%d samples are in %s.", len(images), out)


def define_flags() -> None:
    """Defines the program's flags."""
    define_sampling_flags()
    define_device_flags()
    flags.DEFINE_string("out", None, "A .png, a .npz or a folder.", required=True)
    flags.DEFINE_integer("num_samples", 100, "How many images.", lower_bound=1)
    flags.DEFINE_list("classes", [], "Classes, over and over; all by default.")
    flags.DEFINE_integer("num_ar_steps", None, "S, equal AR steps.")
    flags.DEFINE_list("split_sizes", [], "Tokens of each AR step, instead of num_ar_steps.")


if __name__ == "__main__":
    define_flags()
    program.run(main)
