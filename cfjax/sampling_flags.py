"""Flags of the programs that generate: which checkpoint, where on the factorization plane, how."""

from collections.abc import Sequence
from typing import Any

import jax
from absl import flags

from cfjax import program, sharding
from cfjax.errors import UserError
from cfjax.model_loading import load
from cfjax.sampler import OF_MODEL, Sampler

# Of config.sampling, read when the model generates; num_ar_steps is defined where a program takes
# one number of AR steps.
_OF_SAMPLES = (
    *("num_ar_steps", "split", "token_order", "denoising_steps", "timestep_spacing"),
    *("solver", "variance", "eta", "temperature", "clip_x_start", "dynamic_threshold"),
    *("guidance_scale", "guidance_interval", "guidance_schedule", "guidance_power"),
)


def define_sampling_flags(
    checkpoint_is_required: bool = True, one_number_of_ar_steps: bool = True
) -> None:
    """Defines the flags that `load_sampler` and `sampling_overrides` read, and `--seed`."""
    define_model_flags(checkpoint_is_required)
    flags.DEFINE_string(
        "guide", None, "A checkpoint of a weaker model that guides instead of the null class."
    )
    flags.DEFINE_integer("seed", 0, "Of the noise and the token orders.")
    if one_number_of_ar_steps:
        flags.DEFINE_integer("num_ar_steps", None, "S.")
        flags.DEFINE_list("split_sizes", [], "Tokens of each AR step, instead of num_ar_steps.")
    flags.DEFINE_string("split", None, "Sizes of the AR steps: equal, or cosine (few first).")
    flags.DEFINE_string("token_order", None, "random, raster, block_raster or dilated.")
    flags.DEFINE_string(
        "denoising_steps",
        None,
        "Of each AR step: 250, ddim50 or 10,15,20; 50/20/10 of one after the other; 50:10 from the"
        " first to the last.",
    )
    flags.DEFINE_string("timestep_spacing", None, "linear, quadratic, karras or logsnr.")
    flags.DEFINE_string("solver", None, "ddpm, ddim, dpmpp_2m or dpmpp_2m_sde.")
    flags.DEFINE_string("variance", None, "Of ddpm: fixed_large or fixed_small.")
    flags.DEFINE_float("eta", None, "Of ddim: share of ancestral noise.")
    flags.DEFINE_float("temperature", None, "By which the noise is multiplied that solvers add.")
    flags.DEFINE_bool("clip_x_start", None, "Clip the predicted x_0 to [-1, 1], of pixels.")
    flags.DEFINE_float("dynamic_threshold", None, "Or scale it to this quantile, such as 0.995.")
    flags.DEFINE_float("guidance_scale", None, "1 for none.")
    flags.DEFINE_list("guidance_interval", None, "Guided where LOW <= t < HIGH: LOW,HIGH.")
    flags.DEFINE_string(
        "guidance_schedule", None, "Over the AR position: constant, linear or cosine."
    )
    flags.DEFINE_float("guidance_power", None, "scale - 1 falls by (1 - t / T)^power.")


def define_model_flags(checkpoint_is_required: bool = True) -> None:
    """Defines the flags that `load_sampler` reads, but for `--guide`."""
    flags.DEFINE_string(
        "checkpoint",
        None,
        "A run's workdir, or one checkpoint.",
        required=checkpoint_is_required,
    )
    flags.DEFINE_integer("train_step", None, "Which checkpoint; the latest by default.")
    flags.DEFINE_string("autoencoder", None, "Folder; by default that of the checkpoint's config.")
    flags.DEFINE_string("tokenizer", None, "Its file, if it lies elsewhere than in training.")
    flags.DEFINE_string("dtype", None, "Of the weights: bfloat16 or float32.")
    flags.DEFINE_integer(
        "images_per_device", None, "Made at a time; others round otherwise.", lower_bound=1
    )


def define_device_flags() -> None:
    """Defines the flags of the mesh and of several processes, and `--batch_size`."""
    flags.DEFINE_integer("batch_size", 256, "Images that are fetched at a time.", lower_bound=1)
    flags.DEFINE_integer("fsdp", 1, "Devices over which the parameters are split.")
    flags.DEFINE_integer("tensor", 1, "Devices over which heads and MLP are split.")
    program.define_distributed_flags()


def mesh_from_flags() -> jax.sharding.Mesh:
    """Over all devices."""
    values = flags.FLAGS.flag_values_dict()
    return sharding.make_mesh(fsdp=values.get("fsdp", 1), tensor=values.get("tensor", 1))


def load_sampler(weights: str = "ema") -> Sampler:
    """The checkpoint that the flags name, on the mesh that they name; see `cfjax.load`."""
    values = flags.FLAGS.flag_values_dict()
    return load(
        values["checkpoint"],
        values["train_step"],
        mesh_from_flags(),
        values["autoencoder"],
        values.get("guide"),
        weights,
        values["tokenizer"],
        **load_overrides(),
    )


def load_overrides() -> dict[str, Any]:
    """The fields of `config.sampling` that flags override when the model is loaded."""
    values = flags.FLAGS.flag_values_dict()
    return {name: values[name] for name in OF_MODEL if values[name] is not None}


def sampling_overrides() -> dict[str, Any]:
    """The fields of `config.sampling` that flags override."""
    values = flags.FLAGS.flag_values_dict()
    overrides = {name: values[name] for name in _OF_SAMPLES if values.get(name) is not None}
    if "guidance_interval" in overrides:
        overrides["guidance_interval"] = integers(
            "guidance_interval", overrides["guidance_interval"], 2
        )
    return overrides


def refuse_other_flags(reason: str, others: Sequence[str] = ()) -> None:
    """Refuses flags that say how to sample, and `others`.

    Raises:
      UserError: one of them is given.
    """
    names = (*OF_MODEL, *_OF_SAMPLES, "split_sizes", "seed", "train_step", *others)
    for name in names:
        if name in flags.FLAGS and flags.FLAGS[name].present:
            raise UserError(f"{reason}; drop --{name}.")


def integers(name: str, texts: Sequence[str], count: int | None = None) -> tuple[int, ...]:
    """A flag's list of integers.

    Raises:
      UserError: one is not an integer, or there are not `count`.
    """
    return _numbers(name, texts, count, int, "integers")


def floats(name: str, texts: Sequence[str]) -> tuple[float, ...]:
    """A flag's list of numbers.

    Raises:
      UserError: one is not a number.
    """
    return _numbers(name, texts, None, float, "numbers")


def _numbers(name, texts, count, convert, what):
    try:
        values = tuple(convert(text) for text in texts)
    except ValueError:
        raise UserError(f"--{name}={','.join(texts)} must be {what} with commas between.") from None
    if count is not None and len(values) != count:
        raise UserError(f"--{name}={','.join(texts)} must be {count} {what}.")
    return values
