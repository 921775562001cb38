"""Generated images as files: every kind, refusals, and kills at every operation on a file.

In one file, though long: the kills run it as a program that makes the same outputs.
"""

import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from cfjax import sample_working_folder
from cfjax.data import sources
from cfjax.data.image_files import read_image, read_images, write_npz, write_png
from cfjax.errors import UserError
from cfjax.sample_outputs import open_output, read_recipe
from cfjax.visualization import image_grid

KINDS = (".png", ".npz", ".array_record", "")
COUNT, SHAPE = 12, (8, 8, 3)
RECIPE = {
    "checkpoint": "0123abcd" * 8,
    "solver": "ddim",
    "guidance_scale": 1.5,
    "split_sizes": (4, 12),
    "num_classes": 10,
    "versions": {"cfjax": "0.1.0", "jax": "0.6"},
}
OTHER = RECIPE | {"versions": {"cfjax": "0.1.0", "jax": "0.7"}}
LABELS = np.arange(COUNT) % 5
IMAGES = np.random.default_rng(0).integers(0, 256, (COUNT, *SHAPE), np.uint8)
OTHER_IMAGES = 255 - IMAGES
SHA256 = hashlib.sha256(IMAGES.tobytes()).hexdigest()


def open_(out, recipe=RECIPE, **options):
    return open_output(out, recipe, SHAPE, COUNT, **options)


def append(output, images=IMAGES, until=None, at_once=5, seconds=0.0):
    until = until or COUNT
    for start in range(output.num_done, until, at_once):
        end = min(start + at_once, until)
        output.append(images[start:end], LABELS[start:end])
        time.sleep(seconds)


def make(out, recipe=RECIPE, images=IMAGES, at_once=5, seconds=0.0, **options):
    output = open_(out, recipe, **options)
    if not output.is_complete:
        append(output, images, at_once=at_once, seconds=seconds)
    return output.finish()


