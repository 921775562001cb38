"""The picture of samples that a training shows in TensorBoard."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from cfjax import build
from cfjax.data.document_rows import PackedDocuments
from cfjax.data.images import to_uint8
from cfjax.document_sampler import DocumentSampler
from cfjax.documents import ImageSegment
from cfjax.mesh_autoencoder import MeshAutoencoder
from cfjax.models.patches import unpatchify
from cfjax.rng import per_example_keys, stream_key
from cfjax.sampling import generate
from cfjax.visualization import image_grid

_NUM_DOCUMENTS = 8


def of_classes(config: ConfigDict, params: Any, autoencoder: MeshAutoencoder | None) -> np.ndarray:
    """uint8 picture of one sample a class, of at most 10 classes."""
    model = build.sampling_model(config)
    labels = np.arange(min(10, config.data.num_classes))
    settings = build.sampling_settings(config)
    keys = per_example_keys(stream_key(config.seed, "samples"), jnp.arange(len(labels)))
    tokens = generate(model, params, settings, jnp.asarray(labels), keys)
    images = np.asarray(unpatchify(jax.device_get(tokens), config.model.patch_size, model.grid))
    if autoencoder is not None:
        images = autoencoder.decode_all(images)
    return image_grid(to_uint8(images), num_columns=len(labels))


def of_documents(
    config: ConfigDict,
    params: Any,
    mesh: jax.sharding.Mesh,
    autoencoder: MeshAutoencoder | None,
    documents: PackedDocuments,
) -> np.ndarray:
    """uint8 picture of what the model makes of a few documents.

    Images after their captions, in one row; or a row for each sequence, of which the last image is
    generated.
    """
    config = config.copy_and_resolve_references()
    config.sampling.images_per_device = _NUM_DOCUMENTS
    sampler = DocumentSampler(config, build.sampling_model(config), params, mesh, autoencoder)
    prompts = documents.prompts(_NUM_DOCUMENTS)
    images = sampler.generate(prompt=prompts, seed=config.seed)
    if documents.is_captioned:
        return image_grid(images, num_columns=len(images))
    rows = [
        [*(part.pixels for part in prompt if isinstance(part, ImageSegment)), image]
        for prompt, image in zip(prompts, images, strict=True)
    ]
    return image_grid(np.concatenate(rows), num_columns=len(rows[0]))
