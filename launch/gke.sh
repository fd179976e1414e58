#!/usr/bin/env bash
# Runs a config on TPU node pools of a GKE cluster with JobSet.
#
#   launch/gke.sh --name NAME --image IMAGE --bucket gs://BUCKET/runs [option ...] CONFIG [a.b=value ...]
#
#   --accelerator KIND    node label of the TPU, tpu-v5-lite-podslice by default
#   --topology AxB[xC]    of a slice, 4x4 by default
#   --machines N          that make up a slice, 4 by default (chips of the topology / chips of a machine)
#   --slices N            that make up the run, 1 by default; each needs a node pool of its own
#   --chips N             of one machine, 4 by default
#   --account NAME        Kubernetes service account that may write to the bucket, default by default
#   --dry-run             print what would be applied
#
# Follows the first machine until the run is over; the exit status is 0 where it completed, 1 where it failed.
# shellcheck disable=SC2016 # what stands in single quotes is for somebody else to expand
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

poll=${JAXALIGN_POLL:-10}

say() { echo "gke: $*" >&2; }

usage() {
  sed -n '2,14s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
  [[ $# -eq 0 ]] || echo "gke: $1" >&2
  exit 2
}

name='' image='' bucket='' accelerator=tpu-v5-lite-podslice topology=4x4 machines=4 slices=1 chips=4 account=default dry=''
while [[ $# -gt 0 ]]; do
  case $1 in
    --name | --image | --bucket | --accelerator | --topology | --machines | --slices | --chips | --account)
      [[ $# -gt 1 ]] || usage "$1 needs a value"
      printf -v "${1#--}" '%s' "$2"
      shift 2
      ;;
    --dry-run) dry=yes && shift ;;
    -*) usage "$1: no such option" ;;
    *) break ;;
  esac
done
[[ -n $name && -n $image ]] || usage '--name and --image are needed'
[[ $bucket == gs://* ]] || usage '--bucket gs://BUCKET/FOLDER is needed: the machines of a slice share no disk'
[[ $machines =~ ^[1-9][0-9]*$ && $slices =~ ^[1-9][0-9]*$ ]] || usage '--machines and --slices are whole numbers'
[[ $# -gt 0 ]] || usage 'CONFIG is needed'
config=$1 && shift
[[ -f $config ]] || usage "$config: no such file"

# The JobSet with this run's names in it; arguments after CONFIG become arguments of the container.
fill() {
  local argument
  while IFS= read -r line; do
    if [[ $line == *'${OVERRIDES}'* ]]; then
      for argument in "runs_dir=$bucket" "$@"; do
        printf "%s- '%s'\n" "${line%%- *}" "${argument//\'/\'\'}"
      done
      continue
    fi
    line=${line//'${NAME}'/$name} line=${line//'${IMAGE}'/$image} line=${line//'${ACCELERATOR}'/$accelerator}
    line=${line//'${TOPOLOGY}'/$topology} line=${line//'${MACHINES}'/$machines} line=${line//'${CHIPS}'/$chips}
    line=${line//'${SLICES}'/$slices}
    printf '%s\n' "${line//'${ACCOUNT}'/$account}"
  done < "$here/gke_jobset.yaml"
}

if [[ -n $dry ]]; then
  fill "$@"
  exit
fi
kubectl create configmap "$name-config" --from-file=config.yaml="$config" --dry-run=client --output yaml | kubectl apply -f -
fill "$@" | kubectl apply -f -
say "applied; JobSet starts it again after a preemption. Following the first machine (Ctrl-C leaves it running)"
trap 'exit 130' INT
conditions='{range .status.conditions[?(@.status=="True")]}{.type}: {.message}{"\n"}{end}'
labels=jobset.sigs.k8s.io/jobset-name=$name,jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0
# Name, phase, and what a container that does not run waits for. After a restart it is another pod.
pods='{range .items[*]}{.metadata.name} {.status.phase} {.status.containerStatuses[*].state.waiting.reason}{"\n"}{end}'
followed='' told='' failures=0
while :; do
  if ! { over=$(kubectl get jobset "$name" --output "jsonpath=$conditions") &&
    first=$(kubectl get pods --selector "$labels" --sort-by=.metadata.creationTimestamp --output "jsonpath=$pods"); }; then
    if ((++failures > ${JAXALIGN_TRIES:-30})); then
      say "the cluster does not answer, see above; the run may go on. The same command follows it again"
      exit 1
    fi
    sleep "$poll"
    continue
  fi
  failures=0
  if ending=$(grep -E '^(Completed|Failed): ' <<< "$over"); then
    say "$ending. kubectl delete jobset $name removes it; its run is in $bucket"
    [[ $ending == Completed:* ]] && exit 0 || exit 1
  fi
  read -r pod phase waits <<< "${first##*$'\n'}" || true
  if [[ $pod == "$followed" && $phase == Running ]]; then
    kubectl logs --follow --tail=10 "$pod" || true
  elif [[ $pod != "$followed" && $phase =~ ^(Running|Succeeded|Failed)$ ]]; then
    followed=$pod
    kubectl logs --follow --tail=-1 "$pod" || true
  elif [[ (-z $pod || $pod != "$followed") && "$pod $phase $waits" != "$told" ]]; then
    told="$pod $phase $waits"
    say "${pod:-no pod yet} ${phase:-} ${waits:-}"
  fi
  sleep "$poll"
done