def contents(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def json_of(out):
    return out.with_name(f"{out.name}.json") if out.suffix else out / "generation.json"


@pytest.fixture(params=KINDS, ids=lambda kind: kind or "folder")
def out(request, tmp_path):
    return tmp_path / "here" / f"digits{request.param}"


def test_what_is_written(out):
    output = open_(out)
    assert (output.num_done, output.is_complete) == (0, False)
    append(output)
    document = output.finish()
    assert document == json.loads(json_of(out).read_text()) == read_recipe(json_of(out))
    assert document == read_recipe(out)
    assert document["recipe"] == RECIPE | {"split_sizes": [4, 12]}
    assert document["results"] == {
        "num_samples": COUNT,
        "image_shape": list(SHAPE),
        "images_sha256": SHA256,
    }
    expected = {out.name} if out.suffix == "" else {out.name, f"{out.name}.json"}
    assert {path.name for path in out.parent.iterdir()} == expected
    before = contents(out.parent)
    again = open_(out)
    assert (again.num_done, again.is_complete, again.finish()) == (COUNT, True, document)
    assert open_(out, overwrite=True).is_complete  # a run that starts over and over ends
    assert contents(out.parent) == before


def test_a_picture(tmp_path):
    make(tmp_path / "digits.png")
    grid = np.asarray(read_image(tmp_path / "digits.png"))
    np.testing.assert_array_equal(grid, image_grid(IMAGES, 10))
    with pytest.raises(UserError, match=r"10001 images is too large.* let --out end in \.npz"):
        open_output(tmp_path / "large.png", RECIPE, SHAPE, 10_001)


def test_an_array_file(tmp_path):
    make(tmp_path / "digits.npz")
    images, labels = read_images(tmp_path / "digits.npz")
    np.testing.assert_array_equal(images, IMAGES)
    np.testing.assert_array_equal(labels, LABELS)
    write_npz(tmp_path / "whole.npz", IMAGES, LABELS.astype(np.int32))
    assert (tmp_path / "digits.npz").read_bytes() == (tmp_path / "whole.npz").read_bytes()


@pytest.mark.parametrize("channels", [1, 3])
def test_a_folder_of_pngs(channels, tmp_path):
    images = IMAGES[..., :channels]
    output = open_output(tmp_path / "digits", RECIPE, images.shape[1:], COUNT)
    assert (tmp_path / "digits" / "generation.partial.json").exists()
    append(output, images, until=7)
    output = open_output(tmp_path / "digits", RECIPE, images.shape[1:], COUNT)
    assert output.num_done == 7
    append(output, images)
    sha256 = output.finish()["results"]["images_sha256"]
    assert sha256 == hashlib.sha256(images.tobytes()).hexdigest()
    names = {path.name for path in (tmp_path / "digits").iterdir()}
    pngs = {f"{i:06d}_class{label}.png" for i, label in enumerate(LABELS)}
    assert names == pngs | {"generation.json"}
    np.testing.assert_array_equal(read_images(tmp_path / "digits")[0], images)


def test_a_set_that_training_reads(tmp_path, monkeypatch):
    monkeypatch.setattr(sample_working_folder, "EXAMPLES_PER_SHARD", 5)
    path = tmp_path / "digits.array_record"
    make(path, at_once=4)
    options = {"size": 8, "channels": 3, "num_classes": 10}
    source = sources.open_source("array_record", str(path), "train", **options)
    images, labels = sources.all_images(source)
    np.testing.assert_array_equal(images, IMAGES)
    np.testing.assert_array_equal(labels, LABELS)
    manifest = json.loads((path / "train" / "manifest.json").read_text())
    assert [shard["num_records"] for shard in manifest["shards"]] == [5, 5, 2]
    assert manifest["description"]["recipe"]["solver"] == "ddim"
    with pytest.raises(ValueError, match="not square"):
        open_output(tmp_path / "wide.array_record", RECIPE, (8, 9, 3), COUNT)


def test_bytes_do_not_depend_on_how_images_came(out, tmp_path):
    make(out, at_once=5)
    make(tmp_path / "there" / out.name, at_once=1)
    assert contents(out.parent) == contents(tmp_path / "there")


def test_a_run_goes_on(out, tmp_path):
    append(open_(out), until=8, at_once=4)
    output = open_(out, overwrite=True)  # which is about other runs
    assert output.num_done == 8
    append(output, until=9)
    output = open_(out)
    assert (output.num_done, output.is_complete) == (9, False)
    append(output)
    assert output.finish()["results"]["images_sha256"] == SHA256
    make(tmp_path / "there" / out.name)
    assert contents(out.parent) == contents(tmp_path / "there")


def test_what_is_damaged_is_made_again(out):
    append(open_(out), at_once=4)
    chunks = sorted(out.parent.rglob("chunk-*.npz")) or sorted(out.glob("*.png"))
    damaged = next(path for path in chunks if "04" in path.name)
    damaged.write_bytes(damaged.read_bytes()[:-200])
    output = open_(out)
    assert output.num_done == 4
    append(output, at_once=3)
    assert output.finish()["results"]["images_sha256"] == SHA256
    if not out.suffix:  # that of a finished one too
        damaged.unlink()
        output = open_(out)
        assert (output.num_done, output.is_complete) == (4, False)
        assert (out / "generation.partial.json").exists() and not json_of(out).exists()
        write_png(damaged, IMAGES[4, :5])
        assert open_(out).num_done == 4


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"solver": "ddpm"}, 'solver "ddim", not "ddpm"'),
        ({"versions": OTHER["versions"]}, 'versions.jax "0.6", not "0.7"'),
        ({"seed": 1}, "seed missing, not 1"),
        ({"checkpoint": "f" * 64}, 'checkpoint "0123abcd.{28}\\.\\.\\., not "f{36}\\.\\.\\.;'),
    ],
)
@pytest.mark.parametrize("finished", [True, False])
def test_another_run_is_refused(out, changes, what, finished):
    append(open_(out))
    if finished:
        open_(out).finish()
    before = contents(out.parent)
    noun = "another run" if finished else "an unfinished run of another recipe"
    with pytest.raises(UserError, match=f"{out} holds {noun}, with {what}.*--overwrite"):
        open_(out, RECIPE | changes)
    assert contents(out.parent) == before


