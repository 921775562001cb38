"""A copy of what the scripts of launch/ read, with programs in its PATH that only record calls."""

import shutil
import subprocess
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent

# Acts as Python VERSION (empty: a pyenv shim without its Python), and as the one in .venv.
FAKE_PYTHON = """#!/bin/bash
version=${VERSION-3.12}
[ -n "$version" ] || exit 127
case "$1 $2" in
  "--version "*) echo "Python $version" ;;
  "-c "*) [ "$version" = 3.11 ] || [ "$version" = 3.12 ] ;;
  "-m venv")
    [ -z "${NO_VENV:-}" ] || { mkdir -p "${@: -1}/bin"; exit 1; }
    mkdir -p "${@: -1}/bin" && cp "$0" "${@: -1}/bin/python"
    echo "$0 $*" >>"$LOG" ;;
  "-m pip") [ "$3" = --version ] || echo "$*" >>"$LOG"; [ "$3" != "${FAIL_PIP:-}" ] ;;
  *)
    printf '%s|' "$PWD" "${CFJAX_REQUIRE_ORACLES:-}" "$@" >>"$LOG"
    echo >>"$LOG"
    [ "$2" != "${FAIL_MODULE:-none}" ] ;;
esac
"""

# Records its name and arguments, then what it reads.
RECORDER = (
    '#!/bin/bash\nprintf "%s|" "$(basename "$0")" "$@" >>"$LOG"; echo >>"$LOG"; cat >>"$LOG"\n'
)
# Flags of cfjax.train that a shell would take apart.
FLAGS = ("--config", "configs/a.py:xl", "--workdir", "gs://b/x l", "--config.x=(1, 2)", "--y=it's")


def make_clone(tmp_path):
    """What the scripts read, in a path with a space; fake Pythons are in `bin` beside it."""
    clone = tmp_path / "a clone"
    for name in ("launch", ".ci"):
        shutil.copytree(REPOSITORY / name, clone / name)
    for path in [*REPOSITORY.glob("requirements*.txt"), REPOSITORY / "setup.py"]:
        shutil.copy(path, clone)
    shutil.copy(REPOSITORY / "pyproject.toml", clone)
    (tmp_path / "bin").mkdir()
    for name in ("python3", "python3.11", "python3.12"):
        add_program(clone, name, FAKE_PYTHON)
    return clone


def add_program(clone, name, text):
    """Puts an executable script into the PATH of `run`."""
    path = clone.parent / "bin" / name
    path.write_text(text)
    path.chmod(0o755)


def run(clone, script, *arguments, **environment):
    """Runs a script from another folder; returns its exit code, its output and new log lines."""
    log = clone.parent / "log"
    log.write_text("")
    variables = {"PATH": f"{clone.parent / 'bin'}:/usr/bin:/bin", "LOG": str(log)} | environment
    finished = subprocess.run(
        ["bash", str(clone / script), *arguments],
        cwd=clone.parent,
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
        check=False,
    )
    return finished.returncode, finished.stdout, log.read_text().splitlines()
