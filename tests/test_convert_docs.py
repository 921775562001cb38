"""The commands of docs/weights.md on small stand-ins; run by `launch/test.sh --all`."""

import re
import shlex

import golden_vae
import pytest
import tiny
from converting import convert
from golden_data import published_params
from test_convert_autoencoder import published as published_autoencoder
from test_convert_autoencoder import write as write_diffusers
from test_convert_inception import random_arrays, write_graph
from test_convert_optimizer import trained
from test_convert_torch import save, tensors

from cfjax import checkpoint_weights

torch = pytest.importorskip("torch")

pytestmark = [
    pytest.mark.oracle,
    # ml_collections loads config files that way.
    pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning"),
]
# Both variants that the page names, in the sizes of the stand-ins.
CONFIG = """
from configs import imagenet256

SIZES = {"xl": (64, 3, 4, 4, 10, 8), "ablation": (48, 2, 3, 2, 5, 8)}

def get_config(variant):
    config = imagenet256.get_config(variant)
    model, data = config.model, config.data
    model.width, model.depth, model.num_heads, model.num_condition_tokens, *rest = SIZES[variant]
    data.num_classes, data.size = rest
    return config
"""


def test_every_command_makes_what_it_says(tmp_path, monkeypatch):
    save(tmp_path / "CausalFusion_XL.pt", trained("A").document())
    save(tmp_path / "ablation.pt", tensors(published_params("B")))
    names = golden_vae.published_params()
    save(tmp_path / "kl16.ckpt", {"model": tensors(names)})
    whole = {"first_stage_model." + name: array for name, array in names.items()}
    save(tmp_path / "v1-5-pruned.ckpt", {"state_dict": tensors(whole)})
    write_diffusers(tmp_path / "sd-vae-ft-mse", published_autoencoder())
    write_graph(tmp_path / "classify_image_graph_def.pb", random_arrays())
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/imagenet256.py").write_text(CONFIG)

    page = (tiny.REPOSITORY / "docs/weights.md").read_text().replace("\\\n", "")
    commands = re.findall(r"^python -m cfjax\.convert (.*)$", page, re.M)
    assert len(commands) == 10
    monkeypatch.chdir(tmp_path)
    for command in commands:
        words = dict(word.removeprefix("--").split("=", 1) for word in shlex.split(command))
        source, out = words.pop("source"), words.pop("out")
        convert(source, out, *(f"--{name}={value}" for name, value in words.items()))
        assert (tmp_path / out).exists(), command
    has_state = {
        path.name: checkpoint_weights.has_optimizer_state(path)
        for path in (tmp_path / "runs").iterdir()
    }
    assert has_state == {
        "published_xl": True,
        "ablation": False,
        "published_at_512": False,
        "xl_at_512": False,
    }
