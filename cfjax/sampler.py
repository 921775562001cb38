"""A trained model ready to generate images: the Python API of sampling.

sampler = cfjax.load("runs/mnist")
images = sampler.generate(labels=[3, 1, 4], num_ar_steps=7, guidance_scale=2.0)
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from os import PathLike, fspath
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from cfjax import build, build_data, checkpoints, mesh_autoencoder, sampling, sharding
from cfjax.config_loading import config_from_json
from cfjax.data.images import to_uint8
from cfjax.diffusion.schedule import NoiseSchedule
from cfjax.errors import UserError, check_choice
from cfjax.mesh_autoencoder import MeshAutoencoder
from cfjax.models.causal_fusion import CausalFusion
from cfjax.models.patches import unpatchify
from cfjax.rng import per_example_keys, stream_key


def load(
    directory: str | PathLike,
    train_step: int | None = None,
    mesh: jax.sharding.Mesh | None = None,
    autoencoder: str | PathLike | None = None,
) -> "Sampler":
    """The EMA model of a checkpoint.

    Args:
      directory: a run's workdir, its `checkpoints/` folder, or one checkpoint.
      train_step: which checkpoint, by default the latest.
      mesh: from `sharding.make_mesh`; by default each device has a copy of the parameters.
      autoencoder: folder of the one that decodes latents, by default `config.autoencoder.path`.

    Raises:
      UserError: there is no such checkpoint, it is corrupt, its config lacks a field, the mesh does
        not divide the model, or an autoencoder is missing, another one, or not needed.
    """
    config = config_from_json(checkpoints.read_config(directory, train_step))
    try:
        model = build.sampling_model(config)
        build.sampling_settings(config)
        if autoencoder is not None:
            if not build_data.sees_latents(config):
                raise UserError(
                    f"the model in {directory} generates pixels; don't pass an autoencoder."
                )
            config.autoencoder.path = fspath(autoencoder)
        if build_data.sees_latents(config) and not config.autoencoder.path:
            raise UserError(
                f"the model in {directory} generates latents, and its config names no autoencoder;"
                " pass one that decodes them: --autoencoder=FOLDER, or cfjax.load(autoencoder=...)."
            )
        decoder = build_data.autoencoder(config)
    except AttributeError as error:
        raise UserError(
            f"the config of the checkpoint in {directory} lacks the field {error.args[0]}, as another"
            " version of cfjax saved it; add the field to its config/config.json."
        ) from error
    mesh = sharding.make_mesh() if mesh is None else mesh
    build.check_mesh_divides_model(config, mesh)
    abstract = sharding.abstract_sharded(build.init_sampling_params(model), mesh, jax.random.key(0))
    params = checkpoints.restore_ema(directory, abstract, train_step)
    decodes = decoder and mesh_autoencoder.put(decoder, mesh)
    return Sampler(config, model, params, mesh, decodes)


@dataclasses.dataclass(frozen=True)
class Sampler:
    """A model with its parameters; from `load`.

    Attributes:
      config: of the run that trained it; `config.sampling` holds the defaults of `generate`.
      model: the transformer.
      params: its parameters, on `mesh`, most in the dtype of the matrix products.
      mesh: over which a batch is split.
      autoencoder: that decodes the latents which the model generates; None for pixels.
    """

    config: ConfigDict
    model: CausalFusion
    params: Any
    mesh: jax.sharding.Mesh
    autoencoder: MeshAutoencoder | None = None

    def generate(
        self,
        labels: Sequence[int],
        *,
        seed: int = 0,
        first_index: int = 0,
        batch_size: int = 256,
        split_sizes: Sequence[int] = (),
        **overrides: Any,
    ) -> np.ndarray:
        """Generates an image for each label.

        Args:
          labels: class of each image; `num_classes` for none.
          seed: of the noise and the token orders.
          first_index: index of the first image; image i depends on (seed, i) and its label alone.
          batch_size: images at a time; rounded up to a multiple of the devices.
          split_sizes: tokens of each AR step, instead of `num_ar_steps`.
          **overrides: fields of `config.sampling`, such as `num_ar_steps=7`.

        Returns:
          uint8 `[N, H, W, C]`.

        Raises:
          UserError: an unknown field, or a value out of range.
        """
        settings, schedule = self.settings(overrides, split_sizes)
        labels = self.check_labels(labels)
        batches = self.stream(labels, settings, schedule, seed, first_index, batch_size)
        return np.concatenate(list(batches))

    def settings(
        self, overrides: Mapping[str, Any], split_sizes: Sequence[int] = ()
    ) -> tuple[sampling.SamplingSettings, NoiseSchedule]:
        """`config.sampling` with fields overridden, checked.

        Raises:
          UserError: an unknown field, or a value out of range.
        """
        config = self.config.copy_and_resolve_references()
        for name, value in overrides.items():
            check_choice("sampling option", name, config.sampling)
            config.sampling[name] = value
        return build.sampling_settings(config, tuple(split_sizes))

    def check_labels(self, labels: Sequence[int]) -> np.ndarray:
        """Labels as int32 `[N]`.

        Raises:
          UserError: there is none, or one is not a class of the model.
        """
        labels = np.asarray(labels, np.int32).reshape(-1)
        null_class = self.model.null_class
        outside = labels[(labels < 0) | (labels > null_class)]
        if outside.size:
            raise UserError(
                f"class {outside[0]} is out of range: the model has the classes 0 to"
                f" {null_class - 1}, and {null_class} for none."
            )
        if not labels.size:
            raise UserError("there is no label; pass a class for each image.")
        return labels

    def stream(
        self,
        labels: np.ndarray,
        settings: sampling.SamplingSettings,
        schedule: NoiseSchedule,
        seed: int = 0,
        first_index: int = 0,
        batch_size: int = 256,
    ) -> Iterator[np.ndarray]:
        """Yields images batch by batch, uint8 `[<= batch_size, H, W, C]`; see `generate`.

        The next batch runs while the caller works on one. On several processes all get all images.
        """
        sharded = sharding.batch_sharding(self.mesh)
        num_devices = self.mesh.size
        size = -(-min(batch_size, len(labels)) // num_devices) * num_devices

        def start(begin: int) -> jax.Array:
            rows = np.minimum(np.arange(begin, begin + size), len(labels) - 1)
            on_mesh = [
                jax.make_array_from_callback(x.shape, sharded, x.__getitem__)
                for x in (labels[rows], (first_index + rows).astype(np.uint32))
            ]
            generated = _generate_images(
                self.model,
                self.params,
                schedule,
                settings,
                self.config.model.patch_size,
                stream_key(seed, "sample"),
                *on_mesh,
            )
            return generated if self.autoencoder is None else self.autoencoder.decode(generated)

        begins = range(0, len(labels), size)
        with sharding.activate(self.mesh):
            running = start(0)
            for begin in begins:
                finished = running
                if begin + size < len(labels):
                    running = start(begin + size)
                images = multihost_utils.process_allgather(finished, tiled=True)
                yield to_uint8(images[: len(labels) - begin])

    def to_images(self, generated: np.ndarray) -> np.ndarray:
        """What the model generates as images.

        Args:
          generated: pixels or latents, float `[n, H, W, C]`; NaN where nothing is yet, which an
            autoencoder sees as 0.

        Returns:
          float32 `[n, H, W, C]` in [-1, 1], about; NaN where nothing is yet.
        """
        if self.autoencoder is None:
            return generated
        missing = np.isnan(generated).any(-1, keepdims=True)
        images = self.autoencoder.decode_all(np.nan_to_num(generated))
        for axis in (1, 2):
            missing = missing.repeat(self.autoencoder.module.downsampling, axis)
        return np.where(missing, np.nan, images)

    def trajectory(
        self, label: int, seed: int = 0, index: int = 0, **overrides: Any
    ) -> tuple[sampling.Trajectory, NoiseSchedule]:
        """How image `index` emerges: see `sampling.Trajectory`, with a batch of one.

        Args:
          label: its class.
          seed, index: as in `generate`.
          **overrides: fields of `config.sampling`.

        Returns:
          The trajectory, of NumPy arrays, and the schedule of its denoising steps.
        """
        settings, schedule = self.settings(overrides)
        keys = per_example_keys(stream_key(seed, "sample"), jnp.array([index], jnp.uint32))
        labels = jnp.asarray(self.check_labels([label]))
        with sharding.activate(self.mesh):
            _, trajectory = sampling.generate(
                self.model, self.params, schedule, settings, labels, keys, return_trajectory=True
            )
        return jax.device_get(trajectory), schedule


def trace_generation(
    config: ConfigDict, mesh: jax.sharding.Mesh, batch_size: int
) -> jax.stages.Traced:
    """The program of `Sampler.generate` for a batch, over devices that may only be described."""
    model = build.sampling_model(config)
    settings, schedule = build.sampling_settings(config)
    params = sharding.abstract_sharded(build.init_sampling_params(model), mesh, jax.random.key(0))
    key = sharding.abstract_sharded(lambda: stream_key(0, "sample"), mesh)
    rows = sharding.batch_sharding(mesh)
    labels, indices = (
        jax.ShapeDtypeStruct((batch_size,), dtype, sharding=rows)
        for dtype in (jnp.int32, jnp.uint32)
    )
    with sharding.activate(mesh):
        return _generate_images.trace(
            model, params, schedule, settings, config.model.patch_size, key, labels, indices
        )


def _generate_images(model, params, schedule, settings, patch_size, key, labels, indices):
    keys = per_example_keys(key, indices)
    tokens = sampling.generate(model, params, schedule, settings, labels, keys)
    return unpatchify(tokens, patch_size, model.grid)


_generate_images = jax.jit(_generate_images, static_argnums=(0, 2, 3, 4))
