"""Scores what a model of documents can do: `python -m cfjax.evaluate_documents --checkpoint=RUN --out=DIR`.

By the set of the checkpoint's config:

- scenes: images from held-out captions, and captions of held-out images;
- progressions: the next image after three, and sequences continued to `--length` images;
- transforms: answers to queries;
- captioned sets: captions of held-out images by BLEU-4 and CIDEr-D.

`<out>` gets `scores.json`, `scores.md`, of progressions a plot, the judge, and in `generated` all that
was generated: run again, a killed evaluation goes on there, and a finished one is only scored again.
The distance of images to real ones is that of `cfjax.evaluate`.
"""

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags, logging

import cfjax
from cfjax import build_documents, document_scores, evaluation_rows, program
from cfjax.checkpoint_folders import find
from cfjax.data.embedded_draws import EMBEDDED_SPLITS
from cfjax.data.image_files import write_whole
from cfjax.data.scenes import SPLITS as SCENE_SPLITS
from cfjax.document_sampler import DocumentSampler
from cfjax.document_scores import HUNDREDFOLD, Number, Scores
from cfjax.errors import UserError, check_choice
from cfjax.generated_documents import Generator
from cfjax.sampling_flags import define_device_flags, define_sampling_flags, load_sampler
from cfjax.text_flags import define_text_flags

PROGRAM = "cfjax.evaluate_documents"


def load_documents_sampler() -> DocumentSampler:
    """The model that the flags name.

    Raises:
      UserError: it has no text head, or see `cfjax.load`.
    """
    sampler = load_sampler()
    if not isinstance(sampler, DocumentSampler):
        raise UserError(
            f"the model in {flags.FLAGS['checkpoint'].value} has no text head; score it with"
            " cfjax.evaluate, or pass a checkpoint that was trained with text.tokenizer."
        )
    return sampler


def scores_of(generator: Generator, out: Path) -> Scores | None:
    """The scores that the flags ask for, on the first process; all processes call it.

    Raises:
      UserError: a split or a number that the set does not have.
    """
    values = flags.FLAGS.flag_values_dict()
    config, count, split = generator.sampler.config, values["num_samples"], values["data_split"]
    name = config.data.name
    check_choice("--data_split", split, SCENE_SPLITS if name == "scenes" else EMBEDDED_SPLITS)
    size, _, channels = generator.sampler.image_shape
    source = build_documents.source(config, split, size, channels)
    documents = f"{split} of {name}, fingerprint {source.fingerprint}"
    if name == "scenes":
        return document_scores.of_scenes(generator, source, documents, count, out)
    if name == "progressions":
        return document_scores.of_progressions(
            generator, source, documents, count, values["length"], out
        )
    if name == "transforms":
        return document_scores.of_transforms(generator, source, documents, count)
    return document_scores.of_captions(generator, source, documents, count)


def protocol_of(generator: Generator, judge: str) -> dict[str, Any]:
    """What the numbers depend on."""
    values, sampler = flags.FLAGS.flag_values_dict(), generator.sampler
    train_step = find(values["checkpoint"], values["train_step"]).name
    split_sizes = generator.recipe["split_sizes"]
    return {
        "checkpoint": f"{values['checkpoint']}, train step {train_step}, EMA",
        "documents": f"{values['num_samples']} of split {values['data_split']} of"
        f" {sampler.config.data.name}",
        "plan": f"S = {len(split_sizes)}, of {split_sizes} tokens",
        "sampler": evaluation_rows.sampler_details(sampler, {}),
        "guidance": evaluation_rows.guidance_details(sampler, {}, values["guide"] or "no prompt"),
        "text": dataclasses.asdict(generator.text),
        "seed": values["seed"],
        "judge": judge,
        "standard errors": "jackknife over documents",
        "versions": f"cfjax {cfjax.__version__}, jax {jax.__version__}, numpy {np.__version__}",
        "recipe": generator.recipe,
    }


def table(scores: Scores) -> str:
    """All tables as text."""
    lines = []
    for section in scores.sections:
        width = max(map(len, section.numbers))
        lines += ["", section.title]
        lines += [f"  {name:<{width}}  {_text(name, it)}" for name, it in section.numbers.items()]
    return "\n".join([*lines[1:], "", f"judge: {scores.judge}"])


def markdown(scores: Scores, protocol: dict[str, Any]) -> str:
    """All tables and the protocol as Markdown."""
    lines = []
    for section in scores.sections:
        lines += [f"**{section.title}**", "", "| score | value |", "|---|---|"]
        lines += [f"| {name} | {_text(name, it)} |" for name, it in section.numbers.items()]
        lines.append("")
    lines += [f"- {name}: {value}" for name, value in protocol.items() if name != "recipe"]
    return "\n".join(lines) + "\n"


def _text(name: str, number: Number) -> str:
    unit = "" if name in HUNDREDFOLD else "%"
    error = "" if number.error is None else f" ± {100 * number.error:.1f}"
    return f"{100 * number.value:.1f}{unit}{error}"


def main(_: Sequence[str]) -> None:
    """Runs the program."""
    program.initialize_distributed()
    out = Path(flags.FLAGS["out"].value)
    sampler = load_documents_sampler()
    generator = Generator.from_flags(PROGRAM, sampler, out / "generated")
    program.check_workdir_writable(out)
    scores = scores_of(generator, out)
    if scores is None:
        return
    protocol = protocol_of(generator, scores.judge)
    report = {
        "scores": {
            section.title: {
                name: {"value": it.value, "standard_error": it.error}
                for name, it in section.numbers.items()
            }
            for section in scores.sections
        },
        "by_position": list(scores.by_position),
        "protocol": protocol,
    }
    for name, text in (
        ("scores.json", json.dumps(report, indent=1) + "\n"),
        ("scores.md", markdown(scores, protocol)),
    ):
        write_whole(out / name, lambda file, text=text: file.write(text.encode()))
    sys.stdout.write(table(scores) + "\n")
    logging.info("The report is in %s.", out / "scores.json")


def define_flags() -> None:
    """Defines the program's flags."""
    define_sampling_flags()
    define_device_flags()
    flags.FLAGS.set_default("batch_size", 1)  # what is made at once is kept at once
    define_text_flags("text_")
    flags.DEFINE_string("out", None, "Folder of the report.", required=True)
    flags.DEFINE_integer("num_samples", 500, "Documents of each task.", lower_bound=1)
    flags.DEFINE_string(
        "data_split", "held_out", "Of documents: train or held_out; of scenes held_out_seen too."
    )
    flags.DEFINE_integer("length", 30, "Images of a continued progression, the three included.")


if __name__ == "__main__":
    define_flags()
    program.run(main)
