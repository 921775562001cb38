"""Preflight on described TPUs and, where the compiler for those is missing, on virtual CPUs."""

import dataclasses
import functools
import importlib.util
import json
import subprocess
import sys

import jax
import pytest
import tiny

from cfjax import build, compiled_report, preflight, preflight_mends, sampler, sharding
from cfjax.config_loading import load_config
from cfjax.errors import UserError
from cfjax.flops import counted_flops, sampling_flops
from cfjax.preflight_report import sample_report, train_report
from cfjax.preflight_text import report_text
from cfjax.tpu_topology import CHIPS, describe_devices, parse_topology

OUT_OF_MEMORY = (
    "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: XLA:TPU compile permanent error. Ran out of"
    " memory in memory space hbm. Used 30.69G of 15.75G hbm. Exceeded hbm capacity by 14.94G."
)
TEMPORARIES = (
    "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries"
    " (25.47G) exceeds available HBM (15.75G)."
)
ONE_ARRAY = (
    "RESOURCE_EXHAUSTED: Allocation (size=20006400000) would exceed memory (size=17179869184) ::"
    " %s0 = inlined_call_operand.hbm [shape: bf16[50000,200000], index: 0, kind: input]"
)
CONFIG = {
    "model__depth": 3,
    "model__scan_layers": True,
    "model__remat_policy": "none",
    "mesh__fsdp": 2,
}


def train(config, chip=CHIPS["v5e"], all_buckets=False, assumed_mfu=0.5):
    return train_report(
        config,
        build.mesh(config, jax.devices()[:4]),
        chip,
        all_buckets=all_buckets,
        assumed_mfu=assumed_mfu,
        examples_per_epoch=1000,
    )


@pytest.fixture(scope="module")
def trained():
    config = tiny.config(**CONFIG, train__clean_length_buckets=2)
    return config, train(config, all_buckets=True)


def test_chips():
    """The limit is what programs may use of the specified HBM, in GiB (of v5p, 95 GB)."""
    specified = {"v4": 32, "v5e": 16, "v5p": 96, "v6e": 32}
    assert CHIPS.keys() == specified.keys()
    for name, chip in CHIPS.items():
        assert 0.94 * specified[name] < chip.hbm_limit / 2**30 < specified[name]
        assert 150 < chip.peak_flops / chip.hbm_bandwidth < 600  # FLOPs a byte


def test_topologies():
    assert parse_topology("v5e:16x16") == ("v5e", (16, 16))
    assert parse_topology("v4:4x4x8") == ("v4", (4, 4, 8))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("v5e", "'v5e' is not of the form CHIP:SHAPE, like v5e:16x16"),
        ("v5e-256", "is not of the form"),
        ("v5:4x4", "unknown TPU chip 'v5'; did you mean 'v5"),
        ("v5e:4x4x4", "has 3 sizes, but v5e slices have 2"),
        ("v4:8x8", "has 2 sizes, but v4 slices have 3"),
    ],
)
def test_bad_topologies_are_refused(name, words):
    with pytest.raises(UserError, match=words):
        parse_topology(name)


def test_missing_compiler_is_one_sentence(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "libtpu" else find_spec(name)
    )
    with pytest.raises(UserError, match=r"install libtpu by `pip install 'cfjax\[preflight\]'`"):
        describe_devices("v5e:2x2")
    with pytest.raises(UserError, match="there are 0 slices"):
        describe_devices("v5e:2x2", 0)


def test_needed_bytes():
    assert compiled_report.needed_bytes(OUT_OF_MEMORY) == round(30.69 * 2**30)
    assert compiled_report.needed_bytes(TEMPORARIES) == round(25.47 * 2**30)
    assert compiled_report.needed_bytes(ONE_ARRAY) == 20_006_400_000
    assert compiled_report.needed_bytes("INTERNAL: something else") is None


def test_train_report(trained):
    config, report = trained
    state = sharding.abstract_sharded(
        build.init_params(build.model(config)), build.mesh(config), jax.random.key(0)
    )
    assert report["num_parameters"] == sum(leaf.size for leaf in jax.tree.leaves(state))
    assert [it["num_clean"] for it in report["programs"]] == list(
        build.clean_length_buckets(config)
    )
    assert sum(it["share_of_train_steps"] for it in report["programs"]) == pytest.approx(1)
    for program in report["programs"]:
        assert program["fits"]
        flops = program["flops"]
        assert flops["model"] == 3 * build.training_forward_flops(config, program["num_clean"])
        assert flops["ratio"] == flops["counted"] / flops["model"]
        # The network's inputs have no gradient: up to a third of the token embedding is saved.
        assert 0.8 < flops["ratio"] <= 1.0
        assert flops["lower_limit_seconds"] == flops["counted"] / (4 * 197e12)
        memory = program["memory"]
        assert memory["peak"] == memory["state"] + memory["activations"] + memory["code"]
        transferred = memory["lower_limit_seconds"] * CHIPS["v5e"].hbm_bandwidth
        assert (
            1.9 * memory["state"] < transferred < 2 * memory["state"]
        )  # the batch is not returned
        in_loop = [row for row in program["collectives"] if row["in_loop"]]
        assert {row["kind"] for row in in_loop} >= {"all-gather", "all-reduce"}
        for row in in_loop:
            assert row["executed_bytes"] == 3 * row["bytes"] > 0
        assert program["largest_collective"]["bytes"] > 0


