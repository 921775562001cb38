"""LPIPS against the published architecture in plain torch, through our converter."""

import functools

import jax
import numpy as np
import pytest
from converting import convert

from cfjax import lpips_files
from cfjax.models.lpips import VGG16, Lpips

torch = pytest.importorskip("torch")

pytestmark = pytest.mark.oracle

# float32 in both, 13 convolutions deep; the differences of near features lose a digit.
RTOL = 1e-4


class Published(torch.nn.Module):
    """`lpips.LPIPS(net="vgg")`, with torchvision's list of layers, in their words."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        layers, channels = [], 3
        for stage in VGG16:
            for width in stage:
                layers += [torch.nn.Conv2d(channels, width, 3, padding=1), torch.nn.ReLU()]
                channels = width
            layers.append(torch.nn.MaxPool2d(2, 2))
        self.features = torch.nn.Sequential(*layers)
        for number, stage in enumerate(VGG16):
            linear = torch.nn.Conv2d(stage[-1], 1, 1, bias=False)
            linear.weight.data.abs_()
            model = torch.nn.Sequential(torch.nn.Dropout(), linear)
            self.add_module(f"lin{number}", torch.nn.ModuleDict({"model": model}))
        with torch.no_grad():  # else what reaches the last stage is next to nothing
            for layer in layers:
                if isinstance(layer, torch.nn.Conv2d):
                    layer.weight.mul_(2.4)
                    layer.bias.normal_(0, 0.1)

    def forward(self, x, y):
        shift = torch.tensor([-0.030, -0.088, -0.188])[None, :, None, None]
        scale = torch.tensor([0.458, 0.448, 0.450])[None, :, None, None]
        total, ends, stage = 0, (3, 8, 15, 22, 29), 0
        x, y = ((images - shift) / scale for images in (x, y))
        for index, layer in enumerate(self.features[:30]):  # before the last pooling
            x, y = layer(x), layer(y)
            if index in ends:
                units = [f / (f.pow(2).sum(1, keepdim=True).sqrt() + 1e-10) for f in (x, y)]
                squared = (units[0] - units[1]) ** 2
                linear = self.get_submodule(f"lin{stage}.model.1")
                total, stage = total + linear(squared).mean((2, 3))[:, 0], stage + 1
        return total


@pytest.fixture(scope="module")
def published():
    return Published().eval()


def write(folder, published):
    """As torchvision and the package lpips keep them; VGG-16 has a classifier too."""
    folder.mkdir()
    state = published.state_dict()
    network = {name: tensor for name, tensor in state.items() if name.startswith("features.")}
    linear = {name: tensor for name, tensor in state.items() if name.startswith("lin")}
    torch.save(network | {"classifier.0.weight": torch.zeros(2, 2)}, folder / "vgg16.pth")
    torch.save(linear, folder / "vgg.pth")
    return folder


@pytest.fixture(scope="module")
def ours(published, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lpips")
    return convert(write(folder / "source", published), folder / "ours", "--from=lpips")


def images(channels, size):
    rng = np.random.default_rng(channels)
    return rng.uniform(-1, 1, (2, 3, *size, channels)).astype(np.float32)


@pytest.mark.parametrize("channels", [pytest.param(1, marks=pytest.mark.long), 3])
def test_distances_and_gradients_are_the_published_ones(published, ours, channels):
    params = lpips_files.load(ours)
    x, y = images(channels, (37, 20))

    @functools.partial(jax.value_and_grad, has_aux=True)
    def sum_and_each(x):
        distances = Lpips().apply({"params": params}, x, y)
        return distances.sum(), distances

    (total, each), gradient = jax.jit(sum_and_each)(x)
    tensors = [torch.from_numpy(np.moveaxis(z, -1, 1).copy()).requires_grad_() for z in (x, y)]
    expected = published(*(tensor.expand(-1, 3, -1, -1) for tensor in tensors))
    np.testing.assert_allclose(each, expected.detach().numpy(), rtol=RTOL)
    np.testing.assert_allclose(total, expected.sum().item(), rtol=RTOL)
    expected.sum().backward()
    theirs = np.moveaxis(tensors[0].grad.numpy(), 1, -1)
    np.testing.assert_allclose(gradient, theirs, rtol=1e-2, atol=1e-3 * np.abs(theirs).max())
