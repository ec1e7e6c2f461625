# SPDX-License-Identifier: Apache-2.0
"""The matrix products of decoding and nothing else, in one jitted loop.

For as many steps of all rows as the wanted tokens fill, the product of every
weight: no attention, norms, rotations, draws or cache, and no row that idles.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.speed import points, serving
from lapo_jax.models import qwen2


class Peer:
  """The products of the point's model."""

  libraries = ('jax', 'jaxlib')

  def __init__(self, folder: str, work: points.Work):
    params = jax.device_put(qwen2.load(folder, qwen2.make(folder)))
    layers = [params[name] for name in sorted(params)
              if name.startswith('layers_')]
    self._weights = [weights(layer) for layer in layers]
    self._unembedding = jnp.array(params['embedding'].T)
    self._start = jnp.array(
        params['embedding'][np.arange(work.rows) % len(params['embedding'])])
    steps = -(-int(work.lengths.sum()) // work.rows)
    self._loop = jax.jit(functools.partial(_loop, steps=steps))

  def run(self, seed: int) -> dict[str, Any]:
    """The loop."""
    self._loop(self._weights, self._unembedding,
               self._start).block_until_ready()
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


def _loop(weights: list, unembedding: jax.Array, start: jax.Array, *,
          steps: int) -> jax.Array:
  """[B, D] after the steps."""

  def step(_, carried):
    x = start + carried
    for qkv, out, gate_up, down in weights:
      heads = x @ qkv
      x = heads[:, :out.shape[0]] @ out
      # Unused columns would be cut from their product.
      x = x + jnp.max(heads[:, out.shape[0]:], axis=1, keepdims=True)
      wide = x @ gate_up
      x = (wide[:, :down.shape[0]] + wide[:, down.shape[0]:]) @ down
    logits = x @ unembedding
    # Each step waits for the one before.
    return 1e-6 * jnp.tanh(x + jnp.max(logits, axis=1, keepdims=True))

  return jax.lax.fori_loop(0, steps, step, jnp.zeros_like(start))


if __name__ == '__main__':
  serving.serve(Peer)
