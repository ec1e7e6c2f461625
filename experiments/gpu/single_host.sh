#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# The command on this host, started again until it is done:
#
#   experiments/gpu/single_host.sh [--dry-run] [--tries=100] \
#     --config=configs/lapo_r1_1p5b.py --workdir=runs/r1 …
#
# A run that ends by an error goes on from its last checkpoint. One that is
# refused (status 2) is not tried again: the line above says what to change.
set -euo pipefail

dry='' tries=100
while (($#)); do
  case $1 in
    --dry-run) dry=yes ;;
    --tries=*) tries=${1#*=} ;;
    *) break ;;
  esac
  shift
done
if (($# == 0)); then
  echo 'expected the flags of lapo_jax.main, such as --config and --workdir' >&2
  exit 2
fi

cd "$(dirname "$0")/../.."
command=("${PYTHON:-python}" -m lapo_jax.main "$@")
if [[ $dry ]]; then
  printf '%q ' "${command[@]}"
  echo
  exit
fi
for ((try = 1; try <= tries; try++)); do
  status=0
  "${command[@]}" || status=$?
  if ((status == 0 || status == 2)); then
    exit "$status"
  fi
  echo "ended with status $status, try $try of $tries" >&2
  sleep "${PAUSE:-10}"
done
# Not a signal's: that would say that this script was ended, not the run.
exit "$((status < 128 ? status : 1))"
