#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# A run on a TPU slice by a queued resource, asked for again after each
# preemption until the run is done:
#
#   experiments/tpu/queued_resource.sh [--dry-run] --name=r1 \
#     --zone=us-west4-a --type=v5litepod-16 --runtime=v2-alpha-tpuv5-lite \
#     --bucket=my-bucket [--spot] -- \
#     --config=configs/lapo_r1_1p5b.py --workdir=/bucket/runs/r1 …
#
# The bucket is the folder /bucket on every host; what the run needs (model,
# problems) lies there too. Runs here, on any machine with gcloud, and may be
# stopped and started again. Commit first: what is sent is HEAD.
set -euo pipefail

dry='' name='' zone='' type='' runtime='' bucket='' tier=()
while (($#)); do
  case $1 in
    --dry-run) dry=yes ;;
    --name=*) name=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --type=*) type=${1#*=} ;;
    --runtime=*) runtime=${1#*=} ;;
    --bucket=*) bucket=${1#*=} ;;
    --spot) tier=(--spot) ;;
    --) shift && break ;;
    *) echo "unknown option $1" >&2 && exit 2 ;;
  esac
  shift
done
workdir=''
for flag in "$@"; do
  [[ $flag == --workdir=* ]] && workdir=${flag#*=}
done
if ! [[ $name && $zone && $type && $runtime && $bucket ]] ||
    [[ $workdir != /bucket/* ]]; then
  echo 'expected --name, --zone, --type, --runtime and --bucket, then -- and' \
    'the flags of lapo_jax.main with a --workdir=/bucket/…' >&2
  exit 2
fi

here=$(cd "$(dirname "$0")" && pwd)
code=gs://$bucket/code/$name.tar.gz
folder=gs://$bucket/${workdir#/bucket/}
files=$(mktemp -d)
trap 'rm -rf "$files"' EXIT
{
  echo '#!/usr/bin/env bash'
  printf 'BUCKET=%q CODE=%q ENDED=%q\n' "$bucket" "$code" "$workdir.ended"
  printf 'FLAGS=('
  printf '%q ' "$@"
  printf ')\n'
  cat "$here/host.sh"
} > "$files/startup.sh"

run() {
  if [[ $dry ]]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}
resource() { # verb, options …
  local verb=$1
  shift
  run gcloud compute tpus queued-resources "$verb" "$name" --zone="$zone" "$@"
}
create() {
  resource create --node-id="$name" --accelerator-type="$type" \
    --runtime-version="$runtime" \
    --scopes=https://www.googleapis.com/auth/cloud-platform \
    --metadata-from-file=startup-script="$files/startup.sh" "${tier[@]}"
}
delete() {
  resource delete --force --quiet
}

run git -C "$here/../.." archive --format=tar.gz \
  --output="$files/code.tar.gz" HEAD
run gcloud storage cp "$files/code.tar.gz" "$code"
if [[ $dry ]]; then
  create
  resource describe '--format=value(state.state)'
  run gcloud storage ls "$folder/summary.json"
  delete
  printf '\n%s\n' 'The start-up script of each host:'
  cat "$files/startup.sh"
  exit
fi

gcloud storage rm "$folder.ended" 2> /dev/null || true
while true; do
  state=$(resource describe '--format=value(state.state)' 2> /dev/null) ||
    state=NONE
  if gcloud storage ls "$folder/summary.json" &> /dev/null; then
    echo "done: $folder"
    [[ $state == NONE ]] || delete
    exit
  fi
  if status=$(gcloud storage cat "$folder.ended" 2> /dev/null); then
    echo "ended with status $status; the hosts' logs say why" >&2
    [[ $state == NONE ]] || delete
    exit 1
  fi
  case $state in
    NONE) create ;;
    SUSPENDED | FAILED) # preempted: it does not come back by itself
      delete
      create
      ;;
  esac
  sleep 60
done