def test_state_is_that_of_a_device(trained):
    """Four float32 copies of the parameters, of which fsdp=2 leaves about half."""
    _, report = trained
    state = report["programs"][0]["memory"]["state"]
    whole = 16 * report["num_parameters"]
    assert 0.5 * whole < state < 0.8 * whole


def test_assumed_rates(trained):
    _, report = trained
    assumption = report["assumption"]
    flops = sum(it["share_of_train_steps"] * it["flops"]["model"] for it in report["programs"])
    seconds = flops / (0.5 * 4 * 197e12)
    assert assumption["seconds_per_train_step"] == pytest.approx(seconds)
    assert assumption["images_per_second"] == pytest.approx(16 / seconds)
    assert assumption["epochs_per_day"] == pytest.approx(86_400 * 16 / seconds / 1000)


def test_only_the_longest_program_by_default(trained):
    config, report = trained
    (program,) = train(config)["programs"]
    assert program["flops"] == report["programs"][-1]["flops"]


def test_sample_report():
    config = tiny.config(**CONFIG, sampling__num_ar_steps=2, sampling__guidance_scale=2.0)
    mesh = sharding.make_mesh(devices=jax.devices()[:4])
    report = sample_report(config, mesh, CHIPS["v5e"], batch_size=5, assumed_mfu=0.5)
    assert report["batch_size"] == 8
    (program,) = report["programs"]
    assert program["fits"]
    capacity = config.model.num_condition_tokens + 16  # two AR steps of 8 are one loop
    values = config.model.depth * 4 * capacity * config.model.width  # 8 images on 4 devices, twice
    assert program["memory"]["kv_cache"] == 2 * 4 * values
    assert 1.0 <= program["flops"]["ratio"] < 1.3  # attention runs over the whole cache
    assert report["assumption"]["images_per_second"] > 0
    json.dumps(report)


def test_what_the_compiler_refuses_does_not_fit(monkeypatch, trained):
    config, _ = trained

    def refuse(*_):
        raise jax.errors.JaxRuntimeError(OUT_OF_MEMORY)

    monkeypatch.setattr("cfjax.train_step.TrainProgram.compile", refuse)
    report = train(config)
    (program,) = report["programs"]
    assert not report["fits"] and not program["fits"]
    assert program["memory"]["needed"] > program["memory"]["limit"]
    assert "collectives" not in program and program["flops"]["counted"] > 0


def test_other_errors_of_the_compiler_are_bugs(monkeypatch, trained):
    def fail(*_):
        raise jax.errors.JaxRuntimeError("INTERNAL: a bug")

    monkeypatch.setattr("cfjax.train_step.TrainProgram.compile", fail)
    with pytest.raises(jax.errors.JaxRuntimeError, match="a bug"):
        train(trained[0])


def header(report, mend=None):
    return {
        "topology": "v5e:2x4",
        "num_slices": 1,
        "num_chips": 8,
        "mesh": {"data": 4, "fsdp": 2, "tensor": 1},
        "versions": {"jax": "1", "libtpu": "2"},
        **report,
        "mend": mend,
    }


def test_text(trained):
    text = report_text(header(trained[1]))
    assert "It did not run: nothing here is a measured speed." in text
    assert "(assumed, not measured)" in text
    assert text.count("fits: peak") == 2 and "DOES NOT FIT" not in text
    assert "all-gather f32        in loop" in text


def test_text_of_what_does_not_fit(trained):
    memory = {
        "limit": CHIPS["v5e"].hbm_limit,
        "needed": compiled_report.needed_bytes(OUT_OF_MEMORY),
    }
    program = {"fits": False, "memory": memory, "flops": trained[1]["programs"][0]["flops"]}
    report = {**trained[1], "fits": False, "programs": [program]}
    text = report_text(header(report, ["--config.model.remat_policy=dots"]))
    assert "DOES NOT FIT: needs at least 30.69 of 15.75 GiB a chip" in text
    assert "The nearest change that fits: --config.model.remat_policy=dots" in text
    assert "No change that was tried makes it fit." in report_text(header(report))


