#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# A run on one or several TPU slices of a GKE cluster, by xpk; the JobSet is
# started again after a preemption or a failure:
#
#   experiments/tpu/gke.sh [--dry-run] --name=r1 --cluster=my-cluster \
#     --project=my-project --zone=us-west4-a --type=v5litepod-16 \
#     [--slices=1] [--restarts=100] [--attach=my-bucket] -- \
#     --config=configs/lapo_r1_1p5b.py --workdir=/bucket/runs/r1 …
#
# --attach makes the bucket the folder /bucket of every workload; a cluster
# needs that once. Runs here, where xpk, kubectl and docker are.
set -euo pipefail

dry='' name='' cluster='' project='' zone='' type='' slices=1 restarts=100
attach=''
while (($#)); do
  case $1 in
    --dry-run) dry=yes ;;
    --name=*) name=${1#*=} ;;
    --cluster=*) cluster=${1#*=} ;;
    --project=*) project=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --type=*) type=${1#*=} ;;
    --slices=*) slices=${1#*=} ;;
    --restarts=*) restarts=${1#*=} ;;
    --attach=*) attach=${1#*=} ;;
    --) shift && break ;;
    *) echo "unknown option $1" >&2 && exit 2 ;;
  esac
  shift
done
if ! [[ $name && $cluster && $project && $zone && $type ]] || (($# == 0)); then
  echo 'expected --name, --cluster, --project, --zone and --type, then -- and' \
    'the flags of lapo_jax.main' >&2
  exit 2
fi

run() {
  if [[ $dry ]]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}
place=(--cluster="$cluster" --project="$project" --zone="$zone")
if [[ $attach ]]; then
  run xpk storage attach "$attach" --type=gcsfuse --bucket="$attach" \
    --mount-point=/bucket --auto-mount=true --readonly=false --size=1024 \
    "${place[@]}"
fi
printf -v command '%q ' python -m lapo_jax.main "$@"
# xpk puts the code into the image, above this base.
run xpk workload create --workload="$name" "${place[@]}" --tpu-type="$type" \
  --num-slices="$slices" --max-restarts="$restarts" \
  --restart-on-user-code-failure --termination-grace-period-seconds=120 \
  --base-docker-image=python:3.12 --script-dir="$(dirname "$0")/../.." \
  --command="pip install --quiet '.[tpu]' && exec $command"
