#!/usr/bin/env bash
# Runs a config on a Cloud TPU slice: gets the slice, installs on all its machines, starts, follows, restarts.
#
#   launch/tpu_vm.sh --name NAME --zone ZONE --type v5p-16 --bucket gs://BUCKET/runs [option ...] CONFIG [a.b=value ...]
#
#   --project PROJECT     otherwise gcloud's own
#   --runtime VERSION     of the TPU's software; by default what fits --type
#   --spot                a spot slice: cheaper, and recreated when it is taken away
#   --restarts N          how often to start again after a preemption or a crash, 20 by default
#   --wait SECONDS        how long to stand in the queue for the slice, 86400 by default
#   --delete              delete the slice when all is over; without it, it stays, and costs
#
# The same command again goes on where the run is: it takes up the slice, follows a run that is under way, or continues
# from the last checkpoint in the bucket.
# shellcheck disable=SC2016 # what stands in single quotes is for somebody else to expand
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/restarts.sh
source "$here/restarts.sh"

usage() {
  sed -n '2,15s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
  [[ $# -eq 0 ]] || echo "tpu_vm: $1" >&2
  exit 2
}

name='' zone='' type='' bucket='' runtime='' project=() spot=() restarts=20 patience=86400 delete=''
while [[ $# -gt 0 ]]; do
  case $1 in
    --name | --zone | --type | --bucket | --project | --runtime | --restarts | --wait)
      [[ $# -gt 1 ]] || usage "$1 needs a value"
      ;;&
    --name) name=$2 && shift 2 ;;
    --zone) zone=$2 && shift 2 ;;
    --type) type=$2 && shift 2 ;;
    --bucket) bucket=${2%/} && shift 2 ;;
    --project) project=(--project "$2") && shift 2 ;;
    --runtime) runtime=$2 && shift 2 ;;
    --restarts) restarts=$2 && shift 2 ;;
    --wait) patience=$2 && shift 2 ;;
    --spot) spot=(--spot) && shift ;;
    --delete) delete=yes && shift ;;
    -*) usage "$1: no such option" ;;
    *) break ;;
  esac
done
[[ -n $name && -n $zone && -n $type ]] || usage '--name, --zone and --type are needed'
[[ $bucket == gs://* ]] || usage '--bucket gs://BUCKET/FOLDER is needed: the machines of a slice share no disk'
[[ $# -gt 0 ]] || usage 'CONFIG is needed'
[[ $restarts =~ ^[0-9]+$ && $patience =~ ^[0-9]+$ ]] || usage '--restarts and --wait are whole numbers'
config=$1 && shift
[[ -f $config ]] || usage "$config: no such file"
poll=${JAXALIGN_POLL:-20}

say() { echo "tpu_vm: $*" >&2; }

default_runtime() {
  case $type in
    v6e-*) echo v2-alpha-tpuv6e ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v5litepod-* | v5e-*) echo v2-alpha-tpuv5-lite ;;
    *) echo tpu-ubuntu2204-base ;;
  esac
}
[[ -n $runtime ]] || runtime=$(default_runtime)

queued() {
  local verb=$1
  shift
  gcloud compute tpus queued-resources "$verb" "$name" --zone "$zone" "${project[@]}" "$@"
}

# on WHICH COMMAND: runs it on one of the slice's machines, or on all.
on() {
  gcloud compute tpus tpu-vm ssh "$name" --zone "$zone" "${project[@]}" --worker="$1" --command="$2"
}

# The queue's state, NONE where there is no such request. Any other failure (no login, no such project) ends the script.
queue_state() {
  local answer
  if answer=$(queued describe --format='value(state.state)' 2>&1); then
    echo "${answer##*$'\n'}"
  elif grep -qi 'not.found' <<< "$answer"; then
    echo NONE
  else
    echo "$answer" >&2
    return 1
  fi
}

node_state() {
  gcloud compute tpus tpu-vm describe "$name" --zone "$zone" "${project[@]}" --format='value(state)' 2> /dev/null ||
    echo NONE
}

remove() {
  say "deleting $name"
  queued delete --force --quiet
}

create() {
  say "asking for a $type in $zone"
  queued create --node-id "$name" --accelerator-type "$type" --runtime-version "$runtime" "${spot[@]}" ||
    {
      say "the request was refused, see above; nothing was created. Quotas: https://cloud.google.com/tpu/docs/quota"
      exit 1
    }
}

# Returns when the slice is there and ready: the one that is, or a new one.
ensure() {
  local state node begun=$SECONDS
  while :; do
    state=$(queue_state) || exit 1
    case $state in
      NONE) create ;;
      SUSPENDED | FAILED) remove ;;
      ACTIVE)
        node=$(node_state)
        case $node in
          READY) return ;;
          PREEMPTED | TERMINATED | STOPPED | FAILED | NONE)
            say "the slice is $node"
            remove
            continue
            ;;
        esac
        ;;
    esac
    if ((SECONDS - begun > patience)); then
      say "the slice did not come within $patience s (it is ${node:-$state}); the request stays in the queue"
      exit 1
    fi
    sleep "$poll"
  done
}

