#!/usr/bin/env bash
# Runs a config on this machine, on CPU or its GPUs; starts it again when it was stopped or killed.
#
#   launch/local.sh [-n PROCESSES] [-d CPU_DEVICES] [-r RESTARTS] CONFIG [a.b=value ...]
#
#   -n  processes; 1 by default. GPUs are dealt out evenly.
#   -d  CPU devices of each process, to try a layout without accelerators
#   -r  how often to start again, 3 by default
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/restarts.sh
source "$here/restarts.sh"

usage() {
  sed -n '2,8s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
  exit 2
}

processes=1 devices='' restarts=3
while getopts n:d:r: option; do
  case $option in
    n) processes=$OPTARG ;;
    d) devices=$OPTARG ;;
    r) restarts=$OPTARG ;;
    *) usage ;;
  esac
done
shift $((OPTIND - 1))
[[ $# -gt 0 && $processes =~ ^[1-9][0-9]*$ && $devices =~ ^[0-9]*$ && $restarts =~ ^[0-9]+$ ]] || usage

if [[ -n $devices ]]; then
  export JAX_PLATFORMS=cpu
  # Splits the host into several devices, as a slice of accelerators would be.
  export XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=$devices"
fi
gpus=0
if [[ ${JAX_PLATFORMS:-} != cpu && $processes -gt 1 ]] && command -v nvidia-smi > /dev/null; then
  gpus=$(nvidia-smi -L | wc -l)
  if ((gpus % processes)); then
    echo "local: $gpus GPUs cannot be dealt out evenly to $processes processes; take another -n" >&2
    exit 2
  fi
fi

# A port that is free now, and the one after it.
free_port() {
  "${PYTHON:-python3}" -c '
import socket
while True:
    with socket.socket() as one, socket.socket() as two:
        one.bind(("127.0.0.1", 0))
        try:
            two.bind(("127.0.0.1", one.getsockname()[1] + 1))
        except (OSError, OverflowError):
            continue
        print(one.getsockname()[1])
        break'
}

children=() statuses=() stopping='' interrupted=''
trap 'stopping=yes interrupted=yes; kill -TERM "${children[@]}" 2> /dev/null' TERM INT

start() {
  local i share
  children=()
  if [[ $processes -gt 1 ]]; then
    JAXALIGN_COORDINATOR=127.0.0.1:$(free_port)
    export JAXALIGN_COORDINATOR JAXALIGN_PROCESSES=$processes
  fi
  for ((i = 0; i < processes; i++)); do
    (
      [[ $processes -eq 1 ]] || export JAXALIGN_PROCESS=$i
      if ((gpus)); then
        share=$((gpus / processes))
        CUDA_VISIBLE_DEVICES=$(seq -s, $((i * share)) $((i * share + share - 1)))
        export CUDA_VISIBLE_DEVICES
      fi
      exec "$here/worker.sh" "$@"
    ) &
    children+=($!)
  done
}

# Waits for all, and leaves what they ended with in `statuses`; after a signal, which ends `wait` early, once more.
collect() {
  local child status
  statuses=()
  for child in "${children[@]}"; do
    while :; do
      interrupted='' status=0
      wait "$child" || status=$?
      [[ -n $interrupted ]] || break
    done
    statuses+=("$status")
  done
}

for ((attempt = 0; ; attempt++)); do
  start "$@"
  collect
  status=$(worst "${statuses[@]}")
  if [[ -n $stopping ]] || ! again "$status" || ((attempt >= restarts)); then
    exit "$status"
  fi
  echo "local: ended with status $status, starting again ($((attempt + 1)) of $restarts)" >&2
done
