"""The program of generation: its size, memory and loops; plans that lead to the same images."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from cfjax import build, sampling
from cfjax.models.kv_cache import after
from cfjax.rng import per_example_keys

L = 16


@pytest.fixture(scope="module")
def network():
    model = build.sampling_model(tiny.config())
    return model, jax.tree.map(jnp.asarray, tiny.random_params(model))


def settings_of(split_sizes=(), num_known=0, **sampling_fields):
    fields = {f"sampling__{name}": value for name, value in sampling_fields.items()}
    return build.sampling_settings(tiny.config(**fields), split_sizes, num_known)


def arguments(batch=2):
    return jnp.arange(batch), per_example_keys(jax.random.key(0), jnp.arange(batch))


def lowered(model, settings, batch):
    params = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, tiny.random_params(model)))
    return sampling.generate.lower(
        model, params, settings, *jax.eval_shape(lambda: arguments(batch))
    )


@pytest.mark.parametrize(
    ("options", "num_denoising_steps"),
    [
        # One loop in which each size is compiled once.
        pytest.param({"split_sizes": (1, 5, 1, 5, 4)}, [4] * 5, marks=pytest.mark.long),
        # Traced numbers of denoising steps.
        pytest.param(
            {"num_ar_steps": 4, "denoising_steps": "6:3"}, [6, 5, 4, 3], marks=pytest.mark.long
        ),
        ({"num_ar_steps": 3, "denoising_steps": "2/5/2"}, [2, 5, 2]),
        pytest.param(
            {
                "split_sizes": (2, 6, 2, 6),
                "denoising_steps": "4/3/2/4",
                "guidance_interval": (200, 900),
                "solver": "dpmpp_2m_sde",
            },
            [4, 3, 2, 4],
            marks=pytest.mark.long,
        ),
    ],
)
def test_every_way_to_loop_makes_the_same_image(network, options, num_denoising_steps):
    """Recording unrolls what is otherwise looped over with traced sizes and numbers.

    Tolerance: float32 sums in another order.
    """
    settings = settings_of(**options)
    assert [it.num_timesteps for it in settings.schedules] == num_denoising_steps
    looped = sampling.generate(*network, settings, *arguments())
    unrolled, trajectory = sampling.generate(
        *network, settings, *arguments(), return_trajectory=True
    )
    np.testing.assert_allclose(looped, unrolled, atol=1e-5)
    assert [len(x) for x in trajectory.x_t] == num_denoising_steps
    assert [x.shape[2] for x in trajectory.x_t] == list(settings.split_sizes)


# Of solvers without noise, which is drawn by the AR step's number.
@pytest.mark.parametrize(
    ("solver", "first", "second"),
    [("ddim", 5, 3), pytest.param("dpmpp_2m", 4, 4, marks=pytest.mark.long)],
)
def test_an_ar_step_of_a_plan_is_a_plan_of_its_own(network, solver, first, second):
    """The second AR step, given the first as known tokens, is generated as in the whole plan."""
    whole = settings_of((6, 10), solver=solver, denoising_steps=f"{first}/{second}")
    tokens, trajectory = sampling.generate(*network, whole, *arguments(), return_trajectory=True)
    is_known = np.zeros((2, L), bool)
    np.put_along_axis(is_known, np.asarray(trajectory.token_order[:, :6]), True, axis=1)
    rest = settings_of((10,), num_known=6, solver=solver, denoising_steps=str(second))
    again = sampling.generate(
        *network, rest, *arguments(), known=sampling.Known(tokens, jnp.asarray(is_known))
    )
    np.testing.assert_allclose(again, tokens, atol=1e-5)


def test_the_program_does_not_grow_with_ar_steps_of_one_size():
    """Compile time follows the number of operations; sizes of 1 and 4 tokens, S = 16 and S = 4."""
    model = build.sampling_model(tiny.config())
    texts = [
        lowered(model, settings_of(num_ar_steps=num_ar_steps), 2).as_text()
        for num_ar_steps in (4, 16)
    ]
    few, many = (text.count("\n") for text in texts)
    assert many <= 1.02 * few


@pytest.mark.parametrize("split_sizes", [(2, 5, 2, 5, 2), (7, 1, 1, 1, 1, 5), (3, 1, 3, 1, 8)])
def test_each_size_is_traced_once(network, split_sizes, monkeypatch):
    traces, denoise = [], sampling.denoise_tokens
    monkeypatch.setattr(
        sampling, "denoise_tokens", lambda *args: traces.append(1) or denoise(*args)
    )
    settings = settings_of(split_sizes)
    jax.eval_shape(lambda: sampling.generate(*network, settings, *arguments(3)))
    assert len(traces) == len(set(split_sizes))


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"num_ar_steps": 8, "guidance_interval": (200, 800)},
        {"split_sizes": (2, 3, 2, 3, 6)},
        pytest.param({"num_ar_steps": 8}, marks=pytest.mark.long),
        pytest.param({"num_ar_steps": 8, "denoising_steps": "5:2"}, marks=pytest.mark.long),
        pytest.param({"num_ar_steps": 4, "split": "cosine"}, marks=pytest.mark.long),
    ],
    ids=str,
)
def test_the_kv_cache_is_written_in_place(options):
    """On a CPU; all that the program holds besides its arguments is at most 1.5 caches."""
    config = tiny.config(model__width=64, model__depth=8)
    model, batch = build.sampling_model(config), 256
    settings = settings_of(**options)
    memory = lowered(model, settings, batch).compile().memory_analysis()
    capacity = model.condition_length + sampling.num_pushed_tokens(model, settings)
    kv_cache = jax.eval_shape(lambda: model.empty_cache(2 * batch, capacity))
    num_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in kv_cache[:2])
    assert memory.temp_size_in_bytes <= 1.5 * num_bytes


def test_what_comes_after_is_the_same():
    earlier, x = jnp.ones((2, 3, 4)), jnp.arange(6.0).reshape(2, 3)
    np.testing.assert_array_equal(after(earlier, (x, x.astype(jnp.bfloat16)))[0], x)
    np.testing.assert_array_equal(
        jnp.isnan(after(earlier.at[1, 0, 0].set(jnp.nan), (x,))[0]).any(1), [False, True]
    )


def test_weights_in_bfloat16(network):
    """By choice; an image like that of float32, but for its rounding."""
    config = tiny.config(sampling__dtype="bfloat16")
    model = build.sampling_model(config)
    assert model.dtype == jnp.bfloat16 and build.model(config).dtype == jnp.float32
    _, params = network
    settings = settings_of(num_ar_steps=2)
    rounded = sampling.generate(model, params, settings, *arguments())
    exact = sampling.generate(*network, settings, *arguments())
    difference = np.abs(rounded - exact)
    assert 0 < difference.mean() < 0.1
