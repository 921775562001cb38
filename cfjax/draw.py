"""Draws a run: `python -m cfjax.draw --checkpoint runs/mnist --out runs/mnist/pictures`.

- `samples.png`: a row a class, a column a number of AR steps; one column is one trained model at one
  place of the factorization plane.
- `factorization_plane.png`: how one image emerges along AR steps and noise levels.
- `training_curves.png`, if the checkpoint lies in its run's workdir.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags, logging

from cfjax import program
from cfjax.data.images import to_uint8
from cfjax.metric_log import METRICS_FILE, read_metrics
from cfjax.models.patches import unpatchify
from cfjax.paths import absolute
from cfjax.sampler import Sampler
from cfjax.sampling_flags import (
    define_sampling_flags,
    integers,
    load_sampler,
    sampling_overrides,
)
from cfjax.visualization import (
    MISSING,
    emerging_images,
    paint_missing,
    save_factorization_plane,
    save_samples_by_ar_steps,
    save_training_curves,
)

MAX_ROWS = 10
NUM_NOISE_LEVELS = 8


def default_ar_steps(num_tokens: int, side: int) -> tuple[int, ...]:
    """From pure diffusion to pure AR: 1, 2, 4, as many as the grid has rows, and L."""
    return tuple(sorted({s for s in (1, 2, 4, side, num_tokens) if s <= num_tokens}))


def samples_by_ar_steps(
    sampler: Sampler, ar_steps: Sequence[int], seed: int, overrides: dict
) -> np.ndarray:
    """uint8 `[classes, AR steps, H, W, C]`: the same seed everywhere."""
    labels = np.arange(min(MAX_ROWS, sampler.model.num_classes))
    columns = [
        sampler.generate(labels, seed=seed, num_ar_steps=num_ar_steps, **overrides)
        for num_ar_steps in ar_steps
    ]
    return np.stack(columns, axis=1)


def factorization_plane(
    sampler: Sampler,
    label: int,
    num_ar_steps: int,
    seed: int,
    overrides: dict,
    num_noise_levels: int = NUM_NOISE_LEVELS,
) -> tuple[np.ndarray, list[int]]:
    """Frames uint8 `[AR steps, noise levels, H, W, 3]` and the timestep of each column.

    Where AR steps differ in denoising steps, the timesteps are those of the first. There are fewer
    noise levels than asked for where all AR steps have fewer denoising steps.
    """
    trajectory, settings = sampler.trajectory(label, seed, num_ar_steps=num_ar_steps, **overrides)
    shown = [
        np.linspace(0, schedule.num_timesteps - 1, num_noise_levels).round().astype(int)
        for schedule in settings.schedules
    ]
    if all(schedule == settings.schedules[0] for schedule in settings.schedules):
        shown = [np.unique(shown[0])] * len(shown)
    frames = emerging_images(trajectory.token_order[0], [x[:, 0] for x in trajectory.x_t], shown)
    flat = frames.reshape(-1, *frames.shape[2:])
    generated = unpatchify(flat, sampler.config.model.patch_size, sampler.model.grid)
    images = sampler.to_images(np.asarray(generated))
    rgb = paint_missing(images, to_uint8(np.nan_to_num(images)))
    # After denoising step d the sample is at the timestep that comes next; clean at the end.
    timesteps = np.append(settings.schedules[0].timestep_map[::-1], 0)[shown[0] + 1]
    return rgb.reshape(*frames.shape[:2], *rgb.shape[1:]), timesteps.tolist()


def emergence_frames(
    sampler: Sampler,
    label: int,
    num_ar_steps: int = 7,
    seed: int = 0,
    num_noise_levels: int = NUM_NOISE_LEVELS,
    **overrides: Any,
) -> np.ndarray:
    """One image emerging, for an animation: AR step after AR step, each from noise to clean.

    Args:
      sampler: the model.
      label: class of the image.
      num_ar_steps: S.
      seed: as in `Sampler.generate`; it is the first image of this seed.
      num_noise_levels: frames of each AR step, fewer if it has fewer denoising steps.
      **overrides: fields of `config.sampling`.

    Returns:
      uint8 `[frames, H, W, 3]`; tokens to come are blue, in the first frame all of them.

    Raises:
      UserError: an unknown field, or a value out of range.
    """
    plane, _ = factorization_plane(sampler, label, num_ar_steps, seed, overrides, num_noise_levels)
    frames = plane.reshape(-1, *plane.shape[2:])
    return np.concatenate([np.broadcast_to(MISSING, frames[:1].shape), frames])


def main(_: Sequence[str]) -> None:
    """Runs the program."""
    values = flags.FLAGS.flag_values_dict()
    out, seed, overrides = Path(values["out"]), values["seed"], sampling_overrides()
    sampler = load_sampler()
    model = sampler.model
    ar_steps = integers("ar_steps", values["ar_steps"]) or default_ar_steps(
        model.num_tokens, model.grid[0]
    )
    for num_ar_steps in ar_steps:  # refused before the first is drawn
        sampler.settings(overrides | {"num_ar_steps": num_ar_steps})
    sampler.check_labels([values["class"]])
    program.check_workdir_writable(out)

    images = samples_by_ar_steps(sampler, ar_steps, seed, overrides)
    save_samples_by_ar_steps(
        out / "samples.png",
        images,
        [str(label) for label in range(len(images))],
        [f"S = {num_ar_steps}" for num_ar_steps in ar_steps],
    )
    plane_ar_steps = min(values["plane_ar_steps"], model.num_tokens)
    frames, timesteps = factorization_plane(
        sampler, values["class"], plane_ar_steps, seed, overrides
    )
    save_factorization_plane(
        out / "factorization_plane.png", frames, range(1, plane_ar_steps + 1), timesteps
    )
    drawn = ["samples.png", "factorization_plane.png"]
    if (absolute(values["checkpoint"]) / METRICS_FILE).exists():
        save_training_curves(out / "training_curves.png", read_metrics(values["checkpoint"]))
        drawn.append("training_curves.png")
    logging.info("%s are in %s.", ", ".join(drawn), out)


def define_flags() -> None:
    """Defines the program's flags."""
    define_sampling_flags(one_number_of_ar_steps=False)
    flags.DEFINE_string("out", None, "Folder of the pictures.", required=True)
    flags.DEFINE_list("ar_steps", [], "Columns of samples.png; by default 1 to L.")
    flags.DEFINE_integer("class", 3, "Class of the image of factorization_plane.png.")
    flags.DEFINE_integer("plane_ar_steps", 7, "Its AR steps.", lower_bound=1)


if __name__ == "__main__":
    define_flags()
    program.run(main)
