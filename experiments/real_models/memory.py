# SPDX-License-Identifier: Apache-2.0
"""How much memory does loading take, against the checkpoint's size?

  python -m experiments.real_models.memory

Writes a random Qwen2 of 0.56 billion parameters to a temporary folder, in
float32 and in bfloat16, loads each in fresh processes on the CPU and prints a
table; Linux, 5 GB of disk, two minutes. "Peak" is the process's highest
resident memory less what it had before loading; "above the final" is what
loading needs beside what stays, "saving above" what saving does.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from lapo_jax import sharding
from lapo_jax.models import qwen2

# The shares of embeddings and layers are about those of the 1.5B models.
_FIELDS = dict(vocab_size=64000, width=1024, num_layers=28, num_heads=16,
               num_kv_heads=4, mlp_width=4096, tied=False)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--load', help='a folder, in a process of its own')
  parser.add_argument('--param_dtype', default='float32')
  flags = parser.parse_args()
  if flags.load:
    print(json.dumps(measure(flags.load, flags.param_dtype)))
    return
  print('| checkpoint | parameters | devices | checkpoint GB | seconds | '
        'peak / checkpoint | above the final / checkpoint | saving above / '
        'checkpoint |')
  print('|---|---|---|---|---|---|---|---|')
  for stored in ('float32', 'bfloat16'):
    with tempfile.TemporaryDirectory() as folder:
      write(folder, stored)
      for held in (stored, 'float32')[:1 if stored == 'float32' else 2]:
        for devices in (1, 8):
          found = _in_process(folder, held, devices)
          size = found['size']
          print(f'| {stored} | {held} | {devices} | {size / 1e9:.2f} | '
                f'{found["seconds"]:.1f} | '
                f'{(found["peak"] - found["before"]) / size:.2f} | '
                f'{(found["peak"] - found["after"]) / size:.2f} | '
                f'{(found["saving"] - found["after"]) / size:.2f} |',
                flush=True)


def write(folder: str, dtype: str) -> None:
  """A random model whose numbers are in (−1, 1)."""
  model = qwen2.Model(**_FIELDS, param_dtype=jnp.dtype(dtype))
  rng = np.random.default_rng(0)
  shapes = flax.traverse_util.flatten_dict(qwen2.init_shapes(model), sep='/')
  params = {path: (rng.random(leaf.shape, np.float32) - 0.5).astype(leaf.dtype)
            for path, leaf in shapes.items()}
  qwen2.save(flax.traverse_util.unflatten_dict(params, sep='/'), folder, model)


def measure(folder: str, param_dtype: str) -> dict[str, float]:
  """Loads onto all devices; bytes before, at the peak and after."""
  model = qwen2.make(folder, param_dtype=param_dtype)
  mesh = sharding.make_mesh()
  shapes = qwen2.init_shapes(model)
  shardings = sharding.partition(qwen2.PARTITION_RULES, shapes, mesh)
  jax.block_until_ready(jax.device_put(np.zeros(8), jax.devices()[0]))
  before = _status('VmRSS')
  started = time.monotonic()
  params = jax.block_until_ready(qwen2.load(folder, model, shardings))
  seconds = time.monotonic() - started
  found = {'size': pathlib.Path(folder, 'model.safetensors').stat().st_size,
           'before': before, 'peak': _status('VmHWM'),
           'after': _status('VmRSS'), 'seconds': seconds}
  pathlib.Path('/proc/self/clear_refs').write_text('5')  # forgets the peak
  with tempfile.TemporaryDirectory() as out:
    qwen2.save(params, out, model)
  return {**found, 'saving': _status('VmHWM')}


def _status(name: str) -> int:
  text = pathlib.Path('/proc/self/status').read_text()
  return 1024 * int(text.partition(f'{name}:')[2].split()[0])


def _in_process(folder: str, param_dtype: str, devices: int) -> dict:
  done = subprocess.run(
      [sys.executable, '-m', 'experiments.real_models.memory',
       f'--load={folder}', f'--param_dtype={param_dtype}'],
      env={**os.environ, 'JAX_PLATFORMS': 'cpu',
           'JAX_NUM_CPU_DEVICES': str(devices)},
      check=True, capture_output=True, text=True)
  return json.loads(done.stdout.splitlines()[-1])


if __name__ == '__main__':
  main()
