#!/usr/bin/env bash
# The whole way on the embedded MNIST digits: installs into .venv, trains, samples, scores, draws.
#
#   bash launch/quickstart.sh
#
# Everything is left in runs/mnist. A second run finds the training done (or resumes it) and makes
# samples, score and pictures anew. PYTHON names the Python to make .venv with.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/venv.sh

WORKDIR=runs/mnist

stage() {
  local title=$1 began=$SECONDS
  shift
  printf '\n== %s\n' "$title"
  "$@"
  printf -- '-- %s: %d s (%d s since the start)\n' "$title" $((SECONDS - began)) "$SECONDS"
}

program() {
  local name=$1
  shift
  echo "python -m cfjax.$name $*"
  .venv/bin/python -m "cfjax.$name" "$@"
}

# Big buffers in big pages: the train step then spends 30% less time in the kernel. Linux alone.
export GLIBC_TUNABLES=glibc.malloc.hugetlb=1

stage "Install" prepare_venv requirements.txt
stage "Train" program train --config configs/mnist.py --workdir "$WORKDIR"
stage "Sample" program sample --checkpoint "$WORKDIR" --out "$WORKDIR/samples.png" --num_ar_steps=7 --overwrite
stage "Draw" program draw --checkpoint "$WORKDIR" --out "$WORKDIR/pictures"
stage "Score" program evaluate --checkpoint "$WORKDIR" --out "$WORKDIR/scores" \
  --num_samples=1000 --ar_steps=1,2,4,7,49
