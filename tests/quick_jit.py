"""`jax.jit` for what a test computes once: compiled with few optimizations, which takes less time."""

import functools

import jax

quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