def test_another_number_or_shape_is_another_run(out):
    make(out)
    with pytest.raises(UserError, match=f"{out} holds .* num_samples 12, not 24; name another"):
        open_output(out, RECIPE, SHAPE, 24)
    with pytest.raises(UserError, match=r"image_shape \[8, 8, 3\], not \[8, 8, 1\]; name another"):
        open_output(out, RECIPE, (8, 8, 1), COUNT)


def test_overwriting(out, tmp_path):
    make(out)
    finished = contents(out.parent)
    output = open_(out, OTHER, overwrite=True)
    append(output, OTHER_IMAGES, until=6)
    if out.suffix:  # the old output is whole until the new one is
        assert {name: contents(out.parent)[name] for name in finished} == finished
        assert open_(out).is_complete  # and does not touch the new one
    else:
        assert len(list(out.glob("*.png"))) == 6
    output = open_(out, OTHER, overwrite=True)
    assert output.num_done == 6
    append(output, OTHER_IMAGES)
    output.finish()
    make(tmp_path / "there" / out.name, OTHER, OTHER_IMAGES)
    assert contents(out.parent) == contents(tmp_path / "there")
    append(open_(tmp_path / "unfinished" / out.name), until=9)
    make(tmp_path / "unfinished" / out.name, OTHER, OTHER_IMAGES, overwrite=True)
    assert contents(tmp_path / "unfinished") == contents(tmp_path / "there")


def test_what_is_not_ours_is_refused(out):
    if out.suffix in (".png", ".npz"):
        out.parent.mkdir()
        out.write_text("mine")
    else:
        place = out / "train" if out.suffix else out
        place.mkdir(parents=True)
        (place / "manifest.json").write_text("{}")
    before = contents(out.parent)
    with pytest.raises(UserError, match=rf"{out} is not of cfjax.sample.*; name another --out"):
        open_(out)
    assert contents(out.parent) == before
    if out.suffix in (".png", ".npz"):
        make(out, overwrite=True)
        assert open_(out).is_complete
    else:
        with pytest.raises(UserError, match=r"is not of cfjax\.sample.*; name another --out\."):
            open_(out, overwrite=True)
        assert contents(out.parent) == before


@pytest.mark.parametrize("place", ["", "train"])
def test_a_folder_with_something_else_is_not_deleted(out, place):
    if out.suffix in (".png", ".npz") or (place and not out.suffix):
        place = f".{out.name}.partial"
        append(open_(out))
        where = out.parent / place if out.suffix else out
    else:
        make(out)
        where = out / place
    (where / "notes.txt").write_text("mine")
    before = contents(out.parent)
    with pytest.raises(UserError, match=r"has notes\.txt, not of cfjax\.sample; name another"):
        open_(out, OTHER, overwrite=True)
    assert contents(out.parent) == before


def test_a_json_of_something_else_is_not_replaced(out):
    json_of(out).parent.mkdir(parents=True)
    for text in ("{}", "no JSON", '{"recipe": {}, "results": {}}'):
        json_of(out).write_text(text)
        with pytest.raises(UserError, match=r"\.json is not of cfjax\.sample, or damaged; move it"):
            open_(out, overwrite=True)
    with pytest.raises(UserError, match=r"is not of cfjax\.sample"):
        read_recipe(out)
    assert json_of(out).read_text() == text


