#!/usr/bin/env bash
# A pod in small: runs a command of cfjax in several processes of this machine, each with its own
# virtual CPU devices, that train as one.
#
#   bash launch/local_processes.sh 2 python -m cfjax.train --config configs/mnist.py --workdir DIR
#
# Lines are marked with the process that wrote them. When one process fails, the others are stopped
# and the exit code is its. SIGTERM, the notice of a preemption, is passed on to the processes; when
# they have saved and ended with exit code 75, all are started again RESTARTS times, then 75 is the
# exit code here too. --dry-run as the first argument shows the commands and runs none.
#
# Variables: DEVICES of a process (4); RESTARTS (0); GRACE_SECONDS (300), how long the others have
# when one process ends with 75, or all after SIGTERM, before they are killed. Needs bash 5.1.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

if [ "${1:-}" = --dry-run ]; then
  dry_run=1
  shift
fi
if [ $# -lt 2 ] || ! [ "$1" -gt 0 ] 2>/dev/null; then
  echo "usage: bash $0 [--dry-run] NUM_PROCESSES COMMAND [ARGUMENT ...]" >&2
  exit 2
fi
num_processes=$1
shift
for name in DEVICES RESTARTS GRACE_SECONDS; do
  [[ ${!name:-0} =~ ^[0-9]+$ ]] || fail "$name=${!name} must be a whole number."
done
max_restarts=${RESTARTS:-0}

export JAX_PLATFORMS=cpu
export XLA_FLAGS="${XLA_FLAGS:+$XLA_FLAGS }--xla_force_host_platform_device_count=${DEVICES:-4}"

# Copies each line at once, with the number of its process; also what it says after SIGTERM.
mark() {
  local line
  trap '' TERM
  while IFS= read -r line || [ -n "$line" ]; do
    printf '[%s] %s\n' "$1" "$line"
  done
}

# start COMMAND ...: all processes in the background, each a process group, to be signalled as one.
set -m
groups=()
start() {
  local process port=$((20000 + RANDOM % 10000))
  groups=()
  for ((process = 0; process < num_processes; process++)); do
    local command=("$@" --coordinator_address="localhost:$port" --num_processes="$num_processes"
      --process_id="$process")
    if ((dry_run)); then
      show env "JAX_PLATFORMS=$JAX_PLATFORMS" "XLA_FLAGS=$XLA_FLAGS" "${command[@]}"
    else
      "${command[@]}" 2>&1 | mark "$process" &
      groups+=("$(jobs -p %%)")
    fi
  done
}

signal_all() {
  local group
  for group in "${groups[@]}"; do
    kill "-$1" -- "-$group" 2>/dev/null || true
  done
}

# Kills after a while what is still running. Not a job itself, so that nobody waits for it.
watchdog=""
limit_the_rest() {
  if [ -z "$watchdog" ]; then
    (sleep "${GRACE_SECONDS:-300}" && signal_all KILL) >/dev/null 2>&1 &
    watchdog=$!
    disown "$watchdog"
  fi
}

call_off_the_limit() {
  [ -z "$watchdog" ] || kill -KILL -- "-$watchdog" 2>/dev/null || true
  watchdog=""
}

is_told=0
pass_on() {
  is_told=1
  signal_all TERM
  limit_the_rest
}

# Waits for all processes; returns the exit code of the first that failed. By force the others are
# stopped then, as jax.distributed takes a gentler signal for the notice of a preemption.
follow() {
  local code ended running=${#groups[@]} result=0
  ((is_told == 0)) || pass_on  # told while the processes were being started
  while ((running > 0)); do
    code=0
    wait -n -p ended 2>/dev/null || code=$?  # it would say who was killed
    if [ -z "${ended:-}" ]; then
      ((code == 127)) || continue  # a signal ended the wait
      # Bash forgets those that a signal killed before it had told of another one.
      running=1 code=137
    fi
    running=$((running - 1))
    if ((code == START_AGAIN)); then
      limit_the_rest
    elif ((code != 0 && result == 0)); then
      signal_all KILL
    fi
    ((result != 0)) || result=$code
  done
  groups=()
  call_off_the_limit
  return "$result"
}

trap 'signal_all KILL; call_off_the_limit' EXIT
trap pass_on TERM
for ((restarts = 0; ; restarts++)); do
  start "$@"
  code=0
  follow || code=$?
  ((code == START_AGAIN && restarts < max_restarts)) || exit "$code"
  is_told=0
  echo "Saved after the notice of a preemption; starting again ($((restarts + 1)) of $max_restarts)." >&2
done
