"""Stands in for torchvision, which the field's FID packages import and whose builds fit few torches.

Nothing of it is used: their Inception and their metrics are their own.
"""

import contextlib
import importlib.machinery
import sys
import types
from unittest import mock

_MODULES = [
    f"torchvision{name}"
    for name in ("", ".transforms", ".transforms.functional", ".datasets", ".models")
]


@contextlib.contextmanager
def installed():
    """While it is, `import torchvision` finds the stand-in; import those packages within."""
    with mock.patch.dict(sys.modules):
        before = set(sys.modules)
        sys.modules.update({name: _module(name) for name in _MODULES})
        yield
        kept = {
            name: module
            for name, module in sys.modules.items()
            if name not in before and name not in _MODULES
        }
    sys.modules.update(kept)


def _module(name):
    module = types.ModuleType(name)
    module.__getattr__ = _anything
    module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
    module.__path__ = []
    return module


def _anything(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return mock.MagicMock(name=name)
