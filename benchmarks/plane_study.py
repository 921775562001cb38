"""One model over the factorization plane: `python -m benchmarks.plane_study --checkpoint runs/mnist`.

From the repository's root, after the quick start. Class agreement, FID-N and seconds an image for
every number of AR steps x denoising steps x solver, into docs/plane.md and docs/plane.png. Cells are
kept in `--results` as they are done, so that a study that was killed goes on; `--fresh` starts anew.

Seconds are of this machine, without compilation, and of the fastest of a cell's batches, of
`sampling.images_per_device` images: what else ran disturbs it least.
"""

import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from tqdm import tqdm

import cfjax
from benchmarks.plane_edits import page_of_edits, run_edits
from cfjax import build_data, program
from cfjax.data.sources import all_images
from cfjax.evaluation.classifier import TrainedClassifier, load_or_train
from cfjax.evaluation.frechet import frechet_distance
from cfjax.evaluation.report import floor_distance
from cfjax.evaluation.statistics import FeatureStatistics
from cfjax.generation_request import labels_of
from cfjax.sampler import Sampler
from cfjax.visualization import save_curves

PAGE = Path(__file__).parent.parent / "docs/plane.md"
BEGIN, END = "<!-- table: benchmarks/plane_study.py -->", "<!-- end of table -->"
AR_STEPS = (1, 2, 4, 7, 49)
DENOISING_STEPS = (5, 10, 20, 50, 100)
SOLVERS = ("ddpm", "ddim", "dpmpp_2m")
# Cells that are repeated with other seeds, which tells how far a number scatters.
REPEATED = (("ddpm", 100), ("dpmpp_2m", 20), ("dpmpp_2m_sde", 20))


def cells(num_seeds: int) -> list[dict[str, Any]]:
    """The cells of the study, those that are compared first."""
    every = [
        {"num_ar_steps": s, "denoising_steps": n, "solver": solver, "seed": 0}
        for s in AR_STEPS
        for n in DENOISING_STEPS
        for solver in SOLVERS
    ]
    repeated = [
        {"num_ar_steps": s, "denoising_steps": n, "solver": solver, "seed": seed}
        for seed in range(num_seeds)
        for s in AR_STEPS
        for solver, n in REPEATED
    ]
    return every + [cell for cell in repeated if cell not in every]


def run_cell(
    model: Sampler,
    cell: dict[str, Any],
    num_samples: int,
    classifier: TrainedClassifier,
    reference: FeatureStatistics,
) -> dict[str, Any]:
    """A cell with its scores and seconds an image."""
    options = {name: value for name, value in cell.items() if name != "seed"}
    settings = model.settings(options)
    labels = model.check_labels(labels_of((), num_samples, model.model.num_classes))
    group = model.config.sampling.images_per_device
    list(model.stream(labels[:group], settings))  # compiles
    batches, seconds = [], []
    began = time.perf_counter()
    for batch in model.stream(labels, settings, cell["seed"], batch_size=group):
        batches.append(batch)
        seconds.append((time.perf_counter() - began) / len(batch))
        began = time.perf_counter()
    images = np.concatenate(batches)
    features, classes = classifier.features(images)
    return cell | {
        "fid": frechet_distance(FeatureStatistics.of(features), reference),
        "class_agreement": float(np.mean(classes == labels)),
        # The first is queued with the second; the last may be smaller.
        "seconds_per_image": min(seconds[1:-1] or seconds),
    }


def main(_: Sequence[str]) -> None:
    """Runs what is missing, and writes page and plot."""
    values = flags.FLAGS.flag_values_dict()
    results, num_samples = Path(values["results"]), values["num_samples"]
    results.mkdir(parents=True, exist_ok=True)
    model = cfjax.load(values["checkpoint"])
    train, held_out = (build_data.images(model.config, split) for split in ("train", "held_out"))
    classifier = load_or_train(results / "classifier", train, held_out)
    real, _ = classifier.features(all_images(train)[0])
    reference = FeatureStatistics.of(real)
    path = results / f"cells-{num_samples}.jsonl"
    if values["fresh"]:
        path.unlink(missing_ok=True)
        (results / f"edits-{num_samples}.json").unlink(missing_ok=True)
    done = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    known = [
        {name: cell[name] for name in ("num_ar_steps", "denoising_steps", "solver", "seed")}
        for cell in done
    ]
    missing = [cell for cell in cells(values["num_seeds"]) if cell not in known]
    missing = missing[: values["max_cells"]]
    for cell in tqdm(missing, "plane", unit="cell"):
        done.append(run_cell(model, cell, num_samples, classifier, reference))
        with path.open("a") as file:
            file.write(json.dumps(done[-1]) + "\n")
    if values["write"]:
        edits = run_edits(model, num_samples, classifier, results / f"edits-{num_samples}.json")
        text = page(done, num_samples, floor_distance(real), classifier.held_out_accuracy)
        text += page_of_edits(edits, num_samples)
        before, rest = PAGE.read_text().split(BEGIN)
        PAGE.write_text(before + BEGIN + "\n" + text + END + rest.split(END)[1])
        plot(done, num_samples)


