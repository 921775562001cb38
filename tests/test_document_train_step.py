"""Train steps of documents: on eight devices and in microbatches as on one device at once."""

import functools

import autoencoders
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from cfjax import build, build_documents, flops, sharding
from cfjax.data import progressions
from cfjax.data.document_rows import PackedDocuments
from cfjax.data.images import to_model_range
from cfjax.data.scenes import ScenesSource
from cfjax.errors import UserError
from cfjax.metric_log import read_metrics
from cfjax.models.multimodal import DocumentRows
from cfjax.preflight_report import sample_report, train_report
from cfjax.preflight_text import report_text
from cfjax.tpu_topology import CHIPS
from cfjax.train import train

BATCH = 8
# A large ε, as Adam otherwise makes large updates from gradients that are rounding alone.
OVERRIDES = {
    "train__global_batch_size": BATCH,
    "optimizer__warmup_steps": 0,
    "optimizer__eps": 1e-2,
}


@functools.cache
def rows():
    """A batch of scenes, of which some rows have one document and others two."""
    config = tiny.document_config(**OVERRIDES)
    documents = PackedDocuments(
        ScenesSource("train", 32, num_scenes=40),
        build_documents.tokenizer(config),
        build_documents.slots(config),
        max_text_length=config.text.max_length,
    )
    batch = documents.rows_at(range(-BATCH, 0), range(BATCH))
    assert 0 < (batch["image_places"] < 0).sum() < BATCH
    return batch | {"image": to_model_range(batch["image"])}


def run(mesh_sizes, num_train_steps=2, **overrides):
    """State and totals after some train steps."""
    config = tiny.document_config(**OVERRIDES, **overrides)
    mesh = sharding.make_mesh(
        **mesh_sizes, devices=jax.devices()[: np.prod(list(mesh_sizes.values()))]
    )
    program = build.train_program(config, mesh)
    init = build.init_state(program.settings.model, program.settings.optimizer)
    state = sharding.born_sharded(init, mesh, jax.random.key(0))
    # The last projection starts at zero, which would hide the gradients of all before it.
    random = tiny.random_params(program.settings.model)
    random = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), random, state.params)
    state = state.replace(params=random)
    batch = jax.device_put(rows(), sharding.batch_sharding(mesh))
    compiled = program.compile(program.clean_lengths[-1])
    for _ in range(num_train_steps):
        state, totals = compiled(state, batch)
    return jax.device_get((state.params, totals))


@pytest.fixture(scope="module")
def at_once():
    return run({"data": 1})


def assert_same(found, expected):
    """float32 sums over rows in another order."""
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found[0], expected[0]
    )
    assert found[1].keys() == expected[1].keys() >= {"loss", "loss/image", "loss/text"}
    for name, (total, count) in expected[1].items():
        its_total, its_count = found[1][name]
        if count:
            mean = its_total / its_count
            np.testing.assert_allclose(mean, total / count, rtol=1e-4, err_msg=name)


def test_eight_devices_and_microbatches_change_rounding_alone(at_once):
    mesh = {"data": 2, "fsdp": 2, "tensor": 2}
    assert_same(run(mesh, train__num_microbatches=2), at_once)


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "num_microbatches"),
    [({"data": 1}, 2), ({"data": 1}, 4), ({"data": 8}, 1), ({"fsdp": 8}, 1)],
)
def test_meshes_and_microbatches_change_rounding_alone(at_once, mesh, num_microbatches):
    assert_same(run(mesh, train__num_microbatches=num_microbatches), at_once)


@pytest.mark.long
@pytest.mark.slow
def test_images_of_documents_are_encoded_in_training(tmp_path, monkeypatch):
    """Progressions as latents of 14x14: the same by any mesh."""
    monkeypatch.setitem(progressions.DEFAULT_NUM_SEQUENCES, "train", 40)
    autoencoders.make(tmp_path / "vae")
    losses = []
    for mesh in ({"data": 8}, {"data": 2, "fsdp": 2, "tensor": 2}):
        config = tiny.document_config(
            **OVERRIDES,
            train__num_train_steps=2,
            train__log_every=1,
            autoencoder__path=str(tmp_path / "vae"),
            data__name="progressions",
            data__size=14,
            data__channels=2,
            model__patch_size=7,
            text__tokens_per_row=20,
            text__images_per_row=10,
            sampling__clip_x_start=False,
            **{f"mesh__{axis}": size for axis, size in mesh.items()},
        )
        workdir = tmp_path / str(mesh["data"])
        train(config, workdir)
        losses.append([line["loss/image"] for line in read_metrics(workdir)])
    assert len(losses[0]) == 2 and np.isfinite(losses).all()
    # Devices add up in another order, which Adam's updates amplify.
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-3)


@pytest.mark.parametrize("copies", [1, 2])
@pytest.mark.parametrize("sharing", ["example", "ar_step"])
def test_model_flops_are_those_of_the_network(copies, sharing):
    """As they are counted in its forward pass, where no mask leaves anything out."""
    config = tiny.document_config(
        **OVERRIDES,
        model__attention="fused",
        diffusion__timesteps_per_ar_step=copies,
        diffusion__timestep_sharing=sharing,
    )
    assert build.sequence_length(config) == 96 + 2 * (1 + copies) * 4
    model, batch = build.model(config), rows()
    params = tiny.random_params(model)
    clean = jnp.zeros((BATCH, 2, 4, model.token_width))
    noised = jnp.zeros((BATCH, 2, copies, 4, model.token_width))
    t = jnp.zeros((BATCH, 2, copies, 1 if sharing == "example" else 4), jnp.int32)
    positions = jnp.zeros((BATCH, 2, 4), jnp.int32)

    def forward(params):
        of_rows = DocumentRows(**{name: batch[name] for name in DocumentRows._fields})
        return model.apply(
            {"params": params}, of_rows, clean, noised, t, positions, positions, method="documents"
        )

    counted = flops.counted_flops(jax.make_jaxpr(forward)(params).jaxpr)
    assert counted == build.training_forward_flops(config)


def test_preflight_counts_rows_and_their_images():
    config = tiny.document_config(**OVERRIDES, model__attention="fused", model__remat_policy="full")
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    report = train_report(
        config, mesh, CHIPS["v5e"], all_buckets=False, assumed_mfu=0.5, examples_per_epoch=40
    )
    assert report["row"] == {"text_tokens": 96, "images": 2}
    (program,) = report["programs"]
    assert program["num_clean"] == 4
    assert program["share_of_train_steps"] == pytest.approx(1)
    assert program["flops"]["model"] == 3 * build.training_forward_flops(config)
    # Recomputed are the layers, but for what the loss and the last norms need.
    assert 1.0 < program["flops"]["ratio"] < 4 / 3
    seconds = report["assumption"]["seconds_per_train_step"]
    assert report["assumption"]["images_per_second"] == pytest.approx(2 * BATCH / seconds)
    about = {"topology": "v5e:1x1", "num_slices": 1, "num_chips": 1, "versions": {}, "mend": None}
    text = report_text({**about, "mesh": dict(mesh.shape), **report})
    assert f"batch        {BATCH} rows of 96 text tokens and 2 images" in text


def test_preflight_refuses_their_sampler():
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    with pytest.raises(UserError, match=r"text\.tokenizer makes this a model of documents"):
        sample_report(tiny.document_config(), mesh, CHIPS["v5e"], batch_size=4, assumed_mfu=0.5)
