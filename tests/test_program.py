"""Programs: configs with overrides, one sentence for bad input, workdirs, several processes."""

import os
import subprocess
import sys

import jax
import optax
import pytest
import tiny
from ml_collections import ConfigDict

from cfjax import checkpoints, config_loading, program, sharding, train_state
from cfjax.errors import UserError

CONFIG_FILE = """
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder
from cfjax.errors import check_choice

WIDTHS = {"b": 64, "l": 128}

def get_config(size="b"):
    check_choice("variant", size, WIDTHS)
    return ConfigDict({
        "seed": 0,
        "model": {"width": WIDTHS[size], "scan_layers": True, "dtype": "float32"},
        "optimizer": {"learning_rate": 1e-3, "betas": (0.9, 0.95), "name": placeholder(str)},
    })
"""

MAIN = """
import sys
from absl import logging
import logging as python_logging
from cfjax import program, config_loading
from cfjax.errors import UserError

config = config_loading.define_config_flag()
program.define_distributed_flags()

def main(argv):
    python_logging.getLogger("library").info("chatter")
    python_logging.getLogger("asyncio").error("chatter")
    if config.value.seed == 13:
        raise UserError("seed 13 is\\nunlucky; take another.")
    if config.value.seed == 14:
        raise KeyError("a bug")
    program.initialize_distributed()
    sys.stdout.write(config_loading.config_to_json(config.value))

program.run(main)
"""


RESTORE = """
import sys
from cfjax import checkpoints, program

program.run(lambda argv: checkpoints.restore_ema(sys.argv[0] + ".run"))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("configs")
    (folder / "tiny.py").write_text(CONFIG_FILE)
    (folder / "plain.py").write_text("def get_config():\n    pass\n")
    (folder / "needy.py").write_text("def get_config(size):\n    pass\n")
    (folder / "empty.py").write_text("")
    (folder / "main.py").write_text(MAIN)
    return folder


@pytest.fixture(scope="module")
def config_path(folder):
    return str(folder / "tiny.py")


def run_main(folder, *arguments, program="main.py"):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(folder / program), *arguments]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.parametrize(
    "overrides",
    [
        {"model.width": 96, "optimizer.learning_rate": 2, "model.scan_layers": False},
        {"model.width": 96, "optimizer.learning_rate": 2.0, "model.scan_layers": False},
        ["model.width=96", "optimizer.learning_rate=2", "model.scan_layers=false"],
    ],
)
def test_overrides_keep_types(config_path, overrides):
    config = config_loading.load_config(config_path, overrides)
    assert config.model.width == 96 and config.model.scan_layers is False
    assert config.optimizer.learning_rate == 2.0
    assert isinstance(config.optimizer.learning_rate, float)
    with pytest.raises(AttributeError):
        config.new_field = 1


def test_variant_and_tuple(config_path):
    assert config_loading.load_config(config_path).model.width == 64
    overrides = ["optimizer.betas=(0.8, 0.9)", "optimizer.name=a=b"]
    config = config_loading.load_config(config_path + ":l", overrides)
    assert config.model.width == 128
    assert config.optimizer.betas == (0.8, 0.9) and config.optimizer.name == "a=b"


REFUSED = [
    (
        ["optimizer.leraning_rate=1"],
        "'optimizer.leraning_rate'; did you mean 'optimizer.learning_r",
    ),
    (["learning_rate=1"], "'learning_rate'; did you mean 'optimizer.learning_rate'"),
    (["model.width.x=1"], "'model.width.x'; did you mean 'model.width'"),
    (["model.width=wide"], "'model.width' takes a value of type int, like 64; got 'wide'"),
    (["model.width=1.5"], "'model.width' takes a value of type int, like 64; got '1.5'"),
    (["optimizer.learning_rate=fast"], "of type float, like 0.001; got 'fast'"),
    (["model.scan_layers=maybe"], "of type bool, like True; got 'maybe'"),
]


@pytest.mark.parametrize(("overrides", "words"), REFUSED)
def test_bad_override_is_refused(config_path, overrides, words):
    with pytest.raises(UserError) as error:
        config_loading.load_config(config_path, overrides)
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"optimizer.leraning_rate": 1}, "did you mean 'optimizer.learning_rate'"),
        ({"model.width": "wide"}, "'model.width' takes a value of type int, like 64; got 'wide'"),
        ({"model": 3}, "'model' takes a value of type ConfigDict"),
    ],
)
def test_bad_override_value_is_refused(config_path, overrides, words):
    with pytest.raises(UserError, match=words):
        config_loading.load_config(config_path, overrides)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("tinny.py", "there is no config file .*tinny.py'; did you mean .*tiny.py"),
        ("nowhere/x.py", "there is no config file"),
        ("tiny.py:xl", "unknown variant 'xl'"),
        ("plain.py:xl", "plain.py:xl' has no variants"),
        ("needy.py", "needy.py' needs one"),
        ("empty.py", "no function get_config"),
    ],
)
def test_bad_config_file_is_refused(folder, name, words):
    with pytest.raises(UserError, match=words):
        config_loading.load_config(str(folder / name))


def test_config_to_json_and_back():
    values = {
        "int": 3,
        "float": 3.0,
        "small": 1e-8,
        "bool": True,
        "none": None,
        "text": "ä",
        "tuple": (1, 2.0, ("a", None)),
        "empty": (),
    }
    nested = values | {"group": {"inner": values}}
    config = config_loading.config_from_json(config_loading.config_to_json(ConfigDict(nested)))
    assert config.to_dict() == nested
    for group in (config, config.group.inner):
        assert all(type(group[name]) is type(value) for name, value in values.items())
    assert config.is_locked and config.group.inner.is_locked
    with pytest.raises(UserError, match="not JSON"):
        config_loading.config_from_json("{")
    with pytest.raises(UserError, match="must be a JSON object"):
        config_loading.config_from_json("[1]")


def test_a_config_of_an_older_checkpoint_gets_later_fields():
    later = config_loading.load_config(str(tiny.CONFIGS / "mnist_scenes.py"))
    older = later.copy_and_resolve_references()
    with older.unlocked():
        del older.model.position_scale
    config = config_loading.config_from_json(config_loading.config_to_json(older))
    assert config.model.position_scale == 1.0
    config = config_loading.config_from_json(config_loading.config_to_json(later))
    assert config.model.position_scale == later.model.position_scale != 1.0


def test_program_runs_with_flags(folder, config_path):
    result = run_main(
        folder, f"--config={config_path}:l", "--config.seed=5", "--config.optimizer.betas=1,2"
    )
    assert result.returncode == 0, result.stderr
    config = config_loading.config_from_json(result.stdout)
    assert (config.seed, config.model.width, config.optimizer.betas) == (5, 128, (1, 2))
    assert result.stderr == ""


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--config.optimizer.leraning_rate=1"], "did you mean 'optimizer.learning_rate'"),
        (["--noconfig.model.scan_layer"], "did you mean 'model.scan_layers'"),
        (["--config.model.width=wide"], "takes a value of type int, like 64; got 'wide'"),
        (["--confg=3"], "Unknown command line flag 'confg'"),
        (["extra"], "'extra' is not understood"),
        (["--config.seed=13"], "seed 13 is unlucky; take another."),
        (["--num_processes=2", "--process_id=0"], "need --coordinator_address too"),
    ],
)
def test_program_says_one_sentence(folder, config_path, arguments, words):
    result = run_main(folder, f"--config={config_path}", *arguments)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert words in result.stderr


def test_program_needs_its_config(folder):
    result = run_main(folder)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ") and "--config" in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_bug_keeps_its_traceback(folder, config_path):
    result = run_main(folder, f"--config={config_path}", "--config.seed=14")
    assert result.returncode == 1
    assert "Traceback" in result.stderr and "a bug" in result.stderr


def test_corrupt_checkpoint_is_one_sentence_too(folder):
    """Orbax's reads in other threads have much to say."""
    mesh = sharding.make_mesh()
    params = {name: jax.random.normal(jax.random.key(0), (64, 64)) for name in "abcdef"}
    state = sharding.born_sharded(lambda: train_state.create(params, optax.sgd(0.1)), mesh)
    with checkpoints.CheckpointWriter(folder / "restore.py.run", keep_last=1) as writer:
        writer.save(state, "{}", 0)
    for path in folder.glob("restore.py.run/checkpoints/0/ema/ocdbt.process_0/d/*"):
        path.unlink()
    (folder / "restore.py").write_text(RESTORE)
    result = run_main(folder, program="restore.py")
    assert result.returncode == 2
    assert result.stderr.startswith("error: the checkpoint of train step 0 in")
    assert result.stderr.count("\n") == 1


