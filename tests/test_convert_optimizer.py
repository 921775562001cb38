"""The optimizer's state of published checkpoints, to ours and back; run by `launch/test.sh --all`."""

import argparse
import functools
import json

import golden_data
import jax
import numpy as np
import pytest
import tiny
from converting import convert
from golden_data import published_params
from test_convert import full_size
from test_convert_torch import CONFIG, SIZES_OF_A, assert_same, save, tensors
from test_golden_optimizer import (
    assert_published_ends,
    gradients_of,
    iterate,
    published_ends,
    settings_of,
)

from cfjax import build, checkpoint_weights, checkpoints, sharding, train_state
from cfjax.config_loading import config_from_json
from cfjax.convert import causal_fusion, optimizer_state, torch_files
from cfjax.convert.causal_fusion import params_from_published, params_to_published
from cfjax.errors import UserError
from cfjax.optimizer import OptimizerSettings, make_optimizer
from cfjax.train import train

torch = pytest.importorskip("torch")

pytestmark = [
    pytest.mark.oracle,
    # ml_collections loads config files that way.
    pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning"),
]
WARMUP, NUM_UPDATES = 2, 3


def rate(warmup, update):
    return min(1.0, update / warmup)


class Training:
    """The published program's optimizer, schedule and checkpoints, over weights without a model."""

    def __init__(self, weights, is_frozen):
        self.parameters = {
            name: torch.nn.Parameter(tensor.clone(), name != "pos_embed" or not is_frozen)
            for name, tensor in weights.items()
        }
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=1e-3, betas=(0.9, 0.95), eps=1e-15, weight_decay=0
        )
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, functools.partial(rate, WARMUP)
        )
        self.ema = {name: p.detach().clone() for name, p in self.parameters.items()}

    def load(self, document):
        with torch.no_grad():
            for name, p in self.parameters.items():
                p.copy_(document["model"][name])
        self.optimizer.load_state_dict(document["opt"])
        self.scheduler.load_state_dict(document["scheduler"])

    def update(self, gradients, ema_decay=0.9):
        for name, p in self.parameters.items():
            p.grad = torch.from_numpy(np.array(gradients[name])) if p.requires_grad else None
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
        self.optimizer.step()
        self.scheduler.step()
        for name, p in self.parameters.items():
            self.ema[name].mul_(ema_decay).add_(p.detach(), alpha=1 - ema_decay)

    def document(self):
        return {
            "model": {name: p.detach().clone() for name, p in self.parameters.items()},
            "ema": dict(self.ema),
            "opt": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "train_steps": self.scheduler.last_epoch,
            "start_epoch": 1,
            "args": argparse.Namespace(warmup_steps=WARMUP, global_batch_size=32, lr=1e-3),
        }


def gradients(letter, seed):
    rng = np.random.default_rng(seed)
    return {
        name: rng.normal(size=array.shape).astype(np.float32)
        for name, array in published_params(letter).items()
    }


def trained(letter):
    training = Training(tensors(published_params(letter)), is_frozen=letter == "B")
    for seed in range(NUM_UPDATES):
        training.update(gradients(letter, seed))
    return training


def restored(workdir):
    config = config_from_json(checkpoints.read_config(workdir))
    optimizer = make_optimizer(build.optimizer_settings(config))
    init = build.init_state(build.model(config), optimizer)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    target = sharding.abstract_sharded(init, mesh, jax.random.key(0))
    return *checkpoints.restore_state(workdir, target), config, optimizer


def remarks(path):
    return json.loads(path.read_text())["remarks"]


