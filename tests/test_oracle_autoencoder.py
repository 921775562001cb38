"""The autoencoder against AutoencoderKL of diffusers, both ways; run by `launch/test.sh --all`."""

import numpy as np
import pytest
from autoencoders import random_params
from converting import convert
from golden_data import assert_close_to_max

from cfjax import autoencoder_files
from cfjax.models.autoencoder_kl import KL8, KL16, AutoencoderKL

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

pytestmark = pytest.mark.oracle

# Both run in float32, 40 layers deep.
RTOL = 1e-5
STABLE_DIFFUSION = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "latent_channels": 4,
    "norm_num_groups": 32,
    "scaling_factor": 0.18215,
}
SHRUNK = STABLE_DIFFUSION | {"block_out_channels": [8, 16, 32, 32], "norm_num_groups": 4}
WITH_ATTENTION = SHRUNK | {
    "down_block_types": ["DownEncoderBlock2D"] * 3 + ["AttnDownEncoderBlock2D"],
    "up_block_types": ["UpDecoderBlock2D", "AttnUpDecoderBlock2D", *["UpDecoderBlock2D"] * 2],
    "layers_per_block": 1,
}


def randomize(module):
    """Norms and biases too, which start at ones and zeros."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.ndim == 1:
                mean = 1.0 if "norm" in name and name.endswith("weight") else 0.0
                parameter.normal_(mean, 0.2)
    return module.eval()


def assert_same(theirs, ours, size):
    """Encodes and decodes alike, images of `size`."""
    rng = np.random.default_rng(0)
    images = rng.uniform(-1, 1, (2, *size, 3)).astype(np.float32)
    variables = {"params": ours.params}
    parameters = ours.module.apply(variables, images, method="encode_parameters")
    latents = rng.normal(
        size=(2, *np.array(size) // ours.module.downsampling, parameters.shape[3] // 2)
    )
    latents = latents.astype(np.float32)
    decoded = ours.module.apply(variables, latents, method="decode")
    with torch.no_grad():
        expected = theirs.encode(nchw(images)).latent_dist.parameters
        assert_close_to_max(parameters, nhwc(expected), RTOL)
        assert_close_to_max(decoded, nhwc(theirs.decode(nchw(latents)).sample), RTOL)


def nchw(array):
    return torch.from_numpy(np.moveaxis(array, -1, 1).copy())


def nhwc(tensor):
    return np.moveaxis(tensor.numpy(), 1, -1)


def check_both_ways(tmp_path, config, size):
    theirs = randomize(diffusers.AutoencoderKL(**config))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = convert(tmp_path / "theirs", tmp_path / "ours", "--from=diffusers")
    loaded = autoencoder_files.load(ours)
    assert loaded.module.scale == config["scaling_factor"]
    assert_same(theirs, loaded, size)
    back = convert(ours, tmp_path / "back", "--to=diffusers")
    again = diffusers.AutoencoderKL.from_pretrained(back, low_cpu_mem_usage=False)
    assert {key: again.config[key] for key in config} == config
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, theirs.state_dict()[name]), name
    return loaded.module


@pytest.mark.parametrize("config", [SHRUNK, WITH_ATTENTION])
def test_theirs_to_ours_and_back(tmp_path, config):
    check_both_ways(tmp_path, config, (16, 24))


@pytest.mark.parametrize(
    "layout", ["diffusers", pytest.param("diffusers_old", marks=pytest.mark.long)]
)
def test_ours_to_theirs(tmp_path, layout):
    module = AutoencoderKL(
        channels=16,
        channel_multipliers=(1, 2, 2),
        latent_channels=3,
        scale=0.5,
        num_groups=8,
        encoder_attention_levels=(1,),
    )
    autoencoder_files.save(tmp_path / "ours", module, random_params(module))
    back = convert(tmp_path / "ours", tmp_path / "theirs", f"--to={layout}")
    theirs = diffusers.AutoencoderKL.from_pretrained(back, low_cpu_mem_usage=False).eval()
    assert theirs.config.scaling_factor == 0.5
    assert_same(theirs, autoencoder_files.load(tmp_path / "ours"), (8, 12))


@pytest.mark.long
def test_stable_diffusions_own_size(tmp_path):
    assert check_both_ways(tmp_path, STABLE_DIFFUSION, (64, 64)) == AutoencoderKL(**KL8)


@pytest.mark.long
def test_mars_own_size_has_the_names_that_diffusers_gives_it(tmp_path):
    """MAR's autoencoder is none of diffusers', but of the same parts."""
    config = STABLE_DIFFUSION | {
        "down_block_types": ["DownEncoderBlock2D"] * 4 + ["AttnDownEncoderBlock2D"],
        "up_block_types": ["UpDecoderBlock2D"] * 5,
        "block_out_channels": [128, 128, 256, 256, 512],
        "latent_channels": 16,
        "scaling_factor": 0.2325,
    }
    assert check_both_ways(tmp_path, config, (32, 32)) == AutoencoderKL(**KL16)
