"""Every config builds and takes a train step when shrunk; every field is read somewhere."""

import autoencoders
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import tiny_features
from ml_collections import ConfigDict

from cfjax import build, build_documents, evaluation_inputs, train_autoencoder
from cfjax.autoencoder_train_step import compile_train_step
from cfjax.config_loading import load_config
from cfjax.data import progressions, scenes, transforms
from cfjax.data.image_files import write_npz
from cfjax.documents import ImageSegment, TextSegment, items_of, lay_out
from cfjax.errors import UserError
from cfjax.models.causal_fusion import SIZES, CausalFusion
from cfjax.sharding import abstract_sharded, batch_sharding, born_sharded, make_mesh
from cfjax.train import train

VARIANTS = [
    "mnist.py",
    "mnist_latent.py",
    "image_folder.py",
    "imagenet256.py",
    "imagenet256.py:l",
    "imagenet256.py:xl",
    "imagenet256.py:h",
    "imagenet256.py:h48",
    "imagenet256.py:ablation",
    "imagenet256.py:in_context_dit",
    "imagenet512.py",
]
# Of documents.
DOCUMENTS = [
    "mnist_scenes.py",
    "mnist_scenes.py:text_to_image",
    "mnist_scenes.py:image_to_text",
    "mnist_scenes.py:transfusion",
    "mnist_progressions.py",
    "mnist_transforms.py",
    "in1kcap256.py:l",
    "in1kcap256.py:transfusion",
]
# Of `cfjax.train_autoencoder`; they start from `default_autoencoder.py`.
AUTOENCODERS = ["mnist_autoencoder.py"]


def load(name):
    return load_config(str(tiny.CONFIGS / name))


def _many(names, quick):
    """Parameters of a test; all but a few are `long`."""
    return [name if name in quick else pytest.param(name, marks=pytest.mark.long) for name in names]


def test_all_configs_are_tested():
    files = {path.name for path in tiny.CONFIGS.glob("*.py")}
    tested = {name.split(":")[0] for name in VARIANTS + DOCUMENTS + AUTOENCODERS}
    assert files == tested | {"default.py", "default_autoencoder.py"}


@pytest.mark.parametrize("name", _many(VARIANTS, ["mnist_latent.py", "imagenet256.py"]))
def test_a_config_takes_a_train_step_when_shrunk(name):
    config = load(name)
    config.data.num_classes = 3
    config.autoencoder.scale = 1.0  # without it, it is asked of the autoencoder
    assert_takes_a_train_step(config)


@pytest.mark.parametrize("name", _many(DOCUMENTS, ["mnist_scenes.py"]))
def test_a_config_of_documents_takes_a_train_step_when_shrunk(name):
    config = load(name)
    if config.data.name == "captioned_array_record":
        config.autoencoder.path = "kl16"
    config.text.update({"max_length": 3, "tokens_per_row": 7, "images_per_row": 2})
    room = build_documents.slots(config)
    document = (ImageSegment(np.zeros((1, 1, 1), np.uint8)), TextSegment("a"))
    vocabulary = build_documents.vocabulary(config)
    encode = build_documents.tokenizer(config).encode
    items = items_of(document, vocabulary, encode, config.text.max_length)
    row = lay_out([items], room, (1, 1, 1))
    del row["image"]
    assert_takes_a_train_step(config, {key: np.stack([it, it]) for key, it in row.items()})


def assert_takes_a_train_step(config, rows=None):
    """On a batch of two, whose images are those of `rows`, which may be documents."""
    build.sampling_settings(config)
    config.model.update({"width": 16, "depth": 1, "num_heads": 2, "num_condition_tokens": 2})
    config.data.size = 2 * config.model.patch_size
    config.optimizer.warmup_steps = 0
    config.train.update({"global_batch_size": 2, "clean_length_buckets": 1})
    mesh = make_mesh(devices=jax.devices()[:1])
    train_program = build.train_program(config, mesh)
    settings = train_program.settings
    init = build.init_state(settings.model, settings.optimizer)
    state = born_sharded(init, mesh, jax.random.key(0))
    before = np.asarray(state.params["final_projection"]["bias"])
    batch = {
        name: jnp.linspace(-1, 1, leaf.size).reshape(leaf.shape).astype(leaf.dtype)
        for name, leaf in train_program.abstract_batch.items()
    }
    batch = jax.device_put(batch | (rows or {}), batch_sharding(mesh))
    (num_clean,) = train_program.clean_lengths
    after, totals = train_program.compile(num_clean)(state, batch)
    assert np.isfinite(totals["loss"][0])
    assert np.abs(after.params["final_projection"]["bias"] - before).max() > 0
    if rows:
        assert np.isfinite(totals["loss/text"][0]) and totals["loss/text"][0] > 0


@pytest.mark.long
@pytest.mark.parametrize(
    "name", [*AUTOENCODERS, pytest.param("default_autoencoder.py", marks=pytest.mark.long)]
)
def test_an_autoencoder_config_takes_a_train_step_when_shrunk(name):
    config = load(name)
    config.autoencoder.update({"channels": 4, "num_groups": 2, "num_res_blocks": 1})
    config.optimizer.warmup_steps = 0
    settings = train_autoencoder.train_step_settings(config)
    size = settings.module.downsampling
    mesh = make_mesh(devices=jax.devices()[:1])
    shape = (2, size, size, config.data.channels)
    abstract_state = abstract_sharded(settings.init, mesh, jax.random.key(0))
    state = born_sharded(settings.init, mesh, jax.random.key(0))
    before = np.asarray(state.params["quant_conv"]["bias"])
    batch = {"image": jnp.linspace(-1, 1, np.prod(shape)).reshape(shape), "label": jnp.arange(2)}
    batch = jax.device_put(batch, batch_sharding(mesh))
    after, totals = compile_train_step(settings, mesh, abstract_state, shape)(state, batch)
    assert np.isfinite(totals["loss"][0])
    assert np.abs(after.params["quant_conv"]["bias"] - before).max() > 0