@pytest.mark.parametrize("letter", golden_data.MODELS)
def test_to_ours_and_back_bit_for_bit(tmp_path, letter):
    document = trained(letter).document()
    ours = convert(save(tmp_path / "x.pt", document), tmp_path / "run", "--from=published")
    state, examples_seen, config, _ = restored(ours)
    assert (int(state.train_step), examples_seen) == (NUM_UPDATES, 32 * NUM_UPDATES)
    assert checkpoints.train_steps(ours) == [NUM_UPDATES]
    adam, counter = state.opt_state[1][0], state.opt_state[1][2]
    assert int(adam.count) == int(counter.count) == NUM_UPDATES
    entries = document["opt"]["state"]
    for moment, tree in (("exp_avg", adam.mu), ("exp_avg_sq", adam.nu)):
        named = dict(params_to_published(tree, build.model(config).grid))
        if letter == "B":
            del named["pos_embed"]
        indices = [i for i, name in enumerate(document["model"]) if name in named]
        assert set(indices) == set(entries) and len(named) == len(entries)
        for index, name in zip(indices, [n for n in document["model"] if n in named], strict=True):
            np.testing.assert_array_equal(named[name], entries[index][moment].numpy(), name)
    optimizer = config.optimizer
    assert (optimizer.learning_rate, optimizer.warmup_steps) == (1e-3, WARMUP)
    assert (optimizer.b1, optimizer.b2, optimizer.eps) == (0.9, 0.95, 1e-15)
    assert config.model.position_embedding == ("sincos" if letter == "B" else "learned")
    assert f"state of train step {NUM_UPDATES} comes along" in remarks(ours / "conversion.json")[-1]

    back = torch.load(convert(ours, tmp_path / "back.pt", "--to=published"), weights_only=True)
    assert list(back["model"]) == list(document["model"])
    assert set(back["opt"]["state"]) == set(entries)
    for index, entry in entries.items():
        assert set(back["opt"]["state"][index]) == set(entry)
        for name, value in entry.items():
            other_value = back["opt"]["state"][index][name]
            assert other_value.dtype == value.dtype and torch.equal(other_value, value), name
    assert back["opt"]["param_groups"] == document["opt"]["param_groups"]
    assert back["scheduler"] == document["scheduler"]
    assert back["train_steps"] == document["train_steps"]
    assert any("start_epoch is 0" in it for it in remarks(tmp_path / "back.pt.conversion.json"))


@pytest.mark.long
@pytest.mark.parametrize("letter", golden_data.MODELS)
def test_the_next_update_is_the_same_here_and_there(tmp_path, letter):
    first = trained(letter)
    source = save(tmp_path / "x.pt", first.document())
    ours = convert(source, tmp_path / "run", "--from=published")
    back = torch.load(convert(ours, tmp_path / "back.pt", "--to=published"), weights_only=True)
    theirs = Training(back["model"], is_frozen=letter == "B")
    theirs.load(back)
    assert [group["lr"] for group in theirs.optimizer.param_groups] == [1e-3]

    state, _, config, optimizer = restored(ours)
    module, new = build.model(config), gradients(letter, 9)
    shapes = golden_data.param_shapes(module)
    frozen = causal_fusion.frozen_positions((1, module.num_tokens, module.width), module.grid)
    grads = params_from_published(
        new | ({"pos_embed": frozen} if letter == "B" else {}), shapes, module.grid
    )
    for training in (first, theirs):
        training.update(new)
    state = train_state.apply_gradients(
        state, jax.tree.map(jax.numpy.asarray, grads), optimizer, 0.9
    )
    after = params_to_published(state.params, module.grid)
    mu, nu = (
        params_to_published(t, module.grid)
        for t in (state.opt_state[1][0].mu, state.opt_state[1][0].nu)
    )
    for name, p in theirs.parameters.items():
        # Loaded from ours, theirs goes on as if it had never stopped.
        assert torch.equal(p, first.parameters[name]), name
        if not p.requires_grad:
            continue
        moved = np.abs(p.detach().numpy() - back["model"][name].numpy()).max()
        assert 1e-4 < moved < 3e-3
        # The update is about 1e-3 with relative rounding of 1e-6, which is 1e-9; what remains is the
        # rounding of the sum, one unit in the last place of the weight.
        np.testing.assert_allclose(
            after[name], p.detach().numpy(), rtol=1.2e-7, atol=2e-9, err_msg=name
        )
        entry = theirs.optimizer.state[p]
        # Two products and a sum in float32, after clipping by norms that were summed in another
        # order; the moments' larger part is what is compared.
        for moment, there in ((mu, entry["exp_avg"]), (nu, entry["exp_avg_sq"])):
            golden_data.assert_close_to_max(moment[name], there.numpy(), 2e-6)


