"""What was asked for when images were generated, as values that JSON holds and that repeat it.

A recipe is the JSON of a request and of the model that was loaded for it: enough to make the same
bytes again, on the same kind of device.
"""

import dataclasses
import hashlib
from collections.abc import Mapping
from os import fspath
from typing import Any

import jax
import numpy as np
from absl import flags, logging
from jax.experimental import multihost_utils

import cfjax
from cfjax import sampling
from cfjax.checkpoint_folders import find
from cfjax.errors import UserError
from cfjax.sampler import OF_MODEL, Sampler
from cfjax.sampling_flags import integers, load_overrides, sampling_overrides


@dataclasses.dataclass(frozen=True)
class Request:
    """Which model generates, where on the factorization plane, and from which seed.

    Attributes:
      checkpoint, train_step, autoencoder, guide, tokenizer: see `cfjax.load`.
      sampling: fields of `config.sampling`.
      split_sizes: tokens of each AR step, instead of a number of AR steps.
      seed: of the noise and the token orders.
      classes: of the images, over and over; empty for all.
      num_samples: how many images.
      edit: what `cfjax.edit` keeps of which images; empty for plain generation.
      prompt: what documents begin with, see `cfjax.generation_prompts`; empty for images of classes.
    """

    checkpoint: str
    train_step: int | None
    autoencoder: str | None
    guide: str | None
    sampling: Mapping[str, Any]
    split_sizes: tuple[int, ...]
    seed: int
    classes: tuple[int, ...]
    num_samples: int
    edit: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    prompt: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    tokenizer: str | None = None

    def load(self, mesh: jax.sharding.Mesh) -> Sampler:
        """The model.

        Raises:
          UserError: see `cfjax.load`.
        """
        of_model = {name: self.sampling[name] for name in OF_MODEL if name in self.sampling}
        return cfjax.load(
            self.checkpoint,
            self.train_step,
            mesh,
            self.autoencoder,
            self.guide,
            tokenizer=self.tokenizer,
            **of_model,
        )

    def settings(self, model: Sampler, num_known: int = 0) -> sampling.SamplingSettings:
        """How the model is to generate, checked.

        Raises:
          UserError: a value out of range.
        """
        overrides = {name: it for name, it in self.sampling.items() if name not in OF_MODEL}
        return model.settings(overrides, self.split_sizes, num_known)

    def labels(self, model: Sampler) -> np.ndarray:
        """The class of each image, int32 `[num_samples]`.

        Raises:
          UserError: one is not a class of the model.
        """
        return model.check_labels(
            labels_of(self.classes, self.num_samples, model.model.num_classes)
        )


def labels_of(classes: tuple[int, ...], num_samples: int, num_classes: int) -> np.ndarray:
    """The class of each sample: the given ones, or all, over and over; int32 `[num_samples]`."""
    cycle = np.asarray(classes if len(classes) else np.arange(num_classes), np.int32)
    return np.resize(cycle, num_samples)


def request_from_flags(
    num_samples: int,
    edit: Mapping[str, Any] | None = None,
    prompt: Mapping[str, Any] | None = None,
) -> Request:
    """What the flags ask for."""
    values = flags.FLAGS.flag_values_dict()
    return Request(
        checkpoint=values["checkpoint"],
        train_step=values["train_step"],
        autoencoder=values["autoencoder"],
        guide=values["guide"],
        sampling=sampling_overrides() | load_overrides(),
        split_sizes=integers("split_sizes", values["split_sizes"]),
        seed=values["seed"],
        classes=integers("classes", values["classes"]),
        num_samples=num_samples,
        edit=edit or {},
        prompt=prompt or {},
        tokenizer=values["tokenizer"],
    )


def request_from_recipe(recipe: Mapping[str, Any], checkpoint: str | None = None) -> Request:
    """What a recipe asks for; `checkpoint` is where it lies now, by default where it lay.

    Raises:
      UserError: it lacks a value.
    """
    try:
        asked = dict(recipe["request"])
        asked["sampling"] = {
            name: tuple(it) if isinstance(it, list) else it
            for name, it in asked["sampling"].items()
        }
        for name in ("split_sizes", "classes"):
            asked[name] = tuple(asked[name])
        if checkpoint is not None:
            asked["checkpoint"] = checkpoint
        return Request(**asked)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"the recipe can't be read ({error}); another version of cfjax wrote it."
        ) from error


def recipe_of(
    program: str, request: Request, model: Sampler, settings: sampling.SamplingSettings
) -> dict[str, Any]:
    """What fixes the bytes of the images, as JSON values.

    All processes of a run call it.
    """
    resolved = dict(model.config.sampling) | dict(request.sampling)
    train_step = int(find(request.checkpoint, request.train_step).name)
    module = model.autoencoder
    solver = dataclasses.asdict(settings.solver)
    asked = dataclasses.asdict(
        dataclasses.replace(
            request,
            checkpoint=fspath(request.checkpoint),
            train_step=train_step,
            sampling={name: _json_value(it) for name, it in resolved.items()},
        )
    )
    for name in ("prompt", "tokenizer"):  # as before these were there
        if not asked[name]:
            del asked[name]
    return {
        "program": program,
        "request": asked,
        "num_classes": model.model.num_classes,
        "split_sizes": list(settings.split_sizes),
        "num_denoising_steps": [it.num_timesteps for it in settings.schedules],
        "timesteps": [it.timestep_map.tolist() for it in dict.fromkeys(settings.schedules)],
        "solver": solver,
        "guidance": dataclasses.asdict(settings.guidance),
        "params_sha256": params_checksum(model.params),
        "guide_params_sha256": model.guide and params_checksum(model.guide.params),
        "autoencoder_params_sha256": module and params_checksum(module.params),
        "versions": {
            "cfjax": cfjax.__version__,
            "jax": jax.__version__,
            "numpy": np.__version__,
            "device": model.mesh.devices.flat[0].device_kind,
        },
    }


def check_recipe(recipe: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuses to repeat a recipe with another model; warns of what may change the bytes.

    Args:
      recipe: that was read.
      now: of the same request with what is there now.

    Raises:
      UserError: the parameters are others, or the plan that follows from the config.
    """
    for name, value in now.items():
        if name in ("request", "versions", "program"):
            continue
        if recipe.get(name) != _json_value(value):
            raise UserError(
                f"{name} is another one than in the recipe, so that the images would be others; pass"
                " the checkpoint that it was made with: --checkpoint."
            )
    if recipe["versions"] != now["versions"]:
        logging.warning(
            "The recipe was made with %s, and this is %s: the bytes may differ by rounding.",
            _listed(recipe["versions"]),
            _listed(now["versions"]),
        )


def params_checksum(params: Any) -> str:
    """SHA-256 of all parameters with their paths, dtypes and shapes; on several processes of all."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            leaf = multihost_utils.process_allgather(leaf, tiled=True)
        array = np.ascontiguousarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        digest.update(array.view(np.uint8) if array.ndim else array.tobytes())
    return digest.hexdigest()


def _json_value(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _json_value(it) for name, it in value.items()}
    return [_json_value(it) for it in value] if isinstance(value, list | tuple) else value


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())