# The repository as it is now, committed or not, without what git ignores: later starts run the same.
pack=$(mktemp -d)
trap 'rm -rf "$pack"' EXIT
trap 'exit 130' INT
(cd "$here/.." && git ls-files -z --cached --others --exclude-standard |
  tar --null --ignore-failed-read --files-from=- -czf "$pack/jaxalign.tgz")
cp "$config" "$pack/jaxalign.yaml"

install() {
  say "installing on all machines"
  gcloud compute tpus tpu-vm scp "$pack/jaxalign.tgz" "$pack/jaxalign.yaml" "$name:" --zone "$zone" "${project[@]}" \
    --worker=all && on all "$INSTALL"
}

# What the machines run. A run that is under way is left alone, and so is its installation.
RUNNING='[ -s run.pid ] && kill -0 "$(cat run.pid)" 2> /dev/null'
# The machines' own Python may be older than jaxalign wants: uv brings one.
INSTALL="$RUNNING || { rm -rf jaxalign-src .jaxalign && mkdir jaxalign-src && tar -xzf jaxalign.tgz -C jaxalign-src &&
  python3 -m pip install --quiet --user uv && .local/bin/uv venv --quiet --python 3.12 .jaxalign &&
  .local/bin/uv pip install --quiet --python .jaxalign/bin/python --constraint jaxalign-src/constraints.txt \
    './jaxalign-src[tpu,gcs]'; }"
# Detached: it goes on when this machine, or the connection to it, does not. In the repository, as paths in a config are.
printf -v quoted '%q ' ../jaxalign.yaml "runs_dir=$bucket" "$@"
START="if $RUNNING; then echo \"under way\"; else rm -f run.status
PATH=\$HOME/.jaxalign/bin:\$PATH JAXALIGN_PROCESSES=auto nohup setsid \
bash -c 'echo \$\$ > run.pid; (cd jaxalign-src && launch/worker.sh \"\$@\"); echo \$? > run.status' run $quoted\
> run.log 2>&1 < /dev/null & sleep 2; fi"
# Process 0 logs for all; errors of the others are in their own run.log.
FOLLOW="tail -n LINES -F run.log & t=\$!; while $RUNNING; do sleep 2; done; sleep 2; kill \$t"
STATUS="if $RUNNING; then tail -n 3 run.log; echo \"running\"
elif [ -s run.status ]; then echo \"ended \$(cat run.status)\"; else echo \"gone\"; fi"
STOP="if $RUNNING; then kill -KILL -- \"-\$(cat run.pid)\"; fi"

# Starts and follows; gives what the worst of the machines ended with, 75 where one of them does not say.
once() {
  local workers answers statuses lines=+1 i
  workers=$(gcloud compute tpus tpu-vm describe "$name" --zone "$zone" "${project[@]}" \
    --format='value(networkEndpoints.len())') || return 75
  answers=$(on all "$START") || return 75
  # The connection was lost, the run was not: that start is not counted.
  if ((attempt > 0)) && [[ $(grep -c '^under way$' <<< "$answers") -eq $workers ]]; then
    attempt=$((attempt - 1))
  fi
  while :; do
    on 0 "${FOLLOW/LINES/$lines}" || true
    answers=$(on 0 "$STATUS") || return 75
    [[ $answers == *running ]] || break
    lines=10
    sleep "$poll"
  done
  # The others end within a minute of the first, or hang.
  for ((i = 0; i < ${JAXALIGN_TRIES:-30}; i++)); do
    answers=$(on all "$STATUS") || return 75
    grep -q '^running$' <<< "$answers" || break
    sleep "$poll"
  done
  if grep -q '^running$' <<< "$answers"; then
    say "a machine still runs though the first has ended: its process is killed"
    on all "$STOP" || true
  fi
  mapfile -t statuses < <(sed -n 's/^ended \([0-9]*\)$/\1/p' <<< "$answers")
  ((${#statuses[@]} == workers)) || statuses+=(75)
  return "$(worst "${statuses[@]}")"
}

for ((attempt = 0; ; attempt++)); do
  ensure
  status=0
  if install; then
    once || status=$?
  else
    status=75
  fi
  if ! again "$status" || ((attempt >= restarts)); then
    break
  fi
  say "ended with status $status, starting again ($((attempt + 1)) of $restarts)"
  sleep "$poll"
done
say "ended with status $status; the run is in $bucket"
if [[ -n $delete ]]; then
  remove
else
  say "the slice stays; to delete it: gcloud compute tpus queued-resources delete $name --zone $zone --force"
fi
exit "$status"
