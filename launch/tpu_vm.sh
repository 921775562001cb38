#!/usr/bin/env bash
# Trains on a TPU VM pod of one slice or several, from a machine with gcloud. The commands are those
# of gcloud 528, which parses them; nothing here was ever run on a pod.
#
#   export TPU_NAME=my-pod ZONE=us-west4-a PROJECT=my-project
#   export ACCELERATOR_TYPE=v5litepod-256 RUNTIME_VERSION=v2-alpha-tpuv5-lite
#   bash launch/tpu_vm.sh watch --config configs/imagenet256.py:xl --workdir gs://my-bucket/xl
#   bash launch/tpu_vm.sh delete
#
# watch does all that follows and starts over after a preemption; or one by one:
#   create        asks for the TPU, as a queued resource
#   wait          until it is ACTIVE
#   setup         copies this clone's last commit to all workers and installs it
#   train FLAGS   starts cfjax.train on all workers; it goes on when the connection ends
#   status, log   what runs; follows what the first worker says
#   stop          has cfjax save and end on all workers; `train` again resumes
#   delete        gives the TPU back: until then it costs
# --dry-run before the action shows the commands and runs none.
#
# RUNTIME_VERSION is v2-alpha-tpuv6e (v6e), v2-alpha-tpuv5 (v5p), v2-alpha-tpuv5-lite (v5e) or
# tpu-ubuntu2204-base (v4); it and ACCELERATOR_TYPE (v6e-64, v5p-128, v5litepod-256, v4-128: chips,
# but for v5p and v4 twice as many) are needed by create and watch. Also: NUM_SLICES (1);
# CREATE_FLAGS and SSH_FLAGS, more flags of gcloud such as "--spot" and "--tunnel-through-iap";
# POLL_SECONDS (30); RESTARTS (1000), how often watch starts over at most. Needs bash 4.4.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/common.sh

usage="usage: bash $0 [--dry-run] create | wait | setup | train FLAGS | status | log | stop | delete | watch FLAGS"
if [ "${1:-}" = --dry-run ]; then
  dry_run=1
  shift
fi
: "${TPU_NAME:?set it to the name of the TPU}"
: "${ZONE:?set it to the zone of the TPU}"
: "${PROJECT:?set it to the Google Cloud project}"
num_slices=${NUM_SLICES:-1}
poll_seconds=${POLL_SECONDS:-30}
for name in NUM_SLICES POLL_SECONDS RESTARTS; do
  [[ ${!name:-1} =~ ^[0-9]+$ ]] || fail "$name=${!name} must be a whole number."
done

# split TEXT: words as a shell reads them, into `words`; nothing in them is expanded.
split() {
  words=()
  [ -z "$1" ] || readarray -td '' words < <(xargs printf '%s\0' <<<"$1")
}
split "${CREATE_FLAGS:-}" && create_flags=("${words[@]}")
split "${SSH_FLAGS:-}" && ssh_flags=("${words[@]}")
place=(--zone="$ZONE" --project="$PROJECT")
exec 3>&1  # for commands of --dry-run whose output is read

say() {
  echo "$(date +%H:%M:%S) $*" >&2
}

rest() {
  ((dry_run)) || sleep "$poll_seconds"
}

# resource ACTION FLAGS: of gcloud, on this queued resource.
resource() {
  run gcloud compute tpus queued-resources "$1" "$TPU_NAME" "${place[@]}" "${@:2}"
}

# on WORKERS COMMAND: runs a command on the first worker (0) or on all.
on() {
  resource ssh "${ssh_flags[@]}" --node="$1" --worker="$1" --command="$2" </dev/null
}

# The state of the queued resource, empty if there is none; fails when gcloud does.
tpu_state() {
  local rows
  local list=(gcloud compute tpus queued-resources list "${place[@]}"
    --format='value(name.basename(),state.state)')
  if ((dry_run)); then
    show "${list[@]}" >&3
    echo "$expected_state"
    return
  fi
  rows=$("${list[@]}") || return
  awk -v name="$TPU_NAME" '$1 == name { print $2 }' <<<"$rows"
}
expected_state=ACTIVE

create() {
  : "${ACCELERATOR_TYPE:?set it to what to ask for, such as v5litepod-256}"
  : "${RUNTIME_VERSION:?set it to the image of the TPU VM, such as v2-alpha-tpuv5-lite}"
  local nodes=(--node-id="$TPU_NAME")
  if ((num_slices > 1)); then
    nodes=(--node-count="$num_slices" --node-prefix="$TPU_NAME")
  fi
  resource create --accelerator-type="$ACCELERATOR_TYPE" --runtime-version="$RUNTIME_VERSION" \
    "${nodes[@]}" "${create_flags[@]}"
}

delete() {
  resource delete --force --quiet
}

# Fails when the TPU will not become ACTIVE.
wait_until_active() {
  local state last=nothing
  while true; do
    state=$(tpu_state) || state="out of sight, as gcloud fails"
    [ "$state" = "$last" ] || say "$TPU_NAME is ${state:-not there}."
    last=$state
    case "$state" in
      ACTIVE) return 0 ;;
      FAILED | SUSPENDED | "") return 1 ;;
    esac
    rest
  done
}

