"""Pictures of a run: grids of samples, training curves, the factorization plane.

The only room that imports matplotlib.
"""

import textwrap
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

GIVEN = np.array([230, 120, 30], np.uint8)  # the colour of the frame around what was given
MISSING = np.array([90, 120, 170], np.uint8)  # the colour of what is yet to come


def image_grid(images: np.ndarray, num_columns: int, margin: int = 2) -> np.ndarray:
    """Tiles images row by row on white.

    Args:
      images: uint8 `[N, H, W, C]`, C of 1 or 3.
      num_columns: images side by side; the last row may be shorter.
      margin: pixels around each image.

    Returns:
      uint8 `[height, width, C]`.
    """
    count, height, width, channels = images.shape
    num_rows = -(-count // num_columns)
    padded = np.full(
        (num_rows * num_columns, height + 2 * margin, width + 2 * margin, channels), 255, np.uint8
    )
    padded[:count, margin : margin + height, margin : margin + width] = images
    rows = padded.reshape(num_rows, num_columns, *padded.shape[1:]).transpose(0, 2, 1, 3, 4)
    return rows.reshape(num_rows * padded.shape[1], num_columns * padded.shape[2], channels)


def edit_strip(images: np.ndarray, is_generated: np.ndarray, edited: np.ndarray) -> np.ndarray:
    """A row an image: before, then for each part the mask and after; what is generated is blue.

    Args:
      images: uint8 `[N, H, W, C]`.
      is_generated: bool `[parts, N, H, W]`.
      edited: uint8 `[parts, N, H, W, C]`.

    Returns:
      uint8 `[height, width, 3]`.
    """
    before = np.broadcast_to(images, (*images.shape[:3], 3))
    columns = [before]
    for mask, after in zip(is_generated, edited, strict=True):
        columns.append(np.where(mask[..., None], MISSING, before))
        columns.append(np.broadcast_to(after, before.shape))
    rows = np.stack(columns, axis=1)
    return image_grid(rows.reshape(-1, *rows.shape[2:]), num_columns=len(columns))


def save_gif(path: str | PathLike, frames: np.ndarray, seconds: float, scale: int = 1) -> None:
    """An animation that repeats, its last frame for a second longer.

    Args:
      path: of the GIF.
      frames: uint8 `[N, H, W, 1 or 3]`.
      seconds: that a frame is shown.
      scale: pixels of the GIF for one of the frames.
    """
    pixels = frames.repeat(scale, axis=1).repeat(scale, axis=2)
    pictures = [Image.fromarray(it.squeeze(-1) if it.shape[-1] == 1 else it) for it in pixels]
    durations = [round(1000 * seconds)] * len(pictures)
    durations[-1] += 1000
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=durations, loop=0)


def save_samples_by_ar_steps(
    path: str | PathLike, images: np.ndarray, row_names: Sequence[str], column_names: Sequence[str]
) -> None:
    """A table of pictures: a row a class, a column a number of AR steps.

    Args:
      path: of the PNG.
      images: uint8 `[rows, columns, H, W, C]`.
      row_names, column_names: the labels beside and above.
    """
    num_rows, num_columns = images.shape[:2]
    figure, axes = plt.subplots(
        num_rows,
        num_columns,
        figsize=(1.0 * num_columns + 0.6, 1.0 * num_rows + 0.5),
        squeeze=False,
        layout="constrained",
    )
    for row in range(num_rows):
        for column in range(num_columns):
            _show(axes[row, column], images[row, column])
            if row == 0:
                axes[row, column].set_title(column_names[column], fontsize=9)
        axes[row, 0].set_ylabel(row_names[row], fontsize=9)
    _save(figure, path)


def save_training_curves(path: str | PathLike, metrics: Sequence[dict[str, Any]]) -> None:
    """Loss, loss by AR-step index, loss by noise level, learning rate over train steps.

    Args:
      path: of the PNG.
      metrics: lines of the metric log, from `metric_log.read_metrics`.
    """
    names = sorted({name for line in metrics for name in line}, key=_natural)
    by_ar_step = [name for name in names if name.startswith("loss/ar_step")]
    by_noise = [name for name in names if name.startswith("loss/noise_quartile")]
    panels = [
        ("weighted loss", ["loss"], True),
        ("squared error by AR step", by_ar_step, True),
        ("squared error by noise-level quartile", by_noise, True),
        ("learning rate", ["learning_rate"], False),
    ]
    figure, axes = plt.subplots(2, 2, figsize=(10, 7), layout="constrained")
    for ax, (title, curves, is_logarithmic) in zip(axes.flat, panels, strict=True):
        colors = plt.get_cmap("viridis")(np.linspace(0, 0.9, max(len(curves), 1)))
        for name, color in zip(curves, colors, strict=False):
            points = [(line["train_step"], line[name]) for line in metrics if name in line]
            label = name.removeprefix("loss/").replace("_", " ")
            ax.plot(*zip(*points, strict=True), label=label, color=color, linewidth=1.2)
        ax.set_title(title, fontsize=10)
        ax.set_xlabel("train step", fontsize=9)
        ax.grid(alpha=0.3)
        if is_logarithmic:
            ax.set_yscale("log")
        if len(curves) > 1:
            ax.legend(fontsize=7)
    _save(figure, path)


