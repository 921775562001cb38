#!/usr/bin/env bash
# Runs cfjax on every worker of a TPU VM, from a machine with gcloud. Not run so far: no pod was at
# hand when this was written.
#
#   export TPU_NAME=my-pod ZONE=us-east5-b PROJECT=my-project
#   bash launch/tpu_vm.sh setup       # copies this clone's last commit and installs it
#   bash launch/tpu_vm.sh train --config configs/imagenet256.py:xl --workdir gs://my-bucket/xl
#   bash launch/tpu_vm.sh log         # follows what the first worker says
#   bash launch/tpu_vm.sh stop        # ends the training; `train` again resumes it
#
# All workers must see the same workdir (a bucket) and the same data. A training goes on when the
# connection ends. After a preemption: make the TPU anew, `setup`, `train`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

: "${TPU_NAME:?set it to the name of the TPU VM}"
: "${ZONE:?set it to the zone of the TPU VM}"
: "${PROJECT:?set it to the Google Cloud project}"
WHERE=(--zone="$ZONE" --project="$PROJECT")

# on WORKER COMMAND: runs a command on a worker, or on all.
on() {
  gcloud compute tpus tpu-vm ssh "$TPU_NAME" "${WHERE[@]}" --worker="$1" --command="$2"
}

action=${1:-}
[ $# -eq 0 ] || shift
case "$action" in
  setup)
    archive=$(mktemp -d)/cfjax.tar.gz
    git archive --format=tar.gz --output="$archive" HEAD
    gcloud compute tpus tpu-vm scp "$archive" "$TPU_NAME:" "${WHERE[@]}" --worker=all
    on all 'mkdir -p cfjax && tar -xzf cfjax.tar.gz -C cfjax && cd cfjax &&
      bash -c "set -euo pipefail; source launch/venv.sh; prepare_venv requirements.txt" &&
      .venv/bin/python -m pip install -qq -c requirements.txt "jax[tpu]" &&
      .venv/bin/python -c "import jax; print(jax.local_devices())"'
    ;;
  train)
    on all "cd cfjax && (nohup .venv/bin/python -m cfjax.train --distributed $(printf '%q ' "$@") \
      >train.log 2>&1 </dev/null & echo \$! >train.pid)"
    ;;
  log) on 0 'tail -n 50 -F cfjax/train.log' ;;
  stop) on all 'kill -KILL "$(cat cfjax/train.pid)"' ;;
  *)
    echo "usage: bash $0 setup | train FLAGS | log | stop" >&2
    exit 2
    ;;
esac