def test_files_and_folders_are_not_confused(tmp_path):
    (tmp_path / "folder.npz").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "file.array_record").touch()
    for name in ("folder.npz", "file", "file.array_record"):
        with pytest.raises(UserError, match=rf"{name} is a {name.split('.')[0]}; name a"):
            open_(tmp_path / name, overwrite=True)


def test_outputs_that_differ_in_their_suffix_stand_side_by_side(tmp_path):
    made = {suffix: make(tmp_path / f"digits{suffix}") for suffix in (".png", ".npz")}
    for suffix, document in made.items():
        assert read_recipe(tmp_path / f"digits{suffix}") == document
        assert read_recipe(tmp_path / f"digits{suffix}.json") == document


def test_a_place_that_can_not_be_written_to(out):
    out.parent.mkdir(mode=0o555)
    with pytest.raises(UserError, match=rf"{out.parent} is read-only; allow writing or name"):
        open_(out)
    out.parent.chmod(0o755)
    (out.parent / "file").touch()
    with pytest.raises(UserError, match=r"can't be made, as .*file is a file; name another"):
        open_(out.parent / "file" / "below" / out.name)
    with pytest.raises(UserError, match=r"can't be written to --out=gs://bucket/digits; write"):
        open_("gs://bucket/digits")
    with pytest.raises(UserError, match=r"can't be written: File name too long; name another"):
        open_(out.parent / ("x" * 256 + out.suffix))
    assert list(contents(out.parent)) == ["file"]


def test_a_home_folder_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    make("~/digits.npz")
    assert (tmp_path / "digits.npz").exists() and read_recipe("~/digits.npz")


