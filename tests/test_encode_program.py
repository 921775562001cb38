"""`python -m cfjax.encode`: killed and run again, in two processes, and what it says."""

import os
import subprocess
import sys
import time

import pytest
import runs
import tiny
import tiny_encoding
from tiny_encoding import contents

from cfjax.encode import encode

PER_CLASS = 60
FLAGS = ["--examples_per_shard=4", "--batch_size=3"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("some") / "pictures"
    tiny_encoding.make_pictures(folder, PER_CLASS)
    return folder


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    folder, _ = tiny_encoding.save_autoencoder(tmp_path_factory.mktemp("vae"))
    return folder


@pytest.fixture(scope="module")
def whole(pictures, vae, tmp_path_factory):
    """What one process with eight devices makes."""
    folder = tmp_path_factory.mktemp("whole")
    encode(
        tiny_encoding.config(),
        f"image_folder:{pictures}",
        str(folder),
        vae=vae,
        examples_per_shard=4,
        images_per_device=3,
    )
    return contents(folder)


def start(*flags, num_devices=1, **config):
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={num_devices}",
        "PYTHONPATH": os.pathsep.join([str(tiny.REPOSITORY), *sys.path]),
    }
    return subprocess.Popen(
        [sys.executable, "-m", "cfjax.encode", *tiny_encoding.flags(**config), *flags],
        env=environment,
        cwd=tiny.REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def ended(programs):
    """The exit codes and what was said."""
    try:
        said = [program.communicate(timeout=120)[0] for program in programs]
    finally:
        for program in programs:
            program.kill()
    return [program.returncode for program in programs], said


def start_two(*flags, **config):
    several = f"--coordinator_address=localhost:{runs.free_port()}", "--num_processes=2"
    return [
        start(*flags, *several, f"--process_id={process}", num_devices=4, **config)
        for process in range(2)
    ]


@pytest.mark.slow
def test_a_killed_program_is_resumed(pictures, vae, whole, tmp_path):
    flags = [f"--dataset=image_folder:{pictures}", f"--vae={vae}", *FLAGS, f"--out={tmp_path}"]
    program = start(*flags)
    while len(list(tmp_path.glob("train/*.array_record"))) < 5:
        assert program.poll() is None, program.communicate()[0]
        time.sleep(0.005)
    program.kill()
    program.communicate()
    assert not (tmp_path / "train" / "manifest.json").exists()
    kept = {
        path: path.stat().st_mtime_ns
        for path in tmp_path.glob("train/moments-*.array_record")
        if path.with_suffix(".json").exists()
    }
    assert 4 <= len(kept) < len([name for name in whole if name.endswith(".array_record")])
    codes, said = ended([start(*flags, "--verify=2")])
    assert codes == [0], said
    assert all(path.stat().st_mtime_ns == before for path, before in kept.items())
    # The kill may have left a hidden file that was not yet renamed.
    made = {name: it for name, it in contents(tmp_path).items() if "/." not in name}
    for split in ("train", "held_out"):
        assert made.pop(f"{split}_reconstructions.png")
        assert f"/{split}: moments of " in said[0] and f"/{split}: checksums verified" in said[0]
    assert made == whole


@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_processes_make_the_bytes_of_one(pictures, vae, whole, tmp_path):
    flags = [f"--dataset=image_folder:{pictures}", f"--vae={vae}", *FLAGS, f"--out={tmp_path}"]
    codes, said = ended(start_two(*flags))
    assert codes == [0, 0], said
    assert "moments of" in said[0] and "moments of" not in said[1]
    assert contents(tmp_path) == whole


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.multiprocess
def test_what_one_of_two_processes_refuses_ends_both(vae, tmp_path):
    """The broken images are in shard 1, which the second process makes."""
    tiny_encoding.make_records(tmp_path / "images")
    dataset = f"--dataset=array_record:{tmp_path / 'images'}"
    out = f"--out={tmp_path / 'out'}"
    flags = [dataset, out, f"--vae={vae}", "--split=train", "--examples_per_shard=6"]
    codes, said = ended(start_two(*flags))
    assert codes == [2, 2], said
    # Gloo may say something later.
    assert "error: process 1 has images that can't be encoded; see what it said.\n" in said[0]
    assert "error: 3 images can't be encoded (the image cut.jpg can't be decoded, " in said[1]
    shards = {path.name[:13] for path in tmp_path.glob("out/train/*.array_record")}
    assert shards == {"moments-00000", "moments-00002", "moments-00003"}
    assert not (tmp_path / "out" / "train" / "manifest.json").exists()
    codes, said = ended(start_two(*flags, on_corrupt="skip"))
    assert codes == [0, 0], said
    assert "moments of 21 images of 3 classes in 4 shards, 3 skipped." in said[0]
