"""CausalFusion in JAX: one transformer that factorizes images over AR steps and noise levels."""

__version__ = "0.1.0"
