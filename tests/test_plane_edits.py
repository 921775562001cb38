"""The edits of the plane study: what is run again, and the table."""

import json

import pytest

from benchmarks import plane_edits
from benchmarks.plane_edits import EDIT_WAYS, EDITS, PASTED, mask_name

WAYS = (*EDIT_WAYS, PASTED)


def result(keep, way, agreement):
    """As of one mask and way; `any` is of pasted parts alone."""
    shares = {"share_generated": 0.57, "agreement": agreement, "old_class": 0.1}
    return {"keep": keep, "way": way} | shares | ({"any": 0.9} if way == PASTED else {})


def cells_of(line):
    return [cell.strip() for cell in line[1:-1].split("|")]


def test_the_table_has_a_row_a_mask_and_the_mean_of_each_way():
    agreements = {way: 0.5 + 0.1 * index for index, way in enumerate(WAYS)}
    edits = [result(mask_name(*edit), way, agreements[way]) for edit in EDITS for way in WAYS]
    lines = plane_edits.page_of_edits(edits, 100).splitlines()
    header, rule, *masks, mean = (cells_of(line) for line in lines if line.startswith("|"))
    assert rule == ["---"] * len(header) and header[2:-2] == list(EDIT_WAYS)
    assert [row[0] for row in masks] == [mask_name(*edit) for edit in EDITS]
    cells = [f"{agreement:.1%} / 10.0%" for agreement in agreements.values()]
    assert all(row[1:] == ["57%", *cells, "90.0%"] for row in masks)
    # Of the mean of nine shares p of 100 edits: the root of p (1 - p) / 900.
    errors = [(p * (1 - p) / 900) ** 0.5 for p in agreements.values()]
    means = [f"{p:.1%} ± {e:.1%}" for p, e in zip(agreements.values(), errors, strict=True)]
    assert mean == ["mean", "", *means, "90.0%"]


@pytest.mark.parametrize("way", WAYS)
def test_a_study_goes_on_with_the_way_that_is_missing(tmp_path, monkeypatch, way):
    ran = []

    def run_edit(model, keep, keep_ratio, way, num_samples, classifier):
        ran.append((mask_name(keep, keep_ratio), way))
        return result(*ran[-1], 0.7)

    def run_paste(*arguments):
        model, keep, keep_ratio, num_samples, classifier = arguments
        return run_edit(model, keep, keep_ratio, PASTED, num_samples, classifier)

    monkeypatch.setattr(plane_edits, "run_edit", run_edit)
    monkeypatch.setattr(plane_edits, "run_paste", run_paste)
    masks = [mask_name(*edit) for edit in EDITS]
    before = [result(mask, other, 0.5) for mask in masks for other in WAYS if other != way]
    path = tmp_path / "edits.json"
    path.write_text(json.dumps(before))
    done = plane_edits.run_edits(None, 100, None, path)
    assert ran == [(mask, way) for mask in masks]
    assert done == json.loads(path.read_text()) and done[: len(before)] == before
    assert len(done) == len(EDITS) * len(WAYS)