@pytest.mark.parametrize("letter", ["A", pytest.param("B", marks=pytest.mark.long)])
def test_two_iterations_of_torch_and_two_of_ours_are_the_four_published(tmp_path, letter):
    settings, ema_decay = settings_of(golden_data.load(f"model{letter}_optim"))
    assert (settings.learning_rate, settings.warmup_steps) == (1e-3, WARMUP)
    module = golden_data.model(letter)
    shapes = golden_data.param_shapes(module)
    training = Training(tensors(published_params(letter)), is_frozen=letter == "B")
    for i in range(2):
        weights = {name: p.detach().numpy() for name, p in training.parameters.items()}
        _, grads = gradients_of(letter)(params_from_published(weights, shapes, module.grid), i)
        training.update(params_to_published(grads, module.grid), ema_decay)
    source = save(tmp_path / "x.pt", training.document())
    state, *_ = restored(convert(source, tmp_path / "run", "--from=published"))
    final, _, _ = iterate(letter, state, range(2, 4))
    assert_published_ends(letter, *published_ends(letter, final))


@pytest.mark.long
def test_training_goes_on_with_the_same_bits_after_a_visit_to_torch(tmp_path):
    whole = tiny.trained(tmp_path / "whole")
    there = convert(tmp_path / "whole", tmp_path / "x.pt", "--to=published", "--train_step=3")
    ours = convert(there, tmp_path / "run", "--from=published", *tiny.flags())
    assert checkpoints.train_steps(ours) == [3]
    jax.tree.map(np.testing.assert_array_equal, train(tiny.config(), ours), whole)


def test_a_table_that_a_filter_left_out_is_frozen_too(tmp_path):
    document = trained("B").document()
    group, names = document["opt"]["param_groups"][0], list(document["model"])
    assert names[0] == "pos_embed"
    document["opt"]["state"] = {i - 1: entry for i, entry in document["opt"]["state"].items()}
    group["params"] = list(range(len(names) - 1))
    state, *_ = restored(
        convert(save(tmp_path / "x.pt", document), tmp_path / "run", "--from=published")
    )
    expected, *_ = restored(
        convert(
            save(tmp_path / "y.pt", trained("B").document()), tmp_path / "other", "--from=published"
        )
    )
    jax.tree.map(np.testing.assert_array_equal, state, expected)


def change_entry(index, **values):
    return lambda opt: opt["state"][index].update(values)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda opt: opt.clear(), "is no state dict of an optimizer"),
        (lambda opt: opt["param_groups"].append(opt["param_groups"][0]), "has 2 groups"),
        (lambda opt: opt["param_groups"][0].pop("betas"), "has no betas"),
        (lambda opt: opt["param_groups"][0]["params"].pop(), r"has a state of parameter 57"),
        (
            lambda opt: opt["param_groups"][0]["params"].append(58),
            "is of 59 parameters but there are 58",
        ),
        (lambda opt: opt["state"].pop(2), r"has no state of x_proj\.weight"),
        (lambda opt: opt["state"].clear(), r"has no state of cond_pos_embed"),
        (
            change_entry(3, max_exp_avg_sq=torch.zeros(1)),
            "has exp_avg, exp_avg_sq, max_exp_avg_sq, step of x_proj.bias",
        ),
        (change_entry(3, step=torch.tensor(9.0)), "counts 3, 9 updates"),
        (change_entry(3, step="x"), r"has a step of x_proj\.bias that is no number"),
        (change_entry(3, step=torch.tensor(float("nan"))), ".* updates, not one number"),
        (
            change_entry(3, exp_avg=torch.zeros(65)),
            r"has exp_avg of x_proj\.bias as \(65,\) but the weight is \(64,\)",
        ),
        (change_entry(3, exp_avg=0.5), r"has moments of x_proj\.bias that are no tensors"),
    ],
)
def test_what_does_not_fit_is_refused_or_left_out(tmp_path, spoil, message):
    document = trained("A").document()
    spoil(document["opt"])
    source = save(tmp_path / "x.pt", document)
    with pytest.raises(UserError, match=rf"opt of the published file {message}.*--weights_only"):
        convert(source, tmp_path / "run", "--from=published")
    assert not (tmp_path / "run").exists()
    ours = convert(source, tmp_path / "run", "--from=published", "--weights_only")
    assert not checkpoint_weights.has_optimizer_state(ours)
    assert checkpoints.train_steps(ours) == [0]


