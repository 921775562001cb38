"""Sampling from a checkpoint: what an image depends on, compilations, the program, pictures."""

import json
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from PIL import Image
from runs import run_in_process

import cfjax
from cfjax import build, checkpoints, draw, sample, sampling, sharding
from cfjax.errors import UserError
from cfjax.rng import per_example_keys, stream_key
from cfjax.sampler import Sampler

L = 16


@pytest.fixture(scope="module")
def sampler(workdir):
    return cfjax.load(workdir)


def test_an_image_depends_on_seed_index_and_class_alone(sampler):
    """Bit for bit."""
    labels = np.arange(20) % 10
    whole = sampler.generate(labels, num_ar_steps=4)
    assert whole.shape == (20, 28, 28, 1)
    assert whole.dtype == np.uint8
    for batch_size in (1, 8, 16):
        again = sampler.generate(labels, num_ar_steps=4, batch_size=batch_size)
        np.testing.assert_array_equal(again, whole)
    tail = sampler.generate(labels[5:], num_ar_steps=4, first_index=5)
    np.testing.assert_array_equal(tail, whole[5:])
    alone = sampler.generate(labels[7:8], num_ar_steps=4, first_index=7)
    np.testing.assert_array_equal(alone, whole[7:8])
    other_seed = sampler.generate(labels, num_ar_steps=4, seed=1)
    other_class = sampler.generate((labels + 1) % 10, num_ar_steps=4)
    for other in (other_seed, other_class):
        assert (other != whole).any(axis=(1, 2, 3)).all()


@pytest.mark.long
def test_split_sizes_and_guidance_change_the_image(sampler):
    images = [
        sampler.generate([3], **options)
        for options in (
            {},
            {"num_ar_steps": 16},
            {"split_sizes": (1, 5, 10)},
            {"guidance_scale": 1.0},
            {"guidance_interval": (0, 500)},
            {"solver": "ddpm"},
            {"token_order": "raster", "num_ar_steps": 16},
        )
    ]
    for i, image in enumerate(images):
        for other in images[:i]:
            assert (image != other).any()
    equal = sampler.generate([3], split_sizes=(4, 4, 4, 4))
    np.testing.assert_array_equal(equal, sampler.generate([3], num_ar_steps=4))


def test_one_compilation_for_given_static_sizes(sampler):
    sampler.generate([1, 2], num_ar_steps=3)
    with pytest.MonkeyPatch.context() as patch:
        traces = []
        denoise = sampling.denoise_tokens
        patch.setattr(sampling, "denoise_tokens", lambda *args: traces.append(1) or denoise(*args))
        sampler.generate([5, 6], num_ar_steps=3, seed=7)  # as before but for traced values
        assert not traces
        sampler.generate([5, 6], split_sizes=(7, 1, 1, 1, 1, 5))
        assert len(traces) == 3  # one each for the runs of sizes 7, 1 and 5


def test_cached_generation_equals_the_training_forward_pass(sampler):
    """The last denoising step of every AR step, replayed in one sequence under the mask.

    Tolerance: rounding of float32 sums in another order, 1e-4 of the largest value.
    """
    config, model = sampler.config, sampler.model
    settings = sampler.settings({"guidance_scale": 1.0}, split_sizes=(3, 5, 7, 1))
    labels = jnp.array([2, 7])
    keys = per_example_keys(stream_key(0, "sample"), jnp.arange(2))
    tokens, trajectory = sampling.generate(
        model, sampler.params, settings, labels, keys, return_trajectory=True
    )
    order = trajectory.token_order
    clean = jnp.take_along_axis(tokens, order[..., None], axis=1)
    before_last = jnp.concatenate([x[-2] for x in trajectory.x_t], axis=1)
    ids = jnp.broadcast_to(jnp.repeat(jnp.arange(4), jnp.array([3, 5, 7, 1])), order.shape)
    t = jnp.full((2, 1, 1), settings.schedules[0].timestep_map[0])
    predicted = model.apply(
        {"params": sampler.params}, labels, clean, before_last[:, None], t, order, ids
    )[:, 0]
    assert config.diffusion.prediction_type == "x_start"
    expected = jnp.concatenate([x[-1] for x in trajectory.x_start], axis=1)
    np.testing.assert_allclose(jnp.clip(predicted, -1, 1), expected, atol=1e-4)
    np.testing.assert_allclose(expected, clean, atol=1e-5)  # DDIM ends at the predicted x_0


