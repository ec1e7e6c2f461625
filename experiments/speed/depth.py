# SPDX-License-Identifier: Apache-2.0
"""How long the update takes to compile, by the number of layers.

  python -m experiments.speed.depth [--topology=v5e:2x2]

Compiles the update of a narrow model, AdamW's part in it, with the layers in
turn and in one loop over stacked parameters (`updates.scan_layers`), and
prints its size and the CPU seconds that it took. Nothing is computed. For a
TPU topology libtpu is needed, as for `lapo_jax.plan`, and no TPU.
"""

import argparse
import datetime
import os
import time
from typing import Any

import jax
import jax.numpy as jnp
import optax

from experiments.speed import memory
from lapo_jax import grpo, plan, sharding, stacking, types
from lapo_jax.models import qwen2

_LENGTH = 1024


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--layers', default='2,28')
  parser.add_argument('--topology', default='', help='of TPUs; this CPU')
  flags = parser.parse_args()
  os.environ.update(plan.ENVIRONMENT)
  jax.config.update('jax_enable_compilation_cache', False)
  jax.config.update('jax_platforms', 'cpu')
  print(f'{datetime.date.today()}, jax {jax.__version__}, '
        f'{flags.topology or "CPU"}\n')
  print('| layers | in one loop | lines of the program | lowered in, CPU s | '
        'compiled in, CPU s |\n|---|---|---|---|---|')
  for scanned in (False, True):
    for num_layers in map(int, flags.layers.split(',')):
      lines, *seconds = measure(num_layers, scanned, flags.topology)
      print(f'| {num_layers} | {"yes" if scanned else "no"} | {lines:,} | '
            + ' | '.join(f'{spent:.1f}' for spent in seconds) + ' |',
            flush=True)


def measure(num_layers: int, scanned: bool,
            topology: str = '') -> tuple[int, float, float]:
  """(lines, CPU seconds to lower, to compile) of one update."""
  model = memory.MODEL.clone(num_layers=num_layers, remat='full',
                             dtype=jnp.bfloat16 if topology else jnp.float32)
  optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-6))
  arguments, places = _arguments(model, optimizer, scanned, topology)
  update = grpo.make_update_fn(model, optimizer, temperature=1.0,
                               microbatch_size=1, shardings=places)
  began = time.process_time()
  lowered = update.lower(*arguments)
  ready = time.process_time()
  lowered.compile()
  return (len(lowered.as_text().splitlines()), ready - began,
          time.process_time() - ready)


def _arguments(model: Any, optimizer: Any, scanned: bool,
               topology: str) -> tuple[Any, Any]:
  """((state, batch) of shapes, their shardings)."""
  if topology:
    from jax.experimental import topologies
    devices = topologies.get_topology_desc(
        platform='tpu', topology_name=topology).devices[:1]
  else:
    devices = jax.devices()[:1]
  mesh = sharding.make_mesh(devices=devices)
  params = qwen2.init_shapes(model)
  if scanned:
    params = stacking.shapes(model, params)
  scalar = jax.ShapeDtypeStruct((), jnp.int32)
  state = types.TrainState(
      step=scalar, stage=scalar, nonfinite=scalar, params=params,
      opt_state=jax.eval_shape(optimizer.init, params), reward_state=())
  # One device has it all.
  everywhere = jax.tree.map(lambda _: sharding.replicated(mesh), state)
  return (state, memory.batch(_LENGTH)), (everywhere, sharding.batch(mesh))


if __name__ == '__main__':
  main()