def test_kinds_of_tables_must_agree(tmp_path):
    frozen = save(tmp_path / "x.pt", trained("B").document())
    sizes = ["width=48", "depth=2", "num_heads=3", "num_condition_tokens=2"]
    flags = [f"--config={CONFIG}", *(f"--config.model.{size}" for size in sizes)]
    flags += ["--config.data.size=8", "--config.data.num_classes=5"]
    with pytest.raises(
        UserError, match=r"no state of pos_embed but .*position_embedding is learned"
    ):
        convert(
            frozen,
            tmp_path / "run",
            "--from=published",
            *flags,
            "--config.model.position_embedding=learned",
        )
    ours = convert(frozen, tmp_path / "run", "--from=published", *flags)
    assert (
        "The file was trained with optimizer.learning_rate=0.001, the config has 0.0008."
        in remarks(ours / "conversion.json")
    )


def test_the_state_of_another_grid_is_left_out(tmp_path):
    source = save(tmp_path / "x.pt", trained("A").document())
    larger = [f"--config={CONFIG}", "--config.data.size=16", *SIZES_OF_A]
    ours = convert(source, tmp_path / "run", "--from=published", *larger)
    assert not checkpoint_weights.has_optimizer_state(ours)
    assert remarks(ours / "conversion.json")[-1] == (
        "Left out: opt, as it belongs to the position table of the other grid."
    )


def test_weights_only_leaves_the_state_out_on_the_way_back(tmp_path):
    document = trained("A").document()
    ours = convert(save(tmp_path / "x.pt", document), tmp_path / "run", "--from=published")
    path = convert(ours, tmp_path / "back.pt", "--to=published", "--weights_only")
    back = torch.load(path, weights_only=True)
    assert list(back) == ["model", "ema"]
    assert_same(back["ema"], {name: tensor.numpy() for name, tensor in document["ema"].items()})


def test_a_schedule_that_torch_lacks_is_said():
    said = optimizer_state.remarks(OptimizerSettings(schedule="cosine"))
    assert any("no cosine schedule" in sentence for sentence in said)


def test_files_of_full_size_hold_the_state_of_every_parameter(tmp_path, monkeypatch):
    """The very file but for the values, which are neither made, written nor read."""
    shapes = causal_fusion.published_shapes(golden_data.param_shapes(full_size("xl")), (16, 16))
    monkeypatch.setattr(
        torch_files, "_write_aligned", lambda archive, n, _: archive.writestr(n, "")
    )
    document = optimizer_state.to_published(shapes, True, OptimizerSettings(), 50_000)
    zero = np.float32(0)
    arrays = [
        ((moment, name), np.broadcast_to(zero, shape))
        for name, shape in shapes.items()
        for moment in optimizer_state.MOMENTS
    ]
    counts = optimizer_state.counts(document["opt"], 50_000)
    torch_files.write(tmp_path / "x.pt", document, [*arrays, *counts])
    with torch._subclasses.FakeTensorMode():
        opt = torch.load(tmp_path / "x.pt", weights_only=True)["opt"]
    expected = dict(golden_data.published_shapes()["CausalFusion-XL"])
    expected.pop("__total__")
    assert opt["param_groups"][0]["params"] == list(range(len(expected)))
    for index, shape in enumerate(expected.values()):
        entry = {name: list(tensor.shape) for name, tensor in opt["state"][index].items()}
        assert entry == {"step": [], "exp_avg": shape, "exp_avg_sq": shape}
