#!/usr/bin/env bash
# One worker's part of tpu_vm.sh, which copies this clone to every worker and calls it there.
#
#   bash launch/worker.sh setup | start FLAGS | state | log | stop
#
# setup installs cfjax into .venv. start trains in the background, with the flags of cfjax.train,
# and goes on when the connection ends. state says "none", "running", "ended EXIT_CODE", or "lost"
# when the training is gone without an exit code, as after a reboot. stop gives the notice of a
# preemption, upon which cfjax saves, and kills after GRACE_SECONDS (120). Linux alone.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/venv.sh
lock=${TPU_LOCKFILE:-/tmp/libtpu_lockfile}

state() {
  if [ -f train.exit ]; then
    echo "ended $(cat train.exit)"
  elif [ ! -f train.pid ]; then
    echo none
  elif kill -0 "$(cat train.pid)" 2>/dev/null; then
    echo running
  else
    echo lost
  fi
}

setup() {
  if ! (choose_python) >/dev/null 2>&1; then
    echo "Installing Python 3.11."  # the images of TPU VMs have 3.10; they update themselves at first
    sudo apt-get -qq -o DPkg::Lock::Timeout=600 update
    sudo apt-get -qq -y -o DPkg::Lock::Timeout=600 install python3.11-venv
  fi
  prepare_venv requirements.txt
  .venv/bin/python -m pip install -qq --disable-pip-version-check -c requirements.txt "jax[tpu]"
  echo "Set up on $(hostname)."
}

start() {
  [ "$(state)" != running ] || fail "a training runs on $(hostname) already; stop it first."
  rm -f train.exit train.pid
  setsid bash launch/worker.sh train "$@" >>train.log 2>&1 </dev/null &
  echo $! >train.pid
}

# In the foreground; leaves the exit code behind. The signal of `stop` ends cfjax, not this shell.
train() {
  local code=0
  trap : TERM
  .venv/bin/python -m cfjax.train --distributed "$@" || code=$?
  echo "$code" >train.exit.tmp
  mv train.exit.tmp train.exit
}

stop() {
  local group seconds
  if [ "$(state)" = running ]; then
    group=$(cat train.pid)
    kill -TERM -- "-$group"
    for ((seconds = 0; seconds < ${GRACE_SECONDS:-120}; seconds++)); do
      [ "$(state)" = running ] || break
      sleep 1
    done
    if [ "$(state)" = running ]; then
      kill -KILL -- "-$group"
      echo 137 >train.exit
    fi
  fi
  # A killed process leaves libtpu's lock behind, which would turn away the next one.
  rm -f "$lock" 2>/dev/null || sudo rm -f "$lock"
}

action=${1:-}
[ $# -eq 0 ] || shift
case "$action" in
  setup | start | train | stop) "$action" "$@" ;;
  state) echo "state: $(state)" ;;
  log) exec tail -n 50 -F train.log ;;
  *)
    echo "usage: bash $0 setup | start FLAGS | state | log | stop" >&2
    exit 2
    ;;
esac
