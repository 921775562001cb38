"""From a checkpoint to scores, against torch-fidelity on the PNGs of the same samples."""

import json

import numpy as np
import pytest
import runs
import torchvision_stub
from converting import convert
from test_oracle_inception import published, their_outputs  # noqa: F401

from cfjax import evaluate, sample
from cfjax.data.image_files import read_images, write_png
from cfjax.data.sources import MnistSource, all_images

torch = pytest.importorskip("torch")
with torchvision_stub.installed():
    torch_fidelity = pytest.importorskip("torch_fidelity")
    datasets = pytest.importorskip("torch_fidelity.datasets")
    metric_fid = pytest.importorskip("torch_fidelity.metric_fid")

pytestmark = [
    pytest.mark.oracle,
    pytest.mark.slow,
    # ml_collections loads config files that way.
    pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning"),
]
NUM_SAMPLES, NUM_REAL = 16, 15
# float32 features of two frameworks, 1e-5 apart, of which distances are sums.
RTOL = 1e-3


def spread_classes(extractor):
    """Lets images differ in their classes: under random weights all have one, and IS is 1."""
    images = all_images(MnistSource("train"))[0][:4]
    pool = torch.from_numpy(their_outputs(extractor, np.repeat(images, 3, axis=-1))[0].mean(0))
    weight = extractor.fc.weight.data
    weight -= torch.outer(weight @ pool, pool) / pool.dot(pool)
    weight *= 10


def their_dataset(folder):
    """Of the PNGs in a folder, without torchvision's transforms."""

    def to_tensor(image):
        return torch.from_numpy(np.moveaxis(np.array(image), -1, 0).copy())

    return datasets.ImagesPathDataset(sorted(map(str, folder.glob("*.png"))), to_tensor)


def their_spatial_distance(extractor, *sets):
    """sFID, which torch-fidelity has not, by its distance of its network's features."""
    features = [their_outputs(extractor, np.repeat(it, 3, axis=-1))[1] for it in sets]
    statistics = [metric_fid.fid_features_to_statistics(torch.from_numpy(it)) for it in features]
    found = metric_fid.fid_statistics_to_metric(*statistics, verbose=False)
    return found[metric_fid.KEY_METRIC_FID]


@pytest.mark.long
def test_a_checkpoint_scores_as_its_pngs_do(published, workdir, tmp_path):  # noqa: F811
    spread_classes(published)
    torch.save(published.state_dict(), tmp_path / "pt_inception.pth")
    weights = convert(tmp_path / "pt_inception.pth", tmp_path / "i.safetensors", "--from=inception")
    (tmp_path / "real").mkdir()
    real = all_images(MnistSource("held_out"))[0][:NUM_REAL]
    for index, image in enumerate(real):
        write_png(tmp_path / "real" / f"{index:03}.png", image)
    asked = [f"--checkpoint={workdir}", f"--num_samples={NUM_SAMPLES}", "--seed=3"]
    runs.run_in_process(
        evaluate,
        [
            *asked,
            f"--reference={tmp_path / 'real'}",
            f"--inception_weights={weights}",
            "--inception_images_per_device=2",
            "--pr_arithmetic=float32",
            f"--out={tmp_path / 'scores'}",
        ],
    )
    (row,) = json.loads((tmp_path / "scores" / "scores.json").read_text())["scores"]
    runs.run_in_process(sample, [*asked, f"--out={tmp_path / 'pngs'}", "--num_ar_steps=1"])

    theirs = torch_fidelity.calculate_metrics(
        input1=their_dataset(tmp_path / "pngs"),
        input2=their_dataset(tmp_path / "real"),
        feature_extractor="inception-v3-compat",
        feature_layer_prc="2048",
        feature_extractor_weights_path=str(tmp_path / "pt_inception.pth"),
        fid=True,
        isc=True,
        prc=True,
        isc_splits=1,
        samples_shuffle=False,
        batch_size=10,
        cuda=False,
        cache=False,
        verbose=False,
        save_cpu_ram=True,
    )
    name = f"FID-{NUM_SAMPLES} (unknown inception)"
    assert row[name] == pytest.approx(theirs["frechet_inception_distance"], rel=RTOL)
    assert row["IS (unknown inception)"] == pytest.approx(theirs["inception_score_mean"], rel=RTOL)
    assert row["precision (unknown inception)"] == pytest.approx(theirs["precision"], abs=1e-6)
    assert row["recall (unknown inception)"] == pytest.approx(theirs["recall"], abs=1e-6)
    images, _ = read_images(tmp_path / "pngs")
    sfid = their_spatial_distance(published, images, real)
    assert row[f"sFID-{NUM_SAMPLES} (unknown inception)"] == pytest.approx(sfid, rel=RTOL)
    assert (
        row[name] > 1
        and row["IS (unknown inception)"] > 1.05
        and 0 < row["precision (unknown inception)"] < 1
    )  # they say something
