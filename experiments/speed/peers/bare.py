# SPDX-License-Identifier: Apache-2.0
"""The matrix products of decoding and nothing else, in one jitted loop.

For as many steps of all rows as the wanted tokens fill, the product of every
weight: no attention, norms, rotations, draws or cache, and no row that idles.
Devices that share rows, or weights, do as in the sampler.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np

from experiments.speed import points, serving
from lapo_jax import sharding
from lapo_jax.models import qwen2


class Peer:
  """The products of the point's model."""

  libraries = ('jax', 'jaxlib')

  def __init__(self, folder: str, work: points.Work):
    jax.config.update('jax_num_cpu_devices', work.data * work.tensor)
    mesh = sharding.make_mesh(data=work.data, fsdp=1, tensor=work.tensor)
    params = qwen2.load(folder, qwen2.make(folder))
    layers = [weights(params[name]) for name in sorted(params)
              if name.startswith('layers_')]
    embedding = params['embedding']
    start = embedding[np.arange(work.rows) % len(embedding)]
    steps = -(-int(work.lengths.sum()) // work.rows)
    self._loop, places = make_loop(mesh, len(layers), steps)
    self._arguments = jax.device_put((layers, embedding.T, start), places)

  def run(self, seed: int) -> dict[str, Any]:
    """The loop."""
    self._loop(*self._arguments).block_until_ready()
    return {'facts': {}}

  def compared(self, result: dict[str, Any]) -> None:
    """It samples nothing."""


def weights(layer: dict[str, Any]) -> tuple[jax.Array, ...]:
  """Of a layer's four products, those of one input side by side."""
  attention, mlp = layer['attention'], layer['mlp']
  beside = lambda part, *names: jnp.concatenate(
      [part[name]['kernel'] for name in names], axis=1)
  return (beside(attention, 'query', 'key', 'value'),
          beside(attention, 'out'), beside(mlp, 'gate', 'up'),
          beside(mlp, 'down'))


def make_loop(mesh: jax.sharding.Mesh, layers: int, steps: int) -> Any:
  """The loop of weights, unembedding and rows; and where these lie."""
  # A product's sum is over rows that the one before has cut.
  columns, rows = PartitionSpec(None, 'tensor'), PartitionSpec('tensor')
  cut = ([(columns, rows, columns, rows)] * layers, columns,
         PartitionSpec('data'))
  loop = jax.jit(jax.shard_map(
      functools.partial(_loop, steps=steps), mesh=mesh, in_specs=cut,
      out_specs=cut[2], check_vma=False))
  return loop, jax.tree.map(
      lambda spec: NamedSharding(mesh, spec), cut,
      is_leaf=lambda x: isinstance(x, PartitionSpec))


def _loop(weights: list, unembedding: jax.Array, start: jax.Array, *,
          steps: int) -> jax.Array:
  """[B, D] after the steps."""
  together = lambda x: jax.lax.psum(x, 'tensor')

  def step(_, carried):
    x = start + carried
    for qkv, out, gate_up, down in weights:
      heads = x @ qkv
      x = heads[:, :out.shape[0]] @ out
      # Unused columns would be cut from their product.
      x = together(x + jnp.max(heads[:, out.shape[0]:], axis=1, keepdims=True))
      wide = x @ gate_up
      x = together((wide[:, :down.shape[0]] + wide[:, down.shape[0]:]) @ down)
    logits = x @ unembedding
    highest = jax.lax.pmax(jnp.max(logits, axis=1, keepdims=True), 'tensor')
    # Each step waits for the one before.
    return 1e-6 * jnp.tanh(x + highest)

  return jax.lax.fori_loop(0, steps, step, jnp.zeros_like(start))


if __name__ == '__main__':
  serving.serve(Peer)
