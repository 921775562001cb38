"""A trained model ready to generate and edit images: the Python API.

model = cfjax.load("runs/mnist")
images = model.generate([3, 1, 4], num_ar_steps=7, guidance_scale=2.0)
edited = model.edit(images, [8, 7, 9], keep="top")

Longer than most files: it is one class, whose methods are half docstrings.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from cfjax import build, editing, sampling, sharding
from cfjax.class_evidence import best_of, check_num_candidates, evidence_of_images
from cfjax.data.images import to_model_range, to_uint8
from cfjax.errors import UserError, check_choice
from cfjax.guided_network import Network
from cfjax.mesh_autoencoder import MeshAutoencoder
from cfjax.models.causal_fusion import CausalFusion
from cfjax.models.patches import patchify, unpatchify
from cfjax.rng import per_example_keys, stream_key

# Of config.sampling, fixed when a model is loaded.
OF_MODEL = ("dtype", "images_per_device")


def override_sampling(config: ConfigDict, overrides: Mapping[str, Any]) -> None:
    """Sets fields of `config.sampling`.

    Raises:
      UserError: an unknown field, or a value of another type.
    """
    for name, value in overrides.items():
        check_choice("sampling option", name, config.sampling)
        if name == "denoising_steps":
            value = value if isinstance(value, str) else "/".join(map(str, np.atleast_1d(value)))
        try:
            config.sampling[name] = value
        except TypeError as error:
            raise UserError(
                f"sampling option {name} is {value!r}, but must be of the type of"
                f" {config.sampling[name]!r}."
            ) from error


@dataclasses.dataclass(frozen=True)
class Sampler:
    """A model with its parameters; from `model_loading.load`.

    Attributes:
      config: of the run that trained it; `config.sampling` holds the defaults of `generate`.
      model: the transformer.
      params: its parameters, on `mesh`, most in the dtype of the matrix products.
      mesh: over which a batch is split.
      autoencoder: that decodes the latents which the model generates; None for pixels.
      guide: a weaker model that guides, or None.
    """

    config: ConfigDict
    model: CausalFusion
    params: Any
    mesh: jax.sharding.Mesh
    autoencoder: MeshAutoencoder | None = None
    guide: Network | None = None

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of the images, of which latents are decoded."""
        size, channels = self.config.data.size, self.config.data.channels
        if self.autoencoder is not None:
            module = self.autoencoder.module
            size, channels = size * module.downsampling, module.image_channels
        return size, size, channels

    def generate(
        self,
        labels: Sequence[int] = (),
        *,
        seed: int = 0,
        first_index: int = 0,
        batch_size: int = 256,
        split_sizes: Sequence[int] = (),
        **overrides: Any,
    ) -> np.ndarray:
        """Generates an image for each label; a prompt needs a model of documents.

        Args:
          labels: class of each image; `num_classes` for none.
          seed: of the noise and the token orders.
          first_index: index of the first image; image i depends on (seed, i) and its label alone, to
            the bit.
          batch_size: images that are fetched at a time.
          split_sizes: tokens of each AR step, instead of `num_ar_steps`.
          **overrides: fields of `config.sampling`, such as `num_ar_steps=7`; `denoising_steps` may be
            a number, or a list of one for each AR step.

        Returns:
          uint8 `[N, H, W, C]`.

        Raises:
          UserError: an unknown field, or a value out of range.
        """
        if "prompt" in overrides:
            raise UserError(
                "the model has no text head and takes no prompt; pass labels, or load one that was"
                " trained with text.tokenizer."
            )
        settings = self.settings(overrides, split_sizes)
        labels = self.check_labels(labels)
        batches = self.stream(labels, settings, seed, first_index, batch_size)
        return np.concatenate(list(batches))

    def caption(self, images: np.ndarray, **options: Any) -> list[str]:
        """A text for each image; see `DocumentSampler.caption`.

        Raises:
          UserError: the model has no text head.
        """
        raise UserError(
            "the model has no text head and can't write captions; load one that was trained with"
            " text.tokenizer."
        )

    def edit(
        self,
        images: np.ndarray,
        labels: Sequence[int],
        keep: str | np.ndarray,
        *,
        keep_box: Sequence[int] = (),
        keep_ratio: float = 0.5,
        kept_as: str = "clean",
        num_candidates: int = 1,
        seed: int = 0,
        first_index: int = 0,
        batch_size: int = 256,
        split_sizes: Sequence[int] = (),
        **overrides: Any,
    ) -> np.ndarray:
        """Keeps a part of each image and generates the rest anew: see `cfjax.editing`.

        Args:
          images: uint8 `[N, H, W, C]`, generated or one's own.
          labels: class of each result; `num_classes` for none.
          keep: what is kept: "center", "outside" (of the center), "top", "bottom", "left", "right",
            "box", "random", or bool pixels `[H, W]`. A token stays if all of its pixels do.
          keep_box: of "box": (top, left, bottom, right) in pixels; bottom and right are not in it.
          keep_ratio: of "random": the share of the tokens.
          kept_as: how the model sees what is kept: "clean", or "noised" as the tokens that are
            denoised beside it, so that the new class shapes the image before its strokes are fixed.
          num_candidates: edits of each image, of which the one is returned that fits the class best
            as the model sees it (`cfjax.class_evidence`); the first is that of `num_candidates=1`.
          seed, first_index, batch_size: see `generate`. With nothing kept it is `generate`.
          split_sizes: of the tokens that are generated.
          **overrides: fields of `config.sampling`.

        Returns:
          uint8 `[N, H, W, C]`. Of a model of pixels the kept ones are those of `images`; an
          autoencoder gives them back about.

        Raises:
          UserError: images, a mask or a box that do not fit, an unknown field, or a value out of
            range.
        """
        labels = self.check_labels(labels)
        known = self.known_tokens(images, keep, keep_box, keep_ratio, seed, first_index)
        if len(labels) != len(images):
            raise UserError(
                f"there are {len(labels)} labels for {len(images)} images; pass one for each."
            )
        settings = self.settings(overrides, split_sizes, int(known.is_known[0].sum()))
        settings = dataclasses.replace(settings, kept_as=kept_as)
        self.check_num_candidates(num_candidates, labels)
        batches = self.stream(
            labels, settings, seed, first_index, batch_size, known, num_candidates
        )
        return np.concatenate(list(batches))

    def settings(
        self, overrides: Mapping[str, Any], split_sizes: Sequence[int] = (), num_known: int = 0
    ) -> sampling.SamplingSettings:
        """`config.sampling` with fields overridden, checked; `num_known` tokens are not generated.

        Raises:
          UserError: an unknown field, or a value out of range.
        """
        config = self.config.copy_and_resolve_references()
        override_sampling(config, overrides)
        for name in OF_MODEL:
            if config.sampling[name] != self.config.sampling[name]:
                raise UserError(f"{name} is of the loaded model; pass it to cfjax.load.")
        return build.sampling_settings(config, split_sizes, num_known, self.guide is not None)

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

    def check_num_candidates(self, num_candidates: int, labels: np.ndarray) -> None:
        """Refuses candidates among which the model can't choose.

        Raises:
          UserError: see `class_evidence.check_num_candidates`.
        """
        class_dropout = self.config.loss.class_dropout
        check_num_candidates(num_candidates, labels, self.model.null_class, class_dropout)

    def known_tokens(
        self,
        images: np.ndarray,
        keep: str | np.ndarray,
        keep_box: Sequence[int] = (),
        keep_ratio: float = 0.5,
        seed: int = 0,
        first_index: int = 0,
    ) -> sampling.Known:
        """The tokens of images, and which of them are kept; see `edit`.

        Returns:
          NumPy arrays.

        Raises:
          UserError: images, a mask or a box that do not fit.
        """
        images = np.asarray(images)
        if images.dtype != np.uint8 or images.shape[1:] != self.image_shape or not len(images):
            raise UserError(
                f"the images are {images.dtype} {list(images.shape)}, but must be uint8 of [N,"
                f" {', '.join(map(str, self.image_shape))}]."
            )
        grid = self.model.grid
        if isinstance(keep, str) and keep == "random":
            keys = per_example_keys(
                stream_key(seed, "keep"), first_index + jnp.arange(len(images), dtype=jnp.uint32)
            )
            is_known = editing.random_tokens(keys, keep_ratio, grid)
        else:
            if isinstance(keep, str):
                keep = editing.kept_pixels(keep, self.image_shape[:2], keep_box)
            is_known = editing.kept_tokens(keep, self.image_shape[:2], grid)
            is_known = np.broadcast_to(is_known, (len(images), len(is_known)))
        return sampling.Known(self.to_tokens(images), np.asarray(is_known))

    def to_tokens(self, images: np.ndarray) -> np.ndarray:
        """Images uint8 `[N, H, W, C]` as the model sees them: float32 `[N, L, token_width]`."""
        seen = to_model_range(images)
        if self.autoencoder is not None:
            seen = self.autoencoder.encode_all(seen)
        return np.asarray(patchify(seen, self.config.model.patch_size))

    def stream(
        self,
        labels: np.ndarray,
        settings: sampling.SamplingSettings,
        seed: int = 0,
        first_index: int = 0,
        batch_size: int = 256,
        known: sampling.Known | None = None,
        num_candidates: int = 1,
    ) -> Iterator[np.ndarray]:
        """Yields images batch by batch, uint8 `[n, H, W, C]`; see `generate`.

        The next ones are made while the caller works on a batch. On several processes all get all
        images. `known` has rows for `labels`; for `num_candidates` see `edit`.

        Every device makes `config.sampling.images_per_device` images at a time, and image i is always
        at the same place among them: as sums of another number of rows are rounded otherwise, so
        images are the same to the bit for any batch size and any number of devices.
        """
        group = self.config.sampling.images_per_device
        at_once = group * sharding.num_batch_shards(self.mesh)
        offset = first_index % group
        end = offset + len(labels)
        others = (stream_key(seed, "candidate", index) for index in range(1, num_candidates))
        keys = [stream_key(seed, "sample"), *others]
        evidence_key = stream_key(seed, "class_evidence")

        def start(begin: int) -> jax.Array:
            places = np.clip(np.arange(begin, begin + at_once), offset, end - 1)
            rows = places - offset
            arrays = (labels[rows], (first_index + rows).astype(np.uint32))
            if known is not None:
                arrays += (known.tokens[rows], known.is_known[rows])
            return self._generate(settings, keys, evidence_key, *map(self._on_mesh, arrays))

        waiting, num_waiting = [], 0
        begins = range(0, end, at_once)
        with sharding.activate(self.mesh):
            running = start(0)
            for begin in begins:
                finished = running
                if begin + at_once < end:
                    running = start(begin + at_once)
                images = to_uint8(multihost_utils.process_allgather(finished, tiled=True))
                waiting.append(images[max(offset - begin, 0) : end - begin])
                num_waiting += len(waiting[-1])
                if num_waiting >= batch_size or begin == begins[-1]:
                    yield np.concatenate(waiting)
                    waiting, num_waiting = [], 0

    def _on_mesh(self, rows: np.ndarray) -> jax.Array:
        sharded = sharding.batch_sharding(self.mesh)
        return jax.make_array_from_callback(rows.shape, sharded, rows.__getitem__)

    def _generate(self, settings, keys, evidence_key, labels, indices, *known):
        """A batch of images on the mesh: for several keys the best candidate of each."""
        guide = self.guide or Network(None, None)
        patch_size = self.config.model.patch_size

        def generated(key):
            return _generate_images(
                self.model,
                guide.model,
                settings,
                patch_size,
                self.params,
                guide.params,
                key,
                labels,
                indices,
                sampling.Known(*known) if known else None,
            )

        def evidence_of(images):
            return evidence_of_images(
                self.model,
                build.noise_schedule(self.config),
                self.config.diffusion.prediction_type,
                patch_size,
                self.params,
                evidence_key,
                images,
                labels,
                indices,
            )

        images = best_of(map(generated, keys), evidence_of, len(keys))
        return images if self.autoencoder is None else self.autoencoder.decode(images)

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
    ) -> tuple[sampling.Trajectory, sampling.SamplingSettings]:
        """How image `index` emerges: see `sampling.Trajectory`, with a batch of one.

        Args:
          label: its class.
          seed, index: as in `generate`.
          **overrides: fields of `config.sampling`.

        Returns:
          The trajectory, of NumPy arrays, and the settings with the schedule of each AR step.
        """
        settings = self.settings(overrides)
        keys = per_example_keys(stream_key(seed, "sample"), jnp.array([index], jnp.uint32))
        labels = jnp.asarray(self.check_labels([label]))
        guide = self.guide or Network(None, None)
        with sharding.activate(self.mesh):
            _, trajectory = sampling.generate(
                self.model,
                self.params,
                settings,
                labels,
                keys,
                guide_model=guide.model,
                guide_params=guide.params,
                return_trajectory=True,
            )
        return jax.device_get(trajectory), settings