def page(done: list[dict[str, Any]], num_samples: int, floor: float, accuracy: float) -> str:
    """The tables in Markdown."""
    lines = [
        f"FID-{num_samples} (mnist-classifier) / class agreement / milliseconds an image. Real images:"
        f" {floor:.2f} / {accuracy:.1%}.",
        "",
    ]
    for solver in SOLVERS:
        lines += [
            f"**{solver}**",
            "",
            "| S | " + " | ".join(f"{n} denoising steps" for n in DENOISING_STEPS) + " |",
            "|---" * (1 + len(DENOISING_STEPS)) + "|",
        ]
        for s in AR_STEPS:
            row = [_cell(done, solver, s, n) for n in DENOISING_STEPS]
            lines.append(f"| {s} | " + " | ".join(row) + " |")
        lines.append("")
    lines += [
        "Other seeds: mean and standard deviation of"
        f" FID-{num_samples} (class agreement) over n seeds.",
        "",
        "| S | " + " | ".join(f"{solver}, {n} denoising steps" for solver, n in REPEATED) + " |",
        "|---" * (1 + len(REPEATED)) + "|",
    ]
    for s in AR_STEPS:
        row = []
        for solver, n in REPEATED:
            of_cell = _of(done, solver, s, n)
            if not of_cell:
                row.append("-")
                continue
            fids = [cell["fid"] for cell in of_cell]
            agreement = statistics.mean(cell["class_agreement"] for cell in of_cell)
            spread = f" ± {statistics.stdev(fids):.2f}" if len(fids) > 1 else ""
            row.append(f"{statistics.mean(fids):.2f}{spread} ({agreement:.1%}), n = {len(fids)}")
        lines.append(f"| {s} | " + " | ".join(row) + " |")
    squares = [
        statistics.variance(cell["fid"] for cell in _of(done, solver, s, n))
        for s in AR_STEPS
        for solver, n in REPEATED
        if len(_of(done, solver, s, n)) > 1
    ]
    if squares:
        lines += [
            "",
            f"Pooled over all of them, the deviation is {statistics.mean(squares) ** 0.5:.1f}.",
        ]
    return "\n".join(lines) + "\n"


def plot(done: list[dict[str, Any]], num_samples: int) -> None:
    """FID-N over denoising steps: a panel a number of AR steps, a curve a solver."""
    curves = {
        (s, solver): [
            (n, cell["fid"]) for n in DENOISING_STEPS for cell in _of(done, solver, s, n)[:1]
        ]
        for s in AR_STEPS
        for solver in SOLVERS
    }
    panels = {
        f"S = {s}": {solver: curves[s, solver] for solver in SOLVERS}
        for s in AR_STEPS
        if all(curves[s, solver] for solver in SOLVERS)
    }
    labels = ("denoising steps of an AR step", f"FID-{num_samples} (mnist-classifier)")
    save_curves(PAGE.with_suffix(".png"), panels, *labels)


def _of(done, solver, num_ar_steps, denoising_steps):
    asked = (solver, num_ar_steps, denoising_steps)
    of_cell = [
        cell
        for cell in done
        if (cell["solver"], cell["num_ar_steps"], cell["denoising_steps"]) == asked
    ]
    return sorted(of_cell, key=lambda cell: cell["seed"])


def _cell(done, solver, num_ar_steps, denoising_steps):
    of_cell = _of(done, solver, num_ar_steps, denoising_steps)
    if not of_cell:
        return "-"
    cell = of_cell[0]
    seconds = 1000 * cell["seconds_per_image"]
    return f"{cell['fid']:.1f} / {cell['class_agreement']:.1%} / {seconds:.0f}"


if __name__ == "__main__":
    flags.DEFINE_string("checkpoint", None, "A run's workdir.", required=True)
    flags.DEFINE_string("results", "runs/plane_study", "Folder of what is done.")
    flags.DEFINE_integer("num_samples", 1000, "N, of a cell.", lower_bound=2)
    flags.DEFINE_integer("num_seeds", 3, "Of the cells that are repeated.", lower_bound=1)
    flags.DEFINE_integer("max_cells", None, "Run so many at most; those left are shown as -.")
    flags.DEFINE_bool("fresh", False, "Forget what is done.")
    flags.DEFINE_bool("write", True, "Write docs/plane.md and docs/plane.png.")
    program.run(main)