def save_curves(
    path: str | PathLike,
    panels: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]],
    x_label: str,
    y_label: str = "",
    is_logarithmic: bool = True,
) -> None:
    """Panels of named curves side by side.

    Args:
      path: of the PNG.
      panels: title -> name of a curve -> points.
      x_label: of the axis.
      y_label: of the axis that the panels share; "" where each has its own.
      is_logarithmic: along x.
    """
    figure, axes = plt.subplots(
        1,
        len(panels),
        figsize=(3 * len(panels), 3),
        sharey=bool(y_label),
        squeeze=False,
        layout="constrained",
    )
    for ax, (title, curves) in zip(axes[0], panels.items(), strict=True):
        for name, points in curves.items():
            ax.plot(*zip(*points, strict=True), label=name, marker="o", markersize=3, linewidth=1.2)
        ax.set_title(title, fontsize=10)
        if is_logarithmic:
            ax.set_xscale("log")
        ax.set_xlabel(x_label, fontsize=8)
        ax.grid(alpha=0.3)
    axes[0, 0].set_ylabel(y_label, fontsize=8)
    axes[0, 0].legend(fontsize=7)
    _save(figure, path)


def save_captioned(
    path: str | PathLike, images: np.ndarray, captions: Sequence[str], num_columns: int
) -> None:
    """Cells of images side by side, with a caption under each cell.

    Args:
      path: of the PNG.
      images: uint8 `[cells, k, H, W, C]`.
      captions: of the cells.
      num_columns: cells side by side.
    """
    num_cells, num_images = images.shape[:2]
    num_rows = -(-num_cells // num_columns)
    width = max(1.8, 1.0 * num_images)
    figure, axes = plt.subplots(
        num_rows,
        num_columns,
        figsize=(width * num_columns, num_rows * (width / num_images + 0.4)),
        squeeze=False,
        layout="constrained",
    )
    for ax, of_cell, caption in zip(axes.flat, images, captions, strict=False):
        _show(ax, image_grid(of_cell, num_images, margin=1))
        # What a model writes may be anything, such as control characters and half a formula.
        shown = "".join(it if it.isprintable() else "?" for it in caption)
        text = "\n".join(textwrap.wrap(shown, int(14 * width)))
        ax.set_xlabel(text, fontsize=8, parse_math=False)
    for ax in axes.flat[num_cells:]:
        ax.set_axis_off()
    _save(figure, path)


def save_strips(
    path: str | PathLike, strips: Sequence[np.ndarray], num_given: int, row_names: Sequence[str]
) -> None:
    """A row a sequence of images; the given ones are framed, and generated ones follow.

    Args:
      path: of the PNG.
      strips: uint8 `[k, H, W, C]` each.
      num_given: of each.
      row_names: the labels beside the rows.
    """
    frame = 2
    num_images = len(strips[0])
    figure, axes = plt.subplots(
        len(strips),
        1,
        figsize=(0.55 * num_images + 1.4, 0.6 * len(strips)),
        squeeze=False,
        layout="constrained",
    )
    for ax, images, name in zip(axes[:, 0], strips, row_names, strict=True):
        height, width = images.shape[1:3]
        framed = np.full((num_images, height + 2 * frame, width + 2 * frame, 3), GIVEN, np.uint8)
        framed[num_given:] = 255
        framed[:, frame:-frame, frame:-frame] = images  # grey ones become RGB
        _show(ax, image_grid(framed, num_images, margin=1))
        ax.set_ylabel(name, fontsize=8, rotation=0, ha="right", va="center")
    _save(figure, path)


def save_accuracy_by_position(
    path: str | PathLike, curves: Mapping[str, Sequence[float]], first: int, trained_length: int
) -> None:
    """Shares of right images of continued sequences; a line marks how long the trained ones were.

    Args:
      path: of the PNG.
      curves: by name, the share in 0...1 of each position; the first curve is drawn boldly.
      first: position of the first share, from 1.
      trained_length: images of a sequence in training.
    """
    figure, ax = plt.subplots(figsize=(7, 3.5), layout="constrained")
    for number, (name, shares) in enumerate(curves.items()):
        width = 1.0 if number else 2.5
        positions = range(first, first + len(shares))
        ax.plot(positions, 100 * np.asarray(shares), label=name, linewidth=width, zorder=-number)
    ax.axvline(trained_length + 0.5, color="gray", linestyle="--", label="length in training")
    ax.set_ylim(-2, 102)
    ax.set_xlabel("image of the sequence", fontsize=9)
    ax.set_ylabel("right class, %", fontsize=9)
    ax.grid(alpha=0.3)
    ax.legend(fontsize=7)
    _save(figure, path)


def save_factorization_plane(
    path: str | PathLike,
    frames: np.ndarray,
    ar_steps: Sequence[int],
    noise_levels: Sequence[int],
) -> None:
    """How one image emerges: AR steps downwards, noise levels to the right.

    Args:
      path: of the PNG.
      frames: uint8 `[AR steps, noise levels, H, W, C]`, see `emerging_images`.
      ar_steps: the number of the AR step of each row, from 1.
      noise_levels: the timestep of each column, falling.
    """
    num_rows, num_columns = frames.shape[:2]
    figure, axes = plt.subplots(
        num_rows,
        num_columns,
        figsize=(1.05 * num_columns + 1.0, 1.05 * num_rows + 1.0),
        squeeze=False,
        layout="constrained",
    )
    for row in range(num_rows):
        for column in range(num_columns):
            _show(axes[row, column], frames[row, column])
            if row == 0:
                name = "clean" if column == num_columns - 1 else f"t = {noise_levels[column]}"
                axes[row, column].set_title(name, fontsize=8)
        axes[row, 0].set_ylabel(f"AR step {ar_steps[row]}", fontsize=8)
    figure.supxlabel("noise axis: each AR step is denoised from t = T to t = 0", fontsize=10)
    figure.supylabel("AR axis: clean tokens of the AR steps before are context", fontsize=10)
    _save(figure, path)


def emerging_images(
    token_order: np.ndarray, x_t: Sequence[np.ndarray], denoising_steps: Sequence[Sequence[int]]
) -> np.ndarray:
    """The tokens of one image along both axes, from a `sampling.Trajectory`.

    Args:
      token_order: `[L]`.
      x_t: one array an AR step, `[denoising steps, tokens of the AR step, token_width]`.
      denoising_steps: which denoising steps to take of each AR step, of all as many.

    Returns:
      `[AR steps, noise levels, L, token_width]` in grid order: clean tokens of the AR steps
      before, the noised tokens of this one, NaN for those to come.
    """
    width = x_t[0].shape[-1]
    sequence = np.full((len(token_order), width), np.nan, np.float32)
    frames = np.empty((len(x_t), len(denoising_steps[0]), len(token_order), width), np.float32)
    begin = 0
    for ar_step, tokens in enumerate(x_t):
        end = begin + tokens.shape[1]
        for column, denoising_step in enumerate(denoising_steps[ar_step]):
            sequence[begin:end] = tokens[denoising_step]
            frames[ar_step, column][token_order] = sequence
        sequence[begin:end] = tokens[-1]
        begin = end
    return frames


def paint_missing(images: np.ndarray, shown: np.ndarray) -> np.ndarray:
    """RGB images in which pixels of tokens to come (NaN) are a muted blue.

    Args:
      images: float `[..., H, W, C]`, NaN where nothing is yet.
      shown: uint8, the same images as they are shown; what it has at NaN does not matter.

    Returns:
      uint8 `[..., H, W, 3]`.
    """
    missing = np.isnan(images).any(-1, keepdims=True)
    rgb = np.broadcast_to(shown, (*shown.shape[:-1], 3))
    return np.where(missing, MISSING, rgb)


def _show(ax: plt.Axes, image: np.ndarray) -> None:
    ax.imshow(image.squeeze(), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    ax.set_xticks([])
    ax.set_yticks([])
    for spine in ax.spines.values():
        spine.set_visible(False)


def _natural(name: str) -> list[Any]:
    """Sorts `ar_step_16` after `ar_step_2`."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split("_")]


def _save(figure: plt.Figure, path: str | PathLike) -> None:
    figure.savefig(path, dpi=130, bbox_inches="tight", facecolor="white")
    plt.close(figure)
