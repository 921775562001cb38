"""The whole road on real pictures: crops, shards, autoencoder, latents, training, samples, scores.

Each program runs as people run it, on 8 virtual devices, and again as 2 processes of 4.
"""

import json
import os
import subprocess
import sys

import matplotlib.cbook
import numpy as np
import pytest
import runs
import tiny
from PIL import Image

from cfjax.metric_log import read_metrics

SIZE, CROPS = 32, 100  # pixels, and crops a picture
TIMEOUT = 400
DATA = {"data.num_classes": 3, "data.num_threads": 2}
AUTOENCODER = {
    "data.name": "array_record",
    "data.size": SIZE,
    "data.channels": 3,
    "autoencoder.channels": 8,
    "autoencoder.channel_multipliers": (1, 2),
    "autoencoder.num_res_blocks": 0,
    "train.global_batch_size": 32,
    "train.num_train_steps": 60,
    "train.log_every": 20,
    "optimizer.warmup_steps": 10,
    "optimizer.ema_decay": 0.9,
}
LATENTS = {
    "data.size": SIZE // 2,
    "data.channels": 4,
    "model.patch_size": 4,
    "model.width": 32,
    "model.depth": 2,
    "optimizer.warmup_steps": 5,
    "train.global_batch_size": 32,
    "train.num_train_steps": 50,
    "train.log_every": 10,
    "sampling.denoising_steps": "5",
}


def real_pictures():
    """Three photographs that packages ship."""
    from sklearn.datasets import load_sample_image

    for name in ("china", "flower"):
        yield name, load_sample_image(f"{name}.jpg")
    with matplotlib.cbook.get_sample_data("grace_hopper.jpg") as file:
        yield "hopper", np.asarray(Image.open(file).convert("RGB"))


def cut(folder):
    """A folder a picture, of crops spread evenly over it."""
    for name, pixels in real_pictures():
        (folder / name).mkdir(parents=True)
        rows, columns = ((n - SIZE) // 9 for n in pixels.shape[:2])
        for i in range(CROPS):
            top, left = i // 10 * rows, i % 10 * columns
            crop = pixels[top : top + SIZE, left : left + SIZE]
            Image.fromarray(crop).save(folder / name / f"{i:03d}.png")


def run(module, *flags, config="mnist_latent.py", overrides=(), num_processes=1):
    """Runs a program on 8 devices, which its processes share evenly; what the first says."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={8 // num_processes}",
        "PYTHONPATH": os.pathsep.join([str(tiny.REPOSITORY), *sys.path]),
    }
    command = [sys.executable, "-m", module, *flags]
    if config:
        command += [f"--config={tiny.CONFIGS / config}"]
        command += [f"--config.{key}={value}" for key, value in dict(overrides).items()]
    port, started = runs.free_port(), []
    for number in range(num_processes):
        several = [
            f"--coordinator_address=localhost:{port}",
            f"--num_processes={num_processes}",
            f"--process_id={number}",
        ]
        started.append(
            subprocess.Popen(
                command + (several if num_processes > 1 else []),
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    try:
        said = [process.communicate(timeout=TIMEOUT)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0] * num_processes, said
    return said[0]


def contents(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """With pictures, shards and an autoencoder."""
    place = tmp_path_factory.mktemp("road")
    cut(place / "pictures")
    run(
        "cfjax.prepare_images",
        *(f"--source={place / 'pictures'}", f"--out={place / 'prepared'}", "--processes=2"),
        *("--store=png", f"--size={SIZE}"),
        config=None,
    )
    run(
        "cfjax.train_autoencoder",
        f"--workdir={place / 'vae'}",
        config="mnist_autoencoder.py",
        overrides=DATA | AUTOENCODER | {"data.path": place / "prepared"},
    )
    return place


@pytest.mark.long
def test_from_pictures_to_samples(place):
    vae = place / "vae" / "autoencoder"
    trained = json.loads((vae / "training.json").read_text())
    assert trained["psnr"] > 15  # a flat picture of each crop's mean colour has about 14
    overrides = DATA | LATENTS | {"autoencoder.path": vae}
    images, losses = [], []
    for num_processes in (1, 2):
        out = place / f"{num_processes}"
        said = run(
            "cfjax.encode",
            *(f"--dataset=array_record:{place / 'prepared'}", f"--out={out / 'latents'}"),
            *("--examples_per_shard=50", "--verify=8"),
            overrides=overrides,
            num_processes=num_processes,
        )
        assert "PSNR" in said
        run(
            "cfjax.train",
            f"--workdir={out / 'run'}",
            overrides=overrides | {"data.path": out / "latents", "mesh.fsdp": 4},
            num_processes=num_processes,
        )
        run(
            "cfjax.sample",
            *(f"--checkpoint={out / 'run'}", f"--out={out / 'samples.npz'}", "--num_samples=9"),
            *("--num_ar_steps=4", "--fsdp=4"),
            config=None,
            num_processes=num_processes,
        )
        losses.append([line["loss"] for line in read_metrics(out / "run")])
        images.append(np.load(out / "samples.npz")["arr_0"])
    assert contents(place / "1" / "latents") == contents(place / "2" / "latents")
    manifest = json.loads((place / "1" / "latents" / "train" / "manifest.json").read_text())
    held_out = json.loads((place / "1" / "latents" / "held_out" / "manifest.json").read_text())
    assert manifest["num_records"] + held_out["num_records"] == 3 * CROPS
    assert images[0].shape == (9, SIZE, SIZE, 3)
    assert len(losses[0]) == 5 and losses[0][-1] < losses[0][0]
    # float32 sums in another order, over 50 train steps.
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-3)
    assert np.abs(images[0].astype(int) - images[1]).mean() < 1


@pytest.mark.long
def test_encoding_in_training_from_the_shell(place):
    """The other choice, with the same model and no set of latents; then scores."""
    overrides = DATA | LATENTS | {"autoencoder.path": place / "vae" / "autoencoder"}
    pixels = {"data.name": "array_record", "data.path": place / "prepared"}
    workdir = place / "in_loop"
    run("cfjax.train", f"--workdir={workdir}", overrides=overrides | pixels)
    assert len(read_metrics(workdir)) == 5
    said = run(
        "cfjax.evaluate",
        *(f"--checkpoint={workdir}", f"--out={workdir / 'scores'}", "--num_samples=64"),
        "--ar_steps=1,4",
        config=None,
    )
    assert "FID-64 (array_record-classifier)" in said
