# shellcheck shell=bash
# Sourced by the other scripts: .venv, made once and reused while the lock stays the same.

source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

# Whether the given command is a Python that the lock was made for. It is run: a pyenv shim may
# exist without its Python.
fits_lock() {
  "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' >/dev/null 2>&1
}

choose_python() {
  local candidate
  if [ -n "${PYTHON:-}" ]; then
    fits_lock "$PYTHON" || fail "PYTHON=$PYTHON is not Python 3.11 or 3.12; set it to one that is."
    echo "$PYTHON"
    return
  fi
  for candidate in python3.12 python3.11 python3; do
    if fits_lock "$candidate"; then
      echo "$candidate"
      return
    fi
  done
  fail "no Python 3.11 or 3.12 found (python3 is $(python3 --version 2>&1 | tail -n 1));" \
    "install one, or set PYTHON to its path."
}

make_venv() {
  local python
  python=$(choose_python)
  echo "Making .venv with $("$python" --version)."
  if ! "$python" -m venv --clear .venv; then
    rm -rf .venv
    fail "$python cannot make a virtual environment;" \
      "install its venv module (Debian, Ubuntu: apt-get install python3-venv)."
  fi
}

# prepare_venv LOCK: .venv with the packages of a lock file and cfjax itself, editable, and those of
# <LOCK>-no-deps.txt, if there is one. To be called from the repository's root. A stamp in .venv remembers what was installed, so that the next call
# does nothing.
prepare_venv() {
  local lock=$1 stamp=".venv/installed-$1" state
  if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
    make_venv  # missing, half-made, or its Python is gone
  elif ! fits_lock .venv/bin/python; then
    fail ".venv is of $(.venv/bin/python --version), not 3.11 or 3.12; remove it and run again."
  fi
  state=$(pwd && cat requirements*.txt setup.py pyproject.toml | cksum)
  if [ "$(cat "$stamp" 2>/dev/null)" = "$state" ]; then
    return
  fi
  echo "Installing $lock into .venv: a minute or two."
  rm -f "$stamp"
  .venv/bin/python -m pip install -qq --disable-pip-version-check -r "$lock"
  if [ -f "${lock%.txt}-no-deps.txt" ]; then
    .venv/bin/python -m pip install -qq --disable-pip-version-check --no-deps -r "${lock%.txt}-no-deps.txt"
  fi
  .venv/bin/python -m pip install -qq --disable-pip-version-check --no-deps -e .
  echo "$state" >"$stamp"
}
