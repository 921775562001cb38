"""The pictures of docs/documents.md: what is in them, with a tiny random model and without one."""

import numpy as np
import pytest
import runs
import tiny
import tiny_documents
from PIL import Image

from benchmarks import documents_gallery
from cfjax.data.image_files import read_pixels
from cfjax.data.progressions import ProgressionsSource
from cfjax.data.scenes import ScenesSource
from cfjax.data.transforms import TransformsSource
from cfjax.errors import UserError
from cfjax.visualization import GIVEN


class Model:
    """Answers with flat images, and with captions that are half a formula."""

    def __init__(self, shape):
        self.shape, self.prompts = shape, []

    def generate(self, prompt, n=1, seed=0):
        self.prompts += prompt
        lead = (len(prompt),) if n == 1 else (len(prompt), n)
        return np.full((*lead, *self.shape), 90, np.uint8)

    def caption(self, images, seed=0):
        return [f"$\\frac$ {index}\0 and a longer sentence" for index in range(len(images))]


def num_frames(picture):
    """How many given images a row has: upright edges of frames, two each."""
    near = (np.abs(picture.astype(int) - GIVEN).max(-1) < 40).sum(0)
    columns = np.flatnonzero(near > 0.5 * near.max())
    return (1 + (np.diff(columns) > 3).sum()) / 2


def test_prompts_and_captions(tmp_path):
    source = ScenesSource("held_out", 16, num_scenes=30)
    model = Model((16, 16, 3))
    documents_gallery.draw_prompts(model, source, tmp_path, 0)
    assert model.prompts == [[it] for it in source.captions[:8] for _ in range(4)]
    documents_gallery.draw_captions(model, source, tmp_path, 0)
    for name in ("prompts", "captions"):
        with Image.open(tmp_path / f"documents_{name}.png") as image:
            assert 600 < image.width < 2000 and 400 < image.height < 2000


@pytest.mark.parametrize("name", ["progressions", "transforms"])
def test_strips(tmp_path, name):
    """A row a rule; given images are framed, in grey and in colour."""
    if name == "progressions":
        source, given = ProgressionsSource("held_out", num_sequences=60), 3
        kinds = source.rules_at(range(60))
    else:
        source, given = TransformsSource("held_out", num_sequences=200), 5
        kinds = source.transforms_at(range(200))
    model = Model(source.image_shape)
    getattr(documents_gallery, f"draw_{name}")(model, source, tmp_path, 0)
    assert [len(prompt) for prompt in model.prompts] == [given] * len(np.unique(kinds))
    for kind, prompt in enumerate(model.prompts):
        first = int(np.argmax(kinds == kind))
        np.testing.assert_array_equal(prompt, source.sequences_at([first])[0, :given])
    picture = read_pixels(tmp_path / f"documents_{name}.png")
    assert picture.shape[1] > 400 and picture.shape[2] == 3
    assert num_frames(picture) == given


def test_refusals(tmp_path):
    with pytest.raises(UserError, match="there is no run to draw"):
        runs.run_in_process(documents_gallery, [f"--out={tmp_path}"])


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:Glyph")  # a random model writes whatever letters
def test_the_program(tmp_path):
    arguments = [f"--out={tmp_path / 'docs'}"]
    for name in documents_gallery.PICTURES:
        config = tiny_documents.config(f"mnist_{name}.py")
        tiny.save_random_checkpoint(tmp_path / name, of_run=config)
        arguments.append(f"--{name}={tmp_path / name}")
    runs.run_in_process(documents_gallery, arguments)
    made = {path.name for path in (tmp_path / "docs").iterdir()}
    kinds = ("prompts", "captions", "progressions", "transforms")
    assert made == {f"documents_{kind}.png" for kind in kinds}
    with pytest.raises(UserError, match="is of scenes, not transforms"):
        runs.run_in_process(
            documents_gallery, [f"--transforms={tmp_path / 'scenes'}", f"--out={tmp_path}"]
        )
