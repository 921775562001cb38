"""`jax.jit` with few of the compiler's optimizations: less time for what a test computes once.

For comparisons within a tolerance alone; what is compared to the bit is compiled as it is for users.
"""

import functools

import jax

quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
