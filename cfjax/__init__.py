"""CausalFusion in JAX: one transformer that factorizes images over AR steps and noise levels."""

from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # Late, so that importing one room does not load them all.
    if name == "load":
        from cfjax.model_loading import load

        return load
    raise AttributeError(f"module 'cfjax' has no attribute {name!r}")
