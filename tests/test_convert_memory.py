"""How much memory conversions take beside the files' sizes; run by `launch/test.sh --all`."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import golden_data
import pytest
import tiny
from test_convert_autoencoder import write as write_diffusers

from cfjax.convert import autoencoder, causal_fusion
from cfjax.models.autoencoder_kl import KL8, AutoencoderKL
from cfjax.models.causal_fusion import CausalFusion

torch = pytest.importorskip("torch")

pytestmark = [pytest.mark.oracle, pytest.mark.long]

# Converts the first, which is small, so that all is loaded that takes memory once; then says the
# peak of before, converts the second, and says the peak of after.
CODE = """
import sys
from pathlib import Path
from converting import convert

def peak():  # getrusage would count the process that started this one
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(line.split()[1] for line in lines if line.startswith("VmHWM"))

_, *places = sys.argv
convert(*places[:2], *places[4:])
before = peak()
convert(*places[2:])
print(before, peak())
"""


def check_peak(sources, outs, flag):
    """Of what the large one takes beyond the small one, against the larger of its two files."""
    done = subprocess.run(
        [sys.executable, "-c", CODE, sources[0], outs[0], sources[1], outs[1], flag],
        env=os.environ
        | {
            "XLA_FLAGS": "--xla_force_host_platform_device_count=1",
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), str(tiny.REPOSITORY)]),
        },
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    before, after = (1024 * int(peak) for peak in done.stdout.split())
    larger = max(size_of(sources[1]), size_of(outs[1]))
    print(
        f"{flag}: {(after - before) / larger:.2f} of {larger / 1e6:.0f} MB, {before / 1e6:.0f} MB before"
    )
    assert larger > 3e8 and after - before <= 1.5 * larger


def size_of(path):
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)


@functools.cache
def shapes_of(width, depth):
    model = CausalFusion(
        width=width,
        depth=depth,
        num_heads=width // 64,
        grid=(16, 16),
        token_width=16,
        num_classes=1000,
        num_condition_tokens=8,
    )
    return causal_fusion.published_shapes(golden_data.param_shapes(model), model.grid)


def random_tensors(shapes):
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def random_opt(shapes):
    """Of an optimizer that has made three updates."""
    optimizer = torch.optim.AdamW([torch.nn.Parameter(t) for t in random_tensors(shapes).values()])
    state = {
        index: {"step": torch.tensor(3.0), "exp_avg": first, "exp_avg_sq": first.square()}
        for index, first in enumerate(random_tensors(shapes).values())
    }
    return optimizer.state_dict() | {"state": state}


@pytest.mark.parametrize("sections", [("model", "ema", "opt"), ("model", "ema"), ("model",)])
def test_transformer_there_and_back(tmp_path, sections):
    published, ours, back = ([tmp_path / f"{size}{i}.pt" for size in "sl"] for i in range(3))
    for path, shapes in zip(published, (shapes_of(64, 1), shapes_of(1024, 6)), strict=True):
        makers = {"opt": random_opt}
        torch.save({part: makers.get(part, random_tensors)(shapes) for part in sections}, path)
    check_peak(published, ours, "--from=published")
    check_peak(ours, back, "--to=published")


def test_autoencoder_there_and_back(tmp_path):
    published, ours, *back = ([tmp_path / f"{size}{i}" for size in "sl"] for i in range(4))
    small = AutoencoderKL(**KL8 | {"channels": 32})
    for path, module in zip(published, (small, AutoencoderKL(**KL8)), strict=True):
        _, shapes = autoencoder.published_shapes(module, "diffusers")
        arrays = {key: tensor.numpy() for key, tensor in random_tensors(shapes).items()}
        write_diffusers(path, arrays)
    check_peak(published, ours, "--from=diffusers")
    check_peak(ours, back[0], "--to=diffusers")
    check_peak(ours, back[1], "--to=ldm")
    check_peak(back[1], [tmp_path / "s", tmp_path / "l"], "--from=ldm")
