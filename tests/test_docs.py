"""What the pages of docs/ show a launcher to print is what it prints; their links lead somewhere."""

import re
import subprocess

import pytest
from fake_clone import REPOSITORY

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


@pytest.mark.parametrize("page", [*PAGES, "README.md", "CONTRIBUTING.md"], ids=str)
def test_links_lead_to_files(page):
    folder = (REPOSITORY / page).parent
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", (REPOSITORY / page).read_text())
    for link in links:
        assert (folder / link).exists(), link
