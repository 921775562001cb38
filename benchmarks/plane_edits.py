"""The edits of the plane study: how often what is edited is the new class, by mask and way to edit."""

import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from cfjax import build_data
from cfjax.data.sources import all_images
from cfjax.evaluation.classifier import TrainedClassifier
from cfjax.sampler import Sampler

# What is kept; of "random" the share too.
EDITS = (
    *(("top", 0.0), ("bottom", 0.0), ("left", 0.0), ("right", 0.0), ("center", 0.0)),
    *(("outside", 0.0), ("random", 0.1), ("random", 0.2), ("random", 0.3)),
)
EDIT_GUIDANCE, EDIT_AR_STEPS = 6.0, 1
# How it is edited.
EDIT_WAYS = {
    "`kept_as=clean`": {"kept_as": "clean"},
    "`kept_as=noised`": {"kept_as": "noised"},
    "noised, best of 4": {"kept_as": "noised", "num_candidates": 4},
    "noised, best of 8": {"kept_as": "noised", "num_candidates": 8},
}
# To compare with: real digits of the new class in place of what is generated.
PASTED, NUM_PASTED = "pasted", 16


def mask_name(keep: str, keep_ratio: float) -> str:
    """What is kept, as in the table."""
    return f"{keep} {keep_ratio:.0%}" if keep_ratio else keep


def run_edit(
    model: Sampler,
    keep: str,
    keep_ratio: float,
    way: str,
    num_samples: int,
    classifier: TrainedClassifier,
) -> dict[str, Any]:
    """How often real digits are the new class after an edit, and the share that is generated."""
    images, labels, wanted = _to_be_edited(model, num_samples)
    known = model.known_tokens(images, keep, keep_ratio=keep_ratio)
    edited = model.edit(
        images,
        wanted,
        keep,
        keep_ratio=keep_ratio,
        num_ar_steps=EDIT_AR_STEPS,
        guidance_scale=EDIT_GUIDANCE,
        **EDIT_WAYS[way],
    )
    classes = classifier.features(edited)[1]
    return {
        "keep": mask_name(keep, keep_ratio),
        "way": way,
        "share_generated": float(1 - known.is_known.mean()),
        "agreement": float((classes == wanted).mean()),
        "old_class": float((classes == labels).mean()),
    }


def run_paste(
    model: Sampler,
    keep: str,
    keep_ratio: float,
    num_samples: int,
    classifier: TrainedClassifier,
) -> dict[str, Any]:
    """The same with parts of training digits of the new class, drawn at random, and no model."""
    images, labels, wanted = _to_be_edited(model, num_samples)
    known = model.known_tokens(images, keep, keep_ratio=keep_ratio)
    size, grid = model.config.model.patch_size, model.model.grid
    is_kept = known.is_known.reshape(-1, *grid).repeat(size, 1).repeat(size, 2)[..., None]
    others, other_labels = all_images(build_data.images(model.config, "train"))
    members = [np.flatnonzero(other_labels == label) for label in range(model.model.num_classes)]
    rng = np.random.default_rng(0)
    classes = []
    for _ in range(NUM_PASTED):
        rows = [rng.choice(members[label]) for label in wanted]
        classes.append(classifier.features(np.where(is_kept, images, others[rows]))[1])
    is_wanted = np.stack(classes) == wanted
    return {
        "keep": mask_name(keep, keep_ratio),
        "way": PASTED,
        "share_generated": float(1 - known.is_known.mean()),
        "agreement": float(is_wanted.mean()),
        "any": float(is_wanted.any(axis=0).mean()),
        "old_class": float((np.stack(classes) == labels).mean()),
    }


def _to_be_edited(model: Sampler, num_samples: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Held-out digits of all classes, their classes, and those that they are to become."""
    images, labels = all_images(build_data.images(model.config, "held_out"))
    spread = np.linspace(0, len(labels) - 1, num_samples).round().astype(int)  # sorted by class
    images, labels = images[spread], labels[spread]
    wanted = (labels + 1 + np.arange(len(labels)) % 9) % 10  # all other classes
    return images, labels, wanted


def run_edits(
    model: Sampler, num_samples: int, classifier: TrainedClassifier, path: Path
) -> list[dict[str, Any]]:
    """All edits, or what an earlier study left of them in `path`."""
    done = json.loads(path.read_text()) if path.exists() else []
    known = {(edit["keep"], edit["way"]) for edit in done}
    missing = [
        (*edit, way) for way in EDIT_WAYS for edit in EDITS if (mask_name(*edit), way) not in known
    ]
    for edit in tqdm(missing, "edits", unit="mask"):
        done.append(run_edit(model, *edit, num_samples, classifier))
        path.write_text(json.dumps(done))
    for edit in EDITS:
        if (mask_name(*edit), PASTED) not in known:
            done.append(run_paste(model, *edit, num_samples, classifier))
            path.write_text(json.dumps(done))
    return done


def page_of_edits(edits: list[dict[str, Any]], num_samples: int) -> str:
    """The table of edits in Markdown."""
    error = (0.25 / num_samples) ** 0.5
    lines = [
        "",
        f"Edits of {num_samples} held-out digits, S = {EDIT_AR_STEPS}, guidance {EDIT_GUIDANCE:g}, each with"
        " a class that it is not, all others equally often. Is the new class / still the old one; last, of"
        " the same part of a real digit of the new class in place of what is generated, and of whichever"
        f" of {NUM_PASTED} such the judge takes for the new class, if any:",
        "",
        f"| kept | share generated anew | {' | '.join(EDIT_WAYS)} | real part pasted | any of {NUM_PASTED} |",
        "|---" * (4 + len(EDIT_WAYS)) + "|",
    ]
    by_cell = {(edit["keep"], edit["way"]): edit for edit in edits}
    for name in (mask_name(*edit) for edit in EDITS):
        row = [by_cell[name, way] for way in (*EDIT_WAYS, PASTED)]
        cells = [f"{edit['agreement']:.1%} / {edit['old_class']:.1%}" for edit in row]
        cells.append(f"{row[-1]['any']:.1%}")
        lines.append(f"| {name} | {row[0]['share_generated']:.0%} | " + " | ".join(cells) + " |")
    of_pasted = [edit for edit in edits if edit["way"] == PASTED]
    means = []
    for way in (*EDIT_WAYS, PASTED):
        shares = [edit["agreement"] for edit in edits if edit["way"] == way]
        squares = [share * (1 - share) / num_samples for share in shares]
        means.append(f"{statistics.mean(shares):.1%} ± {sum(squares) ** 0.5 / len(shares):.1%}")
    lines += [
        f"| mean | | {' | '.join(means)} | {statistics.mean(it['any'] for it in of_pasted):.1%} |",
        "",
        f"The standard error of a share is at most {error:.1%}; that of a mean takes the masks as"
        " independent.",
    ]
    return "\n".join(lines) + "\n"
