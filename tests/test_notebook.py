"""The notebook: it runs from top to bottom, and the committed one shows what it makes."""

import ast
import io
import os
from base64 import b64decode

import jax
import nbformat
import pytest
import tiny
from nbclient import NotebookClient
from PIL import Image

from cfjax import build, checkpoints, sharding, train_state
from cfjax.config_loading import config_to_json
from cfjax.optimizer import make_optimizer

NOTEBOOK = tiny.REPOSITORY / "docs/notebooks/tour.ipynb"
GIF = tiny.REPOSITORY / "docs/emergence.gif"
SHOWN = {"show": "png", "table": "png", "display.Image": "gif"}


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A tiny run that was not trained."""
    workdir = tmp_path_factory.mktemp("run")
    config = tiny.config()
    init = build.init_params(build.model(config))
    optimizer = make_optimizer(build.optimizer_settings(config))
    state = sharding.born_sharded(
        lambda key: train_state.create(init(key), optimizer),
        sharding.make_mesh(),
        jax.random.key(0),
    )
    with checkpoints.CheckpointWriter(workdir, keep_last=1) as writer:
        writer.save(state, config_to_json(config), 0)
    return workdir


@pytest.fixture
def committed():
    return nbformat.read(NOTEBOOK, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def what_is_shown(cell):
    """The kind of picture that the cell's last line shows; None if it prints."""
    last = ast.parse(cell.source).body[-1]
    call = ast.unparse(last.value.func) if isinstance(last, ast.Expr) else ""
    return SHOWN.get(call)


def check_outputs(notebook):
    """Every code cell ran, in order, and printed or showed what its last line says."""
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    shown = []
    for cell in cells:
        assert cell.outputs, cell.source
        assert all(output.output_type != "error" for output in cell.outputs)
        kind = what_is_shown(cell)
        if kind:
            picture = cell.outputs[-1].data[f"image/{kind}"]
            assert Image.open(io.BytesIO(b64decode(picture))).format == kind.upper()
            shown.append(kind)
        else:
            assert any(output.get("name") == "stdout" for output in cell.outputs)
    assert sorted(shown) == ["gif"] + ["png"] * 6


@pytest.mark.slow
def test_it_runs(committed, workdir, tmp_path):
    for cell in code_cells(committed):
        cell.outputs, cell.execution_count = [], None
    client = NotebookClient(
        committed,
        timeout=300,
        kernel_name="python3",
        resources={"metadata": {"path": str(tmp_path)}},
    )
    client.execute(
        env={
            **os.environ,
            "CFJAX_CHECKPOINT": str(workdir),
            "PYTHONPATH": str(tiny.REPOSITORY),
            "XLA_FLAGS": "",  # one device
            "IPYTHONDIR": str(tmp_path / "ipython"),
            "TMPDIR": str(tmp_path),
        }
    )
    check_outputs(committed)
