"""The pages of docs/: their commands print or make what is shown, their links lead somewhere."""

import os
import re
import subprocess
import sys
import tarfile

import pytest
from fake_clone import REPOSITORY
from PIL import Image

from cfjax.data.sources import SPLITS

PAGES = sorted(path.relative_to(REPOSITORY) for path in REPOSITORY.glob("docs/*.md"))


def shown(page):
    """The commands of the page's console blocks, each with the lines that follow it."""
    blocks = re.findall(r"^```console\n(.*?)^```", (REPOSITORY / page).read_text(), re.M | re.S)
    parts = [part for block in blocks for part in re.split(r"^\$ ", block, flags=re.M)[1:]]
    return [part.split("\n", 1) for part in parts]


def test_shown_commands_print_what_is_shown():
    """Every command is an export, for all that follow, or a --dry-run."""
    exports, num_shown = "", 0
    for command, output in shown("docs/pods.md"):
        if command.startswith("export "):
            exports += f"{command}; "
            assert output == ""
            continue
        assert "--dry-run" in command
        done = subprocess.run(
            ["bash", "-c", exports + command],
            cwd=REPOSITORY,
            env={"PATH": "/usr/bin:/bin"},
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout == output
        num_shown += 1
    assert num_shown == 2


def test_the_commands_that_prepare_data_do(tmp_path):
    """Those of docs/data.md on stand-ins: tar files of classes, sorted folders, pictures."""
    for name in ("train", "val/n01", "pictures/cats"):
        (tmp_path / name).mkdir(parents=True)
    Image.new("RGB", (300, 280)).save(tmp_path / "val/n01/1.JPEG")
    Image.new("RGB", (30, 20)).save(tmp_path / "pictures/cats/1.jpg")
    with tarfile.open(tmp_path / "train/n01.tar", "w") as tar:
        tar.add(tmp_path / "val/n01/1.JPEG", "n01_1.JPEG")
    page = (REPOSITORY / "docs/data.md").read_text().replace("\\\n", "")
    commands = re.findall(r"^ *python (-m cfjax.prepare_images.*)$", page, re.M)
    for command in commands:
        done = subprocess.run(
            [sys.executable, *command.split()],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
    made = {str(path.parent.relative_to(tmp_path)) for path in tmp_path.rglob("manifest.json")}
    splits = {f"{name}/{split}" for name in ("imagenet", "imagenet256") for split in SPLITS}
    assert made == {*splits, "prepared/train"}


@pytest.mark.parametrize("page", [*PAGES, "README.md", "CONTRIBUTING.md"], ids=str)
def test_links_lead_to_files(page):
    folder = (REPOSITORY / page).parent
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", (REPOSITORY / page).read_text())
    for link in links:
        assert (folder / link).exists(), link
