#!/usr/bin/env bash
# Runs a config on TPU node pools of a GKE cluster with JobSet.
#
#   launch/gke.sh --name NAME --image IMAGE --bucket gs://BUCKET/runs [option ...] CONFIG [a.b=value ...]
#
#   --accelerator KIND    node label of the TPU, tpu-v5-lite-podslice by default
#   --topology AxB[xC]    of a slice, 4x4 by default
#   --machines N          that make up a slice, 4 by default (chips of the topology / chips of a machine)
#   --chips N             of one machine, 4 by default
#   --account NAME        Kubernetes service account that may write to the bucket, default by default
#   --dry-run             print what would be applied
# shellcheck disable=SC2016 # what stands in single quotes is for somebody else to expand
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

usage() {
  sed -n '2,12s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
  [[ $# -eq 0 ]] || echo "gke: $1" >&2
  exit 2
}

name='' image='' bucket='' accelerator=tpu-v5-lite-podslice topology=4x4 machines=4 chips=4 account=default dry=''
while [[ $# -gt 0 ]]; do
  case $1 in
    --name | --image | --bucket | --accelerator | --topology | --machines | --chips | --account)
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
    printf '%s\n' "${line//'${ACCOUNT}'/$account}"
  done < "$here/gke_jobset.yaml"
}

if [[ -n $dry ]]; then
  fill "$@"
  exit
fi
kubectl create configmap "$name-config" --from-file=config.yaml="$config" --dry-run=client --output yaml | kubectl apply -f -
fill "$@" | kubectl apply -f -
echo "gke: applied; JobSet starts it again after a preemption. Following the first machine (Ctrl-C leaves it running)" >&2
selector=jobset.sigs.k8s.io/jobset-name=$name,batch.kubernetes.io/job-completion-index=0
kubectl wait --for=condition=Ready pod --selector "$selector" --timeout="${JAXALIGN_WAIT:-24h}"
kubectl logs --follow --selector "$selector" --tail=-1
