"""Keys by address: (seed, named stream, indices) -> key, so that nothing has to be saved to resume.

Adding a stream moves no other stream, and a per-example key depends on the example's global index
alone, never on the batch size, the mesh or the number of hosts.
"""

import zlib

import jax
import jax.numpy as jnp


def stream_key(seed: int, stream: str, *indices: int | jax.Array) -> jax.Array:
    """The key of a named stream at an address.

    Args:
      seed: the run's seed.
      stream: name of the stream, such as `"noise"`; hashed with CRC-32.
      *indices: integers (traced or not) folded in one after the other, such as the train step.

    Returns:
      A typed scalar PRNG key.
    """
    key = jax.random.fold_in(jax.random.key(seed), jnp.uint32(zlib.crc32(stream.encode())))
    for index in indices:
        key = jax.random.fold_in(key, index)
    return key


def per_example_keys(key: jax.Array, indices: jax.Array) -> jax.Array:
    """One key per example: `indices [batch]`, global example indices, to typed keys `[batch]`."""
    return jax.vmap(lambda index: jax.random.fold_in(key, index))(indices)