# The first connections fail while keys spread to the workers.
setup() {
  local try archive="${TMPDIR:-/tmp}/cfjax-$TPU_NAME.tar.gz"
  if [ -n "$(git status --porcelain 2>/dev/null)" ]; then
    say "What is not committed is not copied."
  fi
  run git archive --format=tar.gz --output="$archive" HEAD || return
  for ((try = 1; ; try++)); do
    on all true && break
    ((try < 5)) || return 1
    say "Not all workers of $TPU_NAME can be reached yet."
    rest
  done
  run gcloud compute tpus queued-resources scp "$archive" "$TPU_NAME:cfjax.tar.gz" "${place[@]}" \
    "${ssh_flags[@]}" --node=all --worker=all || return
  on all "mkdir -p cfjax && tar -xzf cfjax.tar.gz -C cfjax && bash cfjax/launch/worker.sh setup"
}

train() {
  on all "bash cfjax/launch/worker.sh start$(printf ' %q' "$@")"
}

stop() {
  on all "bash cfjax/launch/worker.sh stop"
}

# What became of the training: "running", "done", "again" (preempted), "failed CODE" or
# "unreachable". A worker that was made anew has no cfjax.
training_state() {
  local said code
  said=$(on all "bash cfjax/launch/worker.sh state || echo state: new") || said=""
  if ((dry_run)); then
    echo "$said" >&3
    said="state: ended 0"
  fi
  code=$(sed -nE 's/^state: ended ([1-9][0-9]*)$/\1/p' <<<"$said" | head -n 1)
  if grep -qxE "state: (ended $START_AGAIN|lost|none|new)" <<<"$said"; then
    echo again
  elif [ -n "$code" ]; then
    echo "failed $code"
  elif grep -qx "state: running" <<<"$said"; then
    echo running
  elif grep -qx "state: ended 0" <<<"$said"; then
    echo "done"
  else
    echo unreachable
  fi
}

# Until the TPU is ACTIVE, whatever became of it; `is_new` says whether it was created.
have_tpu() {
  local state failures=0
  while true; do
    if state=$(tpu_state); then
      case "$state" in
        FAILED | SUSPENDED)
          say "$TPU_NAME is $state; it is deleted and created anew."
          delete || true
          ;;
        "")
          if create; then
            is_new=1 failures=0 expected_state=ACTIVE
          else
            ((++failures < 5)) || fail "$TPU_NAME could not be created 5 times; see above for why."
          fi
          ;;
      esac
      wait_until_active && return
    fi
    rest
  done
}

# Until training ends: 0 when it is done, 75 when it is to be started again, else its exit code.
follow() {
  local state code=""
  while true; do
    rest
    if ! state=$(tpu_state); then
      say "gcloud fails; looking again in $poll_seconds s."
    elif [ "$state" != ACTIVE ]; then
      say "$TPU_NAME is ${state:-gone}."
      return "$START_AGAIN"
    elif [ -n "$code" ]; then
      return "$code"  # it failed, and a while later the TPU is still there: not a preemption
    else
      state=$(training_state)
      case "$state" in
        done) return 0 ;;
        again) return "$START_AGAIN" ;;
        failed*) code=${state#failed } ;;
        unreachable) say "Not all workers can be reached; looking again in $poll_seconds s." ;;
      esac
    fi
  done
}

# A training that runs already, as of a watch that was interrupted, is followed from there.
watch() {
  local restart code is_new=0
  expected_state=""
  for ((restart = 0; restart <= ${RESTARTS:-1000}; restart++)); do
    ((restart == 0)) || say "Starting over ($restart)."
    have_tpu
    if ((restart == 0 && !is_new)) && [ "$(training_state)" = running ] ||
      { setup && stop && train "$@"; }; then
      code=0
      follow || code=$?
      if ((dry_run)); then
        echo "# When it was preempted: if the TPU is SUSPENDED or FAILED, delete it; then all again."
        delete
      elif ((code == 0)); then
        say "Training is done. $TPU_NAME still costs: bash $0 delete"
      elif ((code != START_AGAIN)); then
        say "Training failed with exit code $code: bash $0 log. $TPU_NAME still costs."
      fi
      ((code == START_AGAIN)) || exit "$code"
    fi
    rest  # a preempted TPU stays ACTIVE for some seconds
  done
  say "Started over ${RESTARTS:-1000} times."
  exit "$START_AGAIN"
}

action=${1:-}
[ $# -eq 0 ] || shift
case "$action" in
  train | watch) [ $# -gt 0 ] || fail "$action needs the flags of cfjax.train." ;;
esac
case "$action" in
  create | setup | train | stop | delete | watch) "$action" "$@" ;;
  wait) wait_until_active || fail "$TPU_NAME will not become ACTIVE; delete it and create it anew." ;;
  status)
    tpu_state
    on all "bash cfjax/launch/worker.sh state"
    ;;
  log) on 0 "bash cfjax/launch/worker.sh log" ;;
  *)
    echo "$usage" >&2
    exit 2
    ;;
esac
