#!/usr/bin/env bash
# Trains on TPU slices of a GKE cluster that has JobSet (0.6 or newer) and TPU node pools, from a
# machine with kubectl, and docker for `build`. Never run on a cluster.
#
#   export JOB_NAME=xl IMAGE=us-docker.pkg.dev/my-project/my-images/cfjax:1
#   export ACCELERATOR=tpu-v5-lite-podslice TOPOLOGY=16x16
#   bash launch/gke/jobset.sh build
#   bash launch/gke/jobset.sh apply --config configs/imagenet256.py:xl --workdir gs://my-bucket/xl
#   bash launch/gke/jobset.sh log
#   bash launch/gke/jobset.sh delete
#
# build     makes the image of this clone's last commit and pushes it
# apply     fills jobset.yaml, with the flags of cfjax.train, and applies it
# log       follows what the first pod says;  status  says what runs
# delete    ends it all: with 120 s for a last checkpoint; `apply` again resumes
# --dry-run before the action shows the commands and runs none.
#
# ACCELERATOR is tpu-v6e-slice, tpu-v5p-slice, tpu-v5-lite-podslice or tpu-v4-podslice, TOPOLOGY that
# of a slice's node pool. Also: CHIPS_PER_HOST (4), NUM_SLICES (1), NAMESPACE (default),
# SERVICE_ACCOUNT (that may use the bucket), SPOT (true for Spot nodes), MAX_RESTARTS (10), after
# failures other than preemptions. Needs bash 4.4.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source launch/common.sh

if [ "${1:-}" = --dry-run ]; then
  dry_run=1
  shift
fi
: "${JOB_NAME:?set it to the name of the JobSet}"
[[ $JOB_NAME =~ ^[a-z]([a-z0-9-]{0,38}[a-z0-9])?$ ]] ||
  fail "JOB_NAME=$JOB_NAME must be at most 40 lower-case letters, digits and dashes."
NAMESPACE=${NAMESPACE:-default}
selector="jobset.sigs.k8s.io/jobset-name=$JOB_NAME"

kube() {
  run kubectl --namespace="$NAMESPACE" "$@"
}

build() {
  : "${IMAGE:?set it to the name of the image, with registry and tag}"
  if ((dry_run)); then
    echo "$(show git archive HEAD) | $(show docker build --tag="$IMAGE" --file=launch/gke/Dockerfile -)"
  else
    git archive HEAD | docker build --tag="$IMAGE" --file=launch/gke/Dockerfile -
  fi
  run docker push "$IMAGE"
}

# json TEXT ...: a list of strings, which YAML reads too.
json() {
  local text list=""
  for text; do
    [[ $text != *[[:cntrl:]]* ]] || fail "the flag ${text@Q} holds a control character."
    text=${text//\\/\\\\}
    list+="${list:+, }\"${text//\"/\\\"}\""
  done
  echo "[$list]"
}

# The manifest, filled, on stdout.
manifest() {
  : "${IMAGE:?set it to the name of the image, with registry and tag}"
  : "${ACCELERATOR:?set it to the TPU of the node pool, such as tpu-v5-lite-podslice}"
  : "${TOPOLOGY:?set it to the topology of the node pool, such as 16x16}"
  local CHIPS_PER_HOST=${CHIPS_PER_HOST:-4} NUM_SLICES=${NUM_SLICES:-1} SPOT=${SPOT:-}
  local MAX_RESTARTS=${MAX_RESTARTS:-10} SERVICE_ACCOUNT=${SERVICE_ACCOUNT:-}
  local NUM_HOSTS COMMAND chips line name
  [[ $TOPOLOGY =~ ^[1-9][0-9]*(x[1-9][0-9]*){1,2}$ ]] ||
    fail "TOPOLOGY=$TOPOLOGY must be sizes with x between, such as 16x16 or 4x4x8."
  for name in CHIPS_PER_HOST NUM_SLICES MAX_RESTARTS; do
    [[ ${!name} =~ ^[0-9]+$ ]] || fail "$name=${!name} must be a whole number."
  done
  [[ $SPOT =~ ^(true)?$ ]] || fail "SPOT=$SPOT must be true or empty."
  chips=$((${TOPOLOGY//x/*}))
  ((chips % CHIPS_PER_HOST == 0)) ||
    fail "CHIPS_PER_HOST=$CHIPS_PER_HOST does not divide the $chips chips of TOPOLOGY=$TOPOLOGY."
  # shellcheck disable=SC2034
  NUM_HOSTS=$((chips / CHIPS_PER_HOST)) COMMAND=$(json python -m cfjax.train --distributed "$@")
  while IFS= read -r line; do
    if [[ $line =~ ^[^#]*@([A-Z_]+)@ ]]; then
      name=${BASH_REMATCH[1]}
      [ -n "${!name}" ] || continue
      line=${line//"@$name@"/"${!name}"}
    fi
    printf '%s\n' "$line"
  done <launch/gke/jobset.yaml
}

apply() {
  [ $# -gt 0 ] || fail "apply needs the flags of cfjax.train."
  local filled
  filled=$(manifest "$@")
  if ((dry_run)); then
    echo "$(show kubectl --namespace="$NAMESPACE" apply --filename=-) <<'END'"
    printf '%s\nEND\n' "$filled"
  else
    kube apply --filename=- <<<"$filled"
  fi
}

action=${1:-}
[ $# -eq 0 ] || shift
case "$action" in
  build | apply) "$action" "$@" ;;
  log)
    first="$selector,jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0"
    kube logs --follow --tail=50 --selector="$first"
    ;;
  status) kube get jobsets,jobs,pods --selector="$selector" --output=wide ;;
  delete) kube delete jobset "$JOB_NAME" ;;
  *)
    echo "usage: bash $0 [--dry-run] build | apply FLAGS | log | status | delete" >&2
    exit 2
    ;;
esac
