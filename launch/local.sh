#!/usr/bin/env bash
# Runs a config on this machine, on CPU or its GPUs; starts it again when it was stopped or killed.
#
#   launch/local.sh [-n PROCESSES] [-d CPU_DEVICES] [-r RESTARTS] CONFIG [a.b=value ...]
#
#   -n  processes; 1 by default. GPUs (those of CUDA_VISIBLE_DEVICES, if it is set) are dealt out evenly.
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
gpus=()
if [[ ${JAX_PLATFORMS:-} != cpu && $processes -gt 1 ]]; then
  if [[ -n ${CUDA_VISIBLE_DEVICES+set} ]]; then
    # -1 is how all of them are hidden.
    [[ $CUDA_VISIBLE_DEVICES == -1 ]] || IFS=, read -ra gpus <<< "$CUDA_VISIBLE_DEVICES"
  elif command -v nvidia-smi > /dev/null; then
    while read -r; do
      gpus+=("${#gpus[@]}")
    done < <(nvidia-smi -L)
  fi
  if ((${#gpus[@]} % processes)); then
    echo "local: ${#gpus[@]} GPUs cannot be dealt out evenly to $processes processes; take another -n" >&2
    exit 2
  fi
fi

# A port that is free, and the one after it. Not of those that the kernel gives to whoever connects somewhere: between
# now and when process 0 listens, such a port is soon taken.
free_port() {
  "${PYTHON:-python3}" -c '
import pathlib, random, socket
kernel = pathlib.Path("/proc/sys/net/ipv4/ip_local_port_range")
first = int(kernel.read_text().split()[0]) if kernel.is_file() else 32768
while True:
    port = random.randrange(10000, max(first, 10100) - 1)
    try:
        for number in port, port + 1:
            with socket.socket() as one:
                one.bind(("127.0.0.1", number))
    except OSError:
        continue
    print(port)
    break'
}

children=() statuses=() stopping='' interrupted=''
# A signal may come when there are no children yet, or some of them no more.
stop() { [[ ${#children[@]} -eq 0 ]] || kill -TERM "${children[@]}" 2> /dev/null || true; }
trap 'stopping=yes interrupted=yes; stop' TERM INT

start() {
  local i share=$((${#gpus[@]} / processes))
  children=()
  if [[ $processes -gt 1 ]]; then
    JAXALIGN_COORDINATOR=127.0.0.1:$(free_port)
    export JAXALIGN_COORDINATOR JAXALIGN_PROCESSES=$processes
  fi
  [[ -z $stopping ]] || exit 143
  for ((i = 0; i < processes; i++)); do
    (
      [[ $processes -eq 1 ]] || export JAXALIGN_PROCESS=$i
      if ((share)); then
        CUDA_VISIBLE_DEVICES=$(IFS=, && echo "${gpus[*]:i * share:share}")
        export CUDA_VISIBLE_DEVICES
      fi
      exec "$here/worker.sh" "$@"
    ) &
    children+=($!)
  done
  [[ -z $stopping ]] || stop
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
