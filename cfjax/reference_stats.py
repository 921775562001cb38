"""Makes a reference: `python -m cfjax.reference_stats --dataset tfds:imagenet2012:data --size 256 ...`.

Statistics of real images in Inception's features, as a `.npz` that `cfjax.evaluate --reference` reads,
and whose `mu`, `sigma`, `mu_s` and `sigma_s` the ADM suite reads too; and the features of 10,000 of
them, for precision, recall and KID. Run again, a killed program goes on where it was. All processes
of a pod take part.
"""

from collections.abc import Sequence
from pathlib import Path

import jax
from absl import flags, logging

from cfjax import evaluation_inputs, program
from cfjax.data.image_sets import of_source
from cfjax.data.sources import open_dataset
from cfjax.errors import UserError
from cfjax.evaluation import references
from cfjax.sampling_flags import define_device_flags, mesh_from_flags


def main(_: Sequence[str]) -> None:
    """Runs the program."""
    program.initialize_distributed()
    values = flags.FLAGS.flag_values_dict()
    out = Path(values["out"])
    if (values["dataset"] is None) == (values["images"] is None):
        raise UserError("pass either --dataset or --images.")
    if out.suffix != ".npz":
        raise UserError(f"--out={out} must end in .npz.")
    if out.exists() and not values["overwrite"]:
        raise UserError(f"{out} is there already; name another --out or pass --overwrite.")
    extractor = evaluation_inputs.inception_from_flags(mesh_from_flags())
    program.check_workdir_writable(out.absolute().parent)
    state, batch_size = out.with_name(f".{out.name}.partial.npz"), values["batch_size"]
    if values["images"] is not None:
        reference = evaluation_inputs.reference_of_file(
            values["images"], extractor, batch_size, state
        )
    else:
        if None in (values["size"], values["num_classes"]):
            raise UserError("--dataset needs --size and --num_classes too.")
        source = open_dataset(
            values["dataset"],
            values["split"],
            size=values["size"],
            channels=values["channels"],
            num_classes=values["num_classes"],
        )
        name = f"{len(source)} {values['split']} images of {values['dataset']}, fingerprint"
        name += f" {source.fingerprint}"
        reference = evaluation_inputs.reference_of_images(
            of_source(source, name), name, extractor, batch_size, state
        )
    if jax.process_index() == 0:
        references.save(out, reference, extractor)
        if extractor.warning:
            logging.warning("%s", extractor.warning)
        logging.info("The reference is in %s: %s.", out, reference.name)


def define_flags() -> None:
    """Defines the program's flags."""
    define_device_flags()
    flags.DEFINE_string("dataset", None, "Real images: see cfjax.encode.")
    flags.DEFINE_enum("split", "train", ["train", "held_out"], "Of the dataset.")
    flags.DEFINE_integer("size", None, "Height and width of the dataset's images, in pixels.")
    flags.DEFINE_integer("channels", 3, "Of the dataset's images: 1 (grey) or 3 (RGB).")
    flags.DEFINE_integer("num_classes", None, "Of the dataset.")
    flags.DEFINE_string("images", None, "Instead of a dataset: a .npz with arr_0, or a folder.")
    evaluation_inputs.define_inception_flags(required=True)
    flags.DEFINE_string("out", None, "The .npz to make.", required=True)
    flags.DEFINE_bool("overwrite", False, "Replace what is there.")


if __name__ == "__main__":
    define_flags()
    program.run(main)
