#!/usr/bin/env bash
# A pod in small: runs a command of cfjax in several processes of this machine, each with its own
# virtual CPU devices (DEVICES, 4 unless set), that train as one.
#
#   bash launch/local_processes.sh 2 python -m cfjax.train --config configs/mnist.py --workdir DIR
#
# Lines are marked with the process that wrote them. When one process fails, the others are stopped
# and the exit code is its. Needs bash 4.3.
set -euo pipefail

if [ $# -lt 2 ] || ! [ "$1" -gt 0 ] 2>/dev/null; then
  echo "usage: bash $0 NUM_PROCESSES COMMAND [ARGUMENT ...]" >&2
  exit 2
fi
num_processes=$1
shift

export JAX_PLATFORMS=cpu
export XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=${DEVICES:-4}"
port=$((20000 + RANDOM % 10000))

# Each job is a process group, to be stopped as a whole; by force, as jax.distributed takes a
# gentler signal for the notice of a preemption.
set -m
trap 'for job in $(jobs -p); do kill -KILL -- "-$job" 2>/dev/null || true; done' EXIT
for ((process = 0; process < num_processes; process++)); do
  "$@" --coordinator_address="localhost:$port" --num_processes="$num_processes" \
    --process_id="$process" 2>&1 | awk -v mark="[$process]" '{ print mark, $0; fflush() }' &
done
for ((process = 0; process < num_processes; process++)); do
  wait -n
done
