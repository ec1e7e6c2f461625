# SPDX-License-Identifier: Apache-2.0
# shellcheck shell=bash disable=SC2153
# What a TPU VM does when it starts, as root: queued_resource.sh puts BUCKET,
# CODE, ENDED and FLAGS (an array) in front and sends it to every host.
set -euo pipefail
export HOME=/root DEBIAN_FRONTEND=noninteractive
work=/opt/lapo_jax

# The bucket as a folder that all hosts see alike: nothing is remembered of
# what another one may have changed.
if ! command -v gcsfuse > /dev/null; then
  keys=/usr/share/keyrings/cloud.google.asc
  curl -fsSL https://packages.cloud.google.com/apt/doc/apt-key.gpg > "$keys"
  echo "deb [signed-by=$keys] https://packages.cloud.google.com/apt" \
    "gcsfuse-$(lsb_release -cs) main" > /etc/apt/sources.list.d/gcsfuse.list
  apt-get update -q
  apt-get install -qy gcsfuse
fi
mkdir -p /bucket "$work"
mountpoint -q /bucket || gcsfuse --implicit-dirs --metadata-cache-ttl-secs=0 \
  "$BUCKET" /bucket

# The code, under a Python that is new enough.
gcloud storage cat "$CODE" | tar -xz -C "$work"
if ! [[ -x $work/venv/bin/python ]]; then
  curl -fsSL https://astral.sh/uv/install.sh | sh
  "$HOME/.local/bin/uv" venv --python=3.11 "$work/venv"
  "$HOME/.local/bin/uv" pip install --python="$work/venv" "${work}[tpu]"
fi

# The hosts find one another by what the VM's metadata says.
status=0
PYTHON=$work/venv/bin/python bash "$work/experiments/gpu/single_host.sh" \
  "${FLAGS[@]}" || status=$?
# Above 128 the VM itself is being ended, and the slice comes again.
if ((status && status < 128)); then
  mkdir -p "$(dirname "$ENDED")"
  echo "$status" > "$ENDED"
fi