def test_candidates_go_from_near_to_far():
    config = tiny.config(**CONFIG | {"train__global_batch_size": 32})
    candidates = list(preflight_mends.train_candidates(config, 8))
    policy, fsdp, parts = "model.remat_policy", "mesh.fsdp", "train.num_microbatches"
    assert candidates == [
        {policy: "dots"},
        {fsdp: 4},
        {fsdp: 8},
        {policy: "full"},
        {parts: 2},
        {parts: 4},
        {policy: "full", fsdp: 8},
        {policy: "full", fsdp: 8, parts: 2},
        {policy: "full", fsdp: 8, parts: 4},
    ]
    config = tiny.config(**CONFIG | {"model__remat_policy": "full", "mesh__fsdp": 8})
    assert list(preflight_mends.train_candidates(config, 8)) == [{parts: 2}]


def test_estimate_falls_with_every_lever():
    config = tiny.config(**CONFIG | {"train__global_batch_size": 32})

    def estimate(**changes):
        changed = preflight_mends.with_changes(
            config, {name.replace("__", "."): value for name, value in changes.items()}
        )
        return preflight_mends.estimated_bytes(changed, build.mesh(changed))

    none, dots, full = (estimate(model__remat_policy=policy) for policy in ("none", "dots", "full"))
    assert full < dots < none
    assert estimate(train__num_microbatches=2) < none
    assert estimate(mesh__fsdp=8) < none


def test_mend_is_the_first_that_fits(monkeypatch):
    config = tiny.config(**CONFIG | {"train__global_batch_size": 64})
    tried = []

    def fits(changed, mesh, chip, **_):
        tried.append((changed.model.remat_policy, mesh.shape["fsdp"]))
        return {"fits": changed.mesh.fsdp == 8}

    monkeypatch.setattr(preflight_mends, "train_report", fits)
    devices, chip = jax.devices(), CHIPS["v5e"]
    assert preflight_mends.train_mend(config, devices, chip, 1) == {"mesh.fsdp": 8}
    assert tried == [("dots", 2), ("none", 4), ("none", 8)]
    assert config.model.remat_policy == "none"


def test_hopeless_mends_are_not_compiled(monkeypatch):
    monkeypatch.delattr(preflight_mends, "train_report")
    config = tiny.config(**CONFIG)
    too_small = dataclasses.replace(CHIPS["v5e"], hbm_limit=1000)
    assert preflight_mends.train_mend(config, jax.devices(), too_small, 1) is None


def test_sample_mend_halves_the_batch(monkeypatch):
    def fits(config, mesh, chip, *, batch_size, assumed_mfu):
        return {"fits": batch_size <= largest}

    monkeypatch.setattr(preflight_mends, "sample_report", fits)
    mend = functools.partial(preflight_mends.sample_mend, tiny.config(), jax.devices(), None)
    largest = 40
    assert mend(256) == 32
    largest = 8
    assert mend(64) == 8
    largest = 0
    assert mend(64) is None


def test_an_internal_error_is_not_a_model_that_does_not_fit(monkeypatch, capsys):
    def fail(_):
        raise RuntimeError("a bug")

    monkeypatch.setattr(preflight, "_report", fail)
    with pytest.raises(SystemExit) as exit_info:
        preflight.main([])
    assert exit_info.value.code == 70
    assert "RuntimeError: a bug" in capsys.readouterr().err


@pytest.mark.parametrize("num_ar_steps", [1, 2, 4, 8])
def test_the_sampler_computes_little_that_it_drops(num_ar_steps):
    """XL with guidance: attention to the unfilled part of the KV cache is at most 4% of all FLOPs."""
    config = load_config(str(tiny.CONFIGS / "imagenet256.py:xl"))
    config.sampling.update({"num_ar_steps": num_ar_steps, "guidance_scale": 1.5})
    batch_size, mesh = 256, sharding.make_mesh(devices=jax.devices()[:4])
    settings = build.sampling_settings(config)
    exact = batch_size * sampling_flops(
        build.sampling_model(config), settings.split_sizes, settings.num_passes, settings.num_rows
    )
    traced = sampler.trace_generation(config, mesh, batch_size)
    assert exact <= counted_flops(traced.jaxpr.jaxpr) <= 1.04 * exact


def run(*arguments, **overrides):
    return subprocess.run(
        [sys.executable, "-m", "cfjax.preflight", *tiny.flags(**overrides), *arguments],
        cwd=tiny.REPOSITORY,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--topology=v5e"], "'v5e' is not of the form CHIP:SHAPE"),
        (["--topology=v5e:2x2", "--what=fly"], "unknown --what 'fly'"),
        ([], "--topology"),
    ],
)
def test_bad_input_is_one_sentence(arguments, words):
    result = run(*arguments)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert words in result.stderr