@pytest.mark.long
def test_parameters_in_the_compute_dtype_give_the_same_image(workdir):
    """Generation holds the parameters in bfloat16 if it multiplies in bfloat16."""
    config = tiny.config(model__dtype="bfloat16")
    model, mesh = build.sampling_model(config), sharding.make_mesh()
    whole, cast = (
        checkpoints.restore_ema(
            workdir, sharding.abstract_sharded(init(model), mesh, jax.random.key(0))
        )
        for init in (build.init_params, build.init_sampling_params)
    )
    kept = {leaf.dtype.name for leaf in jax.tree.leaves(cast)}
    assert kept == {"bfloat16", "float32"}
    assert cast["blocks"]["mlp"]["fc1"]["kernel"].dtype == jnp.bfloat16
    assert cast["final_norm"]["scale"].dtype == jnp.float32
    images = [
        Sampler(config, model, params, mesh).generate([3, 1], num_ar_steps=4)
        for params in (whole, cast)
    ]
    np.testing.assert_array_equal(*images)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_ar_steps": 17}, "num_ar_steps is 17, but an image of 16 tokens takes 1 to 16"),
        ({"split_sizes": (8, 9)}, "split sizes [8, 9] sum to 17, but must sum to the 16 tokens"),
        ({"split_sizes": (16, 0)}, "split sizes [16, 0] must be"),
        ({"guidance": 2.0}, "unknown sampling option 'guidance'; did you mean 'guidance_"),
        ({"solver": "euler"}, "unknown solver 'euler'"),
        ({"token_order": "spiral"}, "unknown token order 'spiral'"),
        ({"guidance_interval": (5, 5)}, "guidance_interval is (5, 5)"),
        ({"denoising_steps": "2000"}, "asks for 2000 of 1000 timesteps"),
        ({"eta": 2.0}, "eta is 2.0"),
    ],
)
def test_bad_options_are_refused(sampler, options, words):
    with pytest.raises(UserError) as error:
        sampler.generate([1], **options)
    assert words in str(error.value)


@pytest.mark.parametrize("label", [-1, 11])
def test_a_class_out_of_range_is_refused(sampler, label):
    with pytest.raises(UserError, match=f"class {label} is out of range: .* classes 0 to 9"):
        sampler.generate([1, label])


def test_a_config_without_a_field_is_refused(workdir, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(workdir, run)
    (path,) = run.glob("checkpoints/*/config/config.json")
    config = json.loads(path.read_text())
    del config["model"]["attention"]
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"lacks the field .*attention.*config\.json"):
        cfjax.load(run)


def read_picture(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("L"))


@pytest.mark.parametrize("kind", ["samples.png", "samples.npz", "folder"])
def test_the_program_writes_a_grid_an_archive_or_a_folder(workdir, sampler, tmp_path, kind):
    command = [sys.executable, "-m", "cfjax.sample", f"--checkpoint={workdir}", "--num_samples=6"]
    command += [f"--out={tmp_path / kind}", "--classes=3,7", "--num_ar_steps=2", "--seed=5"]
    done = subprocess.run(
        command, cwd=tiny.REPOSITORY, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "6 images are in" in done.stderr
    expected = sampler.generate([3, 7] * 3, num_ar_steps=2, seed=5)
    if kind == "samples.npz":
        with np.load(tmp_path / kind) as arrays:
            np.testing.assert_array_equal(arrays["arr_0"], expected)
            np.testing.assert_array_equal(arrays["labels"], [3, 7] * 3)
    elif kind == "folder":
        names = sorted(p.name for p in (tmp_path / kind).iterdir())
        assert names[:2] == ["000000_class3.png", "000001_class7.png"]
        assert len(names) == 7 and names[-1] == "generation.json"
        first = read_picture(tmp_path / kind / names[0])
        np.testing.assert_array_equal(first, expected[0, ..., 0])
    else:
        assert read_picture(tmp_path / kind).shape == (32, 6 * 32)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--classes=12"], "class 12 is out of range"),
        (["--classes=one"], "--classes=one must be integers"),
        (["--num_ar_steps=50"], "num_ar_steps is 50"),
        (["--split_sizes=4,4"], "split sizes [4, 4] sum to 8"),
        (["--guidance_interval=3"], "--guidance_interval=3 must be 2 integers"),
        (["--train_step=5"], "no checkpoint of train step 5"),
    ],
)
def test_the_program_refuses_before_it_writes(workdir, tmp_path, arguments, words):
    out = tmp_path / "made" / "samples.png"
    arguments = [f"--checkpoint={workdir}", f"--out={out}", *arguments]
    with pytest.raises(UserError) as error:
        run_in_process(sample, arguments)
    assert words in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_draw(workdir, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(workdir, run)
    (run / "metrics.jsonl").write_text(
        "".join(
            json.dumps({"train_step": i, "loss": 1 / i, "loss/ar_step_0": 2, "learning_rate": 0.1})
            + "\n"
            for i in (1, 2, 3)
        )
    )
    run_in_process(
        draw,
        [
            f"--checkpoint={run}",
            f"--out={tmp_path / 'pictures'}",
            "--ar_steps=1,4",
            "--plane_ar_steps=3",
        ],
    )
    names = sorted(path.name for path in (tmp_path / "pictures").iterdir())
    assert names == ["factorization_plane.png", "samples.png", "training_curves.png"]
    for name in names:
        assert read_picture(tmp_path / "pictures" / name).std() > 1


def test_the_plane_shows_clean_noised_and_missing_tokens(sampler):
    frames, timesteps = draw.factorization_plane(sampler, 3, 4, 0, {})
    assert frames.shape == (4, len(timesteps), 28, 28, 3)
    assert timesteps[-1] == 0
    assert timesteps == sorted(timesteps, reverse=True)
    missing = (frames == np.array([90, 120, 170])).all(-1).mean(axis=(2, 3))
    np.testing.assert_allclose(
        missing,
        [
            [0.75] * len(timesteps),
            [0.5] * len(timesteps),
            [0.25] * len(timesteps),
            [0.0] * len(timesteps),
        ],
    )
    final = sampler.generate([3], num_ar_steps=4)[0]
    assert np.abs(frames[-1, -1, ..., :1].astype(int) - final).max() <= 1
