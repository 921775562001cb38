"""Sweeps: what `--sweep` understands, its points, and its plot."""

import pytest
import tiny

from cfjax import evaluation_sweep
from cfjax.data.image_files import read_image
from cfjax.errors import UserError
from cfjax.evaluation.report import Report
from cfjax.evaluation.scores import Score


def parse(*texts):
    return evaluation_sweep.parse(texts, tiny.config().sampling)


def test_all_combinations_in_order():
    swept = parse("num_ar_steps=1,7", "guidance_scale=1.0,1.5", "weights=ema")
    points = evaluation_sweep.points(swept)
    assert [evaluation_sweep.name_of(point) for point in points[:3]] == [
        "S = 1, guidance_scale = 1.0, weights = ema",
        "S = 1, guidance_scale = 1.5, weights = ema",
        "S = 7, guidance_scale = 1.0, weights = ema",
    ]
    assert evaluation_sweep.sampling_options(points[1]) == {
        "num_ar_steps": 1,
        "guidance_scale": 1.5,
    }


def test_values_have_the_types_of_the_config():
    swept = parse("denoising_steps=10,20", "clip_x_start=true,false", "eta=0,1", "solver=ddim")
    assert swept == {
        "denoising_steps": ("10", "20"),
        "clip_x_start": (True, False),
        "eta": (0.0, 1.0),
        "solver": ("ddim",),
    }


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        (["guidance=1"], "unknown option of --sweep 'guidance'; did you mean 'guidance_"),
        (["guidance_scale"], "must name an option and values"),
        (["guidance_scale="], "must name an option and values"),
        (["guidance_scale=1,a"], "has a value that is not of type float"),
        (["num_ar_steps=1.5"], "has a value that is not of type int"),
        (["clip_x_start=yes"], "has a value that is not of type bool"),
        (["eta=0", "eta=1"], "--sweep has eta twice"),
        (["weights=sgd"], "unknown weights 'sgd'"),
        (["dtype=float32,bfloat16"], "unknown option of --sweep 'dtype'"),
    ],
)
def test_what_is_not_understood_is_refused(texts, words):
    with pytest.raises(UserError, match=words):
        parse(*texts)


def test_the_plot_has_a_panel_a_score(tmp_path):
    swept = parse("num_ar_steps=1,7", "guidance_scale=1.0,1.5,2.0")
    points = evaluation_sweep.points(swept)
    scores = [
        Score(evaluation_sweep.name_of(point), 5000, {"fid": 5.0 + index, "inception_score": 9.0})
        for index, point in enumerate(points)
    ]
    evaluation_sweep.plot(tmp_path / "a.png", Report("inception", scores, 6, {}), swept, points)
    fewer = [Score(row.name, 5000, {"fid": row.values["fid"]}) for row in scores]
    evaluation_sweep.plot(tmp_path / "b.png", Report("inception", fewer, 6, {}), swept, points)
    two, one = (read_image(tmp_path / name).size for name in ("a.png", "b.png"))
    assert two[0] > 1.8 * one[0]


def test_without_numbers_there_is_no_plot(tmp_path):
    swept = parse("solver=ddim,ddpm")
    rows = [Score("a", 5000, {"fid": 5.0})] * 2
    evaluation_sweep.plot(
        tmp_path / "a.png", Report("inception", rows, 6, {}), swept, evaluation_sweep.points(swept)
    )
    assert not (tmp_path / "a.png").exists()
