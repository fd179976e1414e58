#!/usr/bin/env bash
# One machine's share of a run: XLA's flags, a watch for the cloud's notice of preemption, then `jaxalign run`.
#
#   launch/worker.sh CONFIG [a.b=value ...]
#
# Every launcher starts this, on every machine. How the processes find each other comes from the environment (see
# docs/scale.md). The exit status is jaxalign's: 0 done, 1 or 2 mend something first, all else: start again.
set -euo pipefail

: "${PYTHON:=python3}"
: "${JAXALIGN_COMMAND:=jaxalign}"
: "${JAXALIGN_METADATA:=http://metadata.google.internal/computeMetadata/v1/instance}"

# The folder of an installed Python package, nothing where there is none. Finding it imports nothing.
package() {
  "$PYTHON" -c 'import importlib.util, sys
spec = importlib.util.find_spec(sys.argv[1])
print(next(iter(spec.submodule_search_locations or ()), "") if spec else "")' "$1" 2> /dev/null || true
}

# Whether the libraries in a folder know a flag: XLA ends a process that is given one it does not know.
knows() {
  local folder=$1 name=${2%%=*}
  name=${name#--}
  grep -rqaF --include='*.so' -- "$name" "$folder"
}

# Adds flags to a variable, before what is there: what the user set stays, and counts.
add_flags() {
  local variable=$1 folder=$2 flag
  shift 2
  for flag in "$@"; do
    if [[ ${!variable:-} == *"${flag%%=*}"* ]]; then
      continue
    elif knows "$folder" "$flag"; then
      printf -v "$variable" '%s' "$flag ${!variable:-}"
    else
      echo "worker: ${flag%%=*} is not known to $folder, left away" >&2
    fi
  done
  export "${variable?}"
}

set_flags() {
  local tpu cuda accelerated=''
  tpu=$(package libtpu)
  if [[ -n $tpu ]]; then
    accelerated=yes
    add_flags LIBTPU_INIT_ARGS "$tpu" \
      --xla_tpu_enable_async_collective_fusion_fuse_all_gather=true \
      --xla_tpu_enable_async_collective_fusion_multiple_steps=true \
      --xla_tpu_overlap_compute_collective_tc=true \
      --xla_tpu_enable_data_parallel_all_reduce_opt=true \
      --xla_tpu_data_parallel_opt_different_sized_ops=true \
      --xla_jf_spmd_threshold_for_windowed_einsum_mib=1000000
  fi
  for cuda in jax_plugins.xla_cuda13 jax_plugins.xla_cuda12; do
    cuda=$(package "$cuda")
    if [[ -n $cuda ]]; then
      accelerated=yes
      add_flags XLA_FLAGS "$cuda" \
        --xla_gpu_enable_latency_hiding_scheduler=true \
        --xla_gpu_enable_pipelined_all_gather=true \
        --xla_gpu_enable_pipelined_reduce_scatter=true
      export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}
      break
    fi
  done
  # XLA's CPU backend asks for a step's temporary memory anew in every step: in pages of 2 MiB the kernel hands it out
  # sooner, where it lets programs ask for them. Read by glibc alone.
  [[ -n $accelerated ]] || export GLIBC_TUNABLES=${GLIBC_TUNABLES-glibc.malloc.hugetlb=1}
}

ask() { curl -sf -m 3 -H 'Metadata-Flavor: Google' "$JAXALIGN_METADATA/$1" 2> /dev/null; }

# On Google Cloud: a notice that this machine goes away becomes the SIGTERM that jaxalign saves on.
watch_notice() {
  local child=$1
  [[ $(ask preempted) == FALSE || $(ask preempted) == TRUE ]] || return 0
  while kill -0 "$child" 2> /dev/null; do
    if [[ $(ask preempted) == TRUE || $(ask maintenance-event) == TERMINATE_ON_HOST_MAINTENANCE ]]; then
      echo "worker: this machine is being taken away, saving" >&2
      kill -TERM "$child" 2> /dev/null || true
      return 0
    fi
    sleep "${JAXALIGN_NOTICE_SECONDS:-2}"
  done
}

[[ $# -gt 0 ]] || {
  sed -n '2,7s/^# \{0,1\}//p' "$0" >&2
  exit 2
}
set_flags
child='' interrupted='' stopping=''
# A signal may come when there is no child yet, or none any more.
stop() { [[ -z $child ]] || kill -TERM "$child" 2> /dev/null || true; }
# Ctrl-C too: what a script starts in the background does not listen to SIGINT.
trap 'interrupted=yes stopping=yes; stop' TERM INT
"$JAXALIGN_COMMAND" run "$@" &
child=$!
[[ -z $stopping ]] || stop
watch_notice "$child" &
watcher=$!
# A signal ends `wait` before the child has ended: then wait again.
while :; do
  interrupted='' status=0
  wait "$child" || status=$?
  [[ -n $interrupted ]] || break
done
kill "$watcher" 2> /dev/null || true
exit "$status"