def trace_generation(
    config: ConfigDict, mesh: jax.sharding.Mesh, batch_size: int
) -> jax.stages.Traced:
    """The program of `Sampler.generate` for a batch, over devices that may only be described."""
    model = build.sampling_model(config)
    settings = build.sampling_settings(config)
    params = sharding.abstract_sharded(build.init_sampling_params(model), mesh, jax.random.key(0))
    key = sharding.abstract_sharded(lambda: stream_key(0, "sample"), mesh)
    rows = sharding.batch_sharding(mesh)
    labels, indices = (
        jax.ShapeDtypeStruct((batch_size,), dtype, sharding=rows)
        for dtype in (jnp.int32, jnp.uint32)
    )
    with sharding.activate(mesh):
        return _generate_images.trace(
            model,
            None,
            settings,
            config.model.patch_size,
            params,
            None,
            key,
            labels,
            indices,
            None,
        )


def _generate_images(
    model, guide_model, settings, patch_size, params, guide_params, key, labels, indices, known
):
    tokens = sampling.generate(
        model,
        params,
        settings,
        labels,
        per_example_keys(key, indices),
        known=known,
        guide_model=guide_model,
        guide_params=guide_params,
    )
    return unpatchify(tokens, patch_size, model.grid)


_generate_images = jax.jit(_generate_images, static_argnums=(0, 1, 2, 3))
