# shellcheck shell=bash
# Sourced by the other scripts: one sentence for bad input, and commands that --dry-run only shows.

# The exit code of cfjax after a preemption: saved, start me again (EX_TEMPFAIL of sysexits.h).
# shellcheck disable=SC2034
readonly START_AGAIN=75

fail() {
  echo "error: $*" >&2
  exit 2
}

# show WORD ...: a command as one would type it.
show() {
  local word line="" quote="'" escaped="'\\''"
  for word; do
    if [[ ! $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]]; then
      word="'${word//"$quote"/"$escaped"}'"
    fi
    line+="${line:+ }$word"
  done
  printf '%s\n' "$line"
}

# run COMMAND ...: runs it, or shows it when `dry_run` is 1.
dry_run=0
run() {
  if ((dry_run)); then
    show "$@"
  else
    "$@"
  fi
}