def test_workdir_is_made(tmp_path):
    program.check_workdir_writable(tmp_path / "a" / "b c")
    assert (tmp_path / "a" / "b c").is_dir()
    program.check_workdir_writable(tmp_path / "a" / "b c")


def test_read_only_workdir_is_refused(tmp_path):
    locked = tmp_path / "locked"
    locked.mkdir()
    locked.chmod(0o555)
    try:
        for workdir in (locked, locked / "run"):
            with pytest.raises(UserError, match=r"locked is read-only; allow writing or pass"):
                program.check_workdir_writable(workdir)
        assert list(locked.iterdir()) == []
    finally:
        locked.chmod(0o755)


def test_workdir_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for workdir in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(UserError, match="file is a file; pass another"):
            program.check_workdir_writable(workdir)


@pytest.mark.parametrize(
    ("backend", "before", "after"),
    [("cpu", None, None), ("tpu", None, "compilation_cache"), ("tpu", "elsewhere", "elsewhere")],
)
def test_compiled_programs_are_kept_on_tpus(tmp_path, monkeypatch, backend, before, after):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    chosen = jax.config.jax_compilation_cache_dir
    try:
        jax.config.update("jax_compilation_cache_dir", before)
        program.keep_compiled(tmp_path)
        kept = jax.config.jax_compilation_cache_dir
    finally:
        jax.config.update("jax_compilation_cache_dir", chosen)
    assert kept == (str(tmp_path / after) if after == "compilation_cache" else after)
