"""Flags that say how text is generated, of `cfjax.caption` and `cfjax.evaluate_documents`."""

from typing import Any

from absl import flags

_FIELDS = ("max_length", "top_k", "top_p", "num_beams", "length_penalty")
# Fields whose names are those of options of images too.
_ALSO_OF_IMAGES = ("temperature", "guidance_scale")


def define_text_flags(prefix: str = "") -> None:
    """Defines a flag for each field of `TextSampling`.

    Args:
      prefix: "text_" in programs that have `--temperature` and `--guidance_scale` of images.
    """
    flags.DEFINE_integer("max_length", None, "Of a text, in tokens; that of the config.")
    flags.DEFINE_float(
        f"{prefix}temperature", None, "By which logits are divided; 0, the default, draws no text."
    )
    flags.DEFINE_float(
        f"{prefix}guidance_scale",
        None,
        "Of text, against the same with nothing before it; 1 for none.",
    )
    flags.DEFINE_integer("top_k", None, "Only the k most probable tokens are drawn; 0 for all.")
    flags.DEFINE_float("top_p", None, "Only the most probable tokens that make up this share.")
    flags.DEFINE_integer("num_beams", None, "Of beam search, which draws nothing; 1 for none.")
    flags.DEFINE_float(
        "length_penalty", None, "Beams are compared by log-probability / length ** penalty; 1."
    )


def text_overrides() -> dict[str, Any]:
    """The fields of `TextSampling` that flags override."""
    values = flags.FLAGS.flag_values_dict()
    prefix = "text_" if "text_temperature" in values else ""
    names = {field: field for field in _FIELDS} | {it: prefix + it for it in _ALSO_OF_IMAGES}
    return {field: values[name] for field, name in names.items() if values[name] is not None}