@pytest.mark.parametrize(
    ("name", "size", "num_tokens", "condition", "num_train_steps"),
    [
        ("imagenet256.py", "xl", 256, 64, 500_000),
        ("imagenet256.py:l", "l", 256, 64, 500_000),
        ("imagenet256.py:h", "h", 256, 64, 500_000),
        ("imagenet256.py:h48", "h48", 256, 64, 500_000),
        ("imagenet256.py:ablation", "l", 256, 4, 150_137),
        ("imagenet512.py", "xl", 256, 64, 500_000),
        ("in1kcap256.py:l", "l", 256, 1, 500_000),
    ],
)
def test_paper_configs(name, size, num_tokens, condition, num_train_steps):
    """Paper tables 9 and 10."""
    config = load(name)
    model = build.model(config)
    assert {field: getattr(model, field) for field in SIZES[size]} == SIZES[size]
    assert model.num_tokens == num_tokens
    assert model.condition_length == condition
    assert config.train.num_train_steps == num_train_steps


def test_unknown_variant_is_refused():
    with pytest.raises(UserError, match="unknown variant 'xxl'; did you mean 'xl'"):
        load("imagenet256.py:xxl")


class Recorder:
    """Stands for a ConfigDict and remembers the dotted keys that are read."""

    def __init__(self, config, read, prefix=""):
        self._config, self._read, self._prefix = config, read, prefix

    def __getattr__(self, name):
        return self[name] if name in self._config else getattr(self._config, name)

    def __getitem__(self, name):
        value = self._config[name]
        if isinstance(value, ConfigDict):
            return Recorder(value, self._read, f"{self._prefix}{name}.")
        self._read.add(self._prefix + name)
        return value

    def __contains__(self, name):
        return name in self._config

    def keys(self):
        return self._config.keys()


def dotted_keys(config, prefix=""):
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            yield from dotted_keys(value, f"{prefix}{name}.")
        else:
            yield prefix + name


@pytest.mark.long
def test_every_field_is_read(tmp_path, monkeypatch):
    """Those of the autoencoder where there is one."""
    extractor = tiny_features.TinyExtractor()
    monkeypatch.setattr(evaluation_inputs, "inception", lambda *_: extractor)
    write_npz(tmp_path / "real.npz", tiny_features.images(4, size=28), np.zeros(4, np.int32))
    overrides = {
        "train__num_train_steps": 2,
        "train__sample_every": 2,
        "sampling__num_ar_steps": 2,
        "evaluation__every": 2,
        "evaluation__num_samples": 2,
        "evaluation__inception_weights": "inception.safetensors",
        "evaluation__reference": str(tmp_path / "real.npz"),
    }
    autoencoders.make(tmp_path / "vae")
    path, read = str(tmp_path / "vae"), set()
    latents = {
        "autoencoder__path": path,
        "data__size": 14,
        "data__channels": 2,
        "sampling__clip_x_start": False,
    }
    for name, change in (("pixels", {}), ("latents", latents)):
        config = tiny.config(**overrides, **change)
        train(Recorder(config, read), tmp_path / name)
    monkeypatch.setitem(scenes.DEFAULT_NUM_SCENES, "train", 100)
    train(Recorder(tiny.document_config(train__num_train_steps=2), read), tmp_path / "documents")
    for name, sequences in (("progressions", progressions), ("transforms", transforms)):
        monkeypatch.setitem(sequences.DEFAULT_NUM_SEQUENCES, "train", 20)
        config = load(f"mnist_{name}.py")
        build_documents.documents(Recorder(config, read), "train")
    assert read == set(dotted_keys(config))


@pytest.mark.parametrize(
    ("name", "source", "names"),
    [
        ("captioned_array_record", "CaptionedRecordSource", ()),
        ("captioned_tfds", "TfdsCaptionsSource", ("a_set",)),
    ],
)
def test_paths_of_captioned_sets_are_read(monkeypatch, name, source, names):
    config = load("in1kcap256.py:l")
    config.data.update({"name": name, "path": "somewhere", "tfds_name": "a_set"})
    monkeypatch.setattr(build_documents, source, lambda *arguments: arguments)
    expected = (*names, "somewhere", "held_out", 256, 3, "refuse")
    assert build_documents.source(config, "held_out", 256, 3) == expected


@pytest.mark.long
@pytest.mark.slow
def test_every_field_of_an_autoencoder_is_read(tmp_path):
    config = tiny.autoencoder_config(train__num_train_steps=2, train__sample_every=2)
    read = set()
    train_autoencoder.train(Recorder(config, read), tmp_path)
    assert read == set(dotted_keys(config))


def test_a_config_older_than_documents_is_of_images():
    config = load("mnist.py").unlock()
    del config.text
    del config.loss.text_dropout
    assert type(build.model(config)) is CausalFusion
    build.sampling_settings(config)
