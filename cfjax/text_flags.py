"""Flags that say how text is generated, of `cfjax.caption` and `cfjax.evaluate_documents`."""

from typing import Any

from absl import flags

# Where a program has --temperature of images too.
TEXT_TEMPERATURE = "text_temperature"
_FIELDS = ("max_length", "temperature", "top_k", "top_p", "num_beams", "length_penalty")


def define_text_flags(temperature: str = "temperature") -> None:
    """Defines a flag for each field of `TextSampling`; `temperature` is what that one is called."""
    flags.DEFINE_integer("max_length", None, "Of a text, in tokens; that of the config.")
    flags.DEFINE_float(
        temperature, None, "By which logits are divided; 0, the default, draws no text."
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
    names = dict(zip(_FIELDS, _FIELDS, strict=True))
    if TEXT_TEMPERATURE in values:
        names["temperature"] = TEXT_TEMPERATURE
    return {field: values[name] for field, name in names.items() if values[name] is not None}
