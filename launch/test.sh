#!/usr/bin/env bash
# Runs the tests in .venv, which it makes or reuses.
#
#   bash launch/test.sh [--all] [pytest arguments, paths from the repository's root]
#
# --all also installs the packages of requirements-oracle.txt and runs what is marked slow, long or
# oracle; a test marked oracle that skips fails then. PYTHON names the Python to make .venv with.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/venv.sh

if [ "${1:-}" = --all ]; then
  shift
  prepare_venv requirements-oracle.txt
  export CFJAX_REQUIRE_ORACLES=1
else
  prepare_venv requirements-test.txt
  set -- -m "not slow and not long and not oracle" "$@"
fi
# Two test files at a time; `-n 0` runs them one after the other, in this process.
exec .venv/bin/python -m pytest -n 2 --dist loadfile "$@"