def test_a_disk_that_is_full(out, tmp_path):
    make(tmp_path / "there" / out.name)
    output = open_(out)
    append(output, until=8, at_once=4)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    write = ("append", "finish") if out.suffix else ("append",)
    for method in write:
        output = open_(out)
        if method == "finish":
            append(output)
        arguments = (IMAGES[8:], LABELS[8:]) if method == "append" else ()
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
            with pytest.raises(UserError, match=r"can't be written: .*; free space, and run the"):
                getattr(output, method)(*arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert open_(out).num_done == (8 if method == "append" else COUNT)
    make(out)
    assert contents(out.parent) == contents(tmp_path / "there")


def test_wrong_calls(out):
    output = open_(out)
    for images, labels in (
        (IMAGES.astype(np.float32), LABELS),
        (IMAGES[..., :1], LABELS),
        (IMAGES[0], LABELS),
        (IMAGES, LABELS[:5]),
        (IMAGES, LABELS.astype(np.float32)),
        (IMAGES, LABELS - 1),
        (np.concatenate([IMAGES, IMAGES]), np.concatenate([LABELS, LABELS])),
    ):
        with pytest.raises(ValueError, match=r"images|label") as raised:
            output.append(images, labels)
        assert not isinstance(raised.value, UserError)
    append(output, until=5)
    output.append(IMAGES[:0], LABELS[:0])
    with pytest.raises(ValueError, match="5 of 12 images were given"):
        output.finish()
    with pytest.raises(ValueError, match="0 samples"):
        open_output(out, RECIPE, SHAPE, 0)
    with pytest.raises(ValueError, match="not \\[H, W, 1 or 3\\]"):
        open_output(out, RECIPE, (8, 8, 4), 1)
    with pytest.raises(TypeError):
        open_(out, RECIPE | {"seed": np.int32(0)})


def test_no_recipe(tmp_path):
    with pytest.raises(UserError, match=r"there is no .*digits\.npz\.json; name the output"):
        read_recipe(tmp_path / "digits.npz")
    open_(tmp_path / "digits.npz")
    with pytest.raises(UserError, match=r"recipe\.json is of a cfjax\.sample that has not finish"):
        read_recipe(tmp_path / ".digits.npz.partial" / "recipe.json")


@pytest.mark.parametrize("kind", [".npz", ".array_record", ""])
def test_one_chunk_in_memory(kind, tmp_path):
    shape, count, at_once = (256, 256, 3), 48, 4
    chunk = np.zeros((at_once, *shape), np.uint8)
    tracemalloc.start()
    try:
        output = open_output(tmp_path / f"large{kind}", RECIPE, shape, count)
        for _ in range(count // at_once):
            output.append(chunk, np.zeros(at_once, int))
        output.finish()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 * chunk.nbytes  # of 12 that there are


@pytest.mark.long
def test_kills(tmp_path):
    """In a program of its own, as that forks, which is no good with the threads of jax."""
    done = subprocess.run(
        [sys.executable, __file__, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for kind, kills in json.loads(done.stdout).items():
        assert kills["new"] > 15 and kills["by time"] == 3, kind
        assert kind == ".png" or kills["overwriting"] > 15, kind


def forked(function):
    """Runs a function in a child; how it ended: 0, or -SIGKILL."""
    child = os.fork()
    if child == 0:
        try:
            function()
        except BaseException as error:
            sys.stderr.write(f"{error!r}\n")
            os._exit(1)
        os._exit(0)
    return child


def ended(child):
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, -signal.SIGKILL), code
    return code


def killed_at(operation, folder):
    """Kills this process before the n-th thing that it does to a file in a folder."""
    left = operation

    def watch(event, arguments):
        nonlocal left
        changes = event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir") or (
            event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax")
        )
        if changes and str(arguments[0]).startswith(str(folder)):
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def kill_at_every_operation(out, begin, resume, expected):
    """Kills `resume` everywhere once, and lets it go on; how often it was killed."""
    operation = 0
    while True:
        shutil.rmtree(out.parent, ignore_errors=True)
        if begin is not None:
            shutil.copytree(begin, out.parent)
        child = forked(lambda n=operation: (killed_at(n, out.parent), resume(out)))
        if ended(child) == 0:
            return operation
        if begin is not None and out.suffix and json_of(out).exists():  # it never lies
            left = contents(out.parent)
            first, name = contents(begin), json_of(out).name
            of = first if left[name] == first[name] else expected
            same = [left[it] == of.get(it) for it in left if not it.startswith(".")]
            assert all(same), f"killed at {operation}"
        assert ended(forked(lambda: resume(out))) == 0
        assert contents(out.parent) == expected, f"killed at {operation}"
        operation += 1


def kill_by_time(out, expected):
    shutil.rmtree(out.parent, ignore_errors=True)
    kills = 0
    for seconds in (0.02, 0.1, 0.1):  # of 0.6 that it takes
        child = forked(lambda: make(out, at_once=1, seconds=0.2))
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
        kills += ended(child) != 0
    assert ended(forked(lambda: make(out))) == 0
    assert contents(out.parent) == expected
    return kills


def killed(kind, folder):
    """How often what was killed, and went on to the same bytes."""
    out = folder / "killed" / f"digits{kind}"
    whole, other = (folder / f"{name}{kind}" for name in ("whole", "other"))
    ended(forked(lambda: make(whole / out.name)))
    ended(forked(lambda: make(other / out.name, OTHER, OTHER_IMAGES)))

    def make_in_two(path):
        make(path, at_once=2)

    def overwrite(path):
        make(path, OTHER, OTHER_IMAGES, overwrite=True)

    kills = {
        "by time": kill_by_time(out, contents(whole)),
        "new": kill_at_every_operation(out, None, make_in_two, contents(whole)),
    }
    if kind != ".png":  # which is overwritten as .npz is
        kills["overwriting"] = kill_at_every_operation(out, whole, overwrite, contents(other))
    return kills


def main(folder):
    global COUNT
    COUNT = 3
    assert "jax" not in sys.modules
    sys.stdout.write(json.dumps({kind: killed(kind, Path(folder)) for kind in KINDS}))


if __name__ == "__main__":
    main(sys.argv[1])
