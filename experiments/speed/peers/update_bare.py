# SPDX-License-Identifier: Apache-2.0
"""The update's products with the weights, forward and back, nothing else.

For the rows of our microbatch at a time. The part 'square' is one product of
two large square matrices, of which the machine's rate is taken.
"""

import time
from typing import Any

import jax
import jax.numpy as jnp

from experiments.speed import points, serving, steps
from experiments.speed.peers import bare
from lapo_jax.models import qwen2

_SIZE = 4096
# Operations of the square product.
SQUARE = 2.0 * _SIZE**3
_ROWS = 8


class Peer:
  """The products of the model's update."""

  libraries = ('jax', 'jaxlib')

  def __init__(self, folder: str, work: steps.Work):
    params = jax.device_put(qwen2.load(folder, qwen2.make(folder)))
    layers = [matrix for name in sorted(params) if name.startswith('layers_')
              for matrix in bare.weights(params[name])]
    self._weights = layers, jnp.array(params['embedding'].T)
    self._loop = jax.jit(_loop)
    self._square = jnp.ones((_SIZE, _SIZE))
    self._product = jax.jit(jnp.matmul)

  def run(self, seed: int) -> dict[str, Any]:
    """The loop, and the square product."""
    start = time.perf_counter()
    jax.block_until_ready(self._loop(self._weights))
    facts = {'loop_seconds': time.perf_counter() - start}
    start = time.perf_counter()
    self._product(self._square, self._square).block_until_ready()
    facts['square_seconds'] = time.perf_counter() - start
    return {'facts': facts}

  def compared(self, result: dict[str, Any]) -> None:
    """It learns nothing."""


def _loop(weights: Any) -> Any:
  """Sums of products that have the gradients' shapes."""
  layers, unembedding = weights

  def step(i, total):
    rows = lambda slots, width: jnp.full((slots * _ROWS, width), 1e-3) * i
    slots = steps.PROMPT + steps.COMPLETION
    found = [_products(rows(slots, len(matrix)), matrix) for matrix in layers]
    last = _products(rows(steps.COMPLETION, len(unembedding)), unembedding)
    return jax.tree.map(jnp.add, total, (found, last))

  batch = steps.NUM_PROMPTS * points.GROUP_SIZE
  return jax.lax.fori_loop(0, batch // _ROWS, step,
                           jax.tree.map(jnp.zeros_like, weights))


def _products(x: jax.Array, matrix: jax.Array) -> jax.Array:
  """x·W, y·Wᵀ and xᵀ·y, each waiting for the one before."""
  y = x @ matrix
  x = jnp.maximum(x, y @ matrix.T)
  return x.T @ y


if __name__ == '__main__':
  serving.serve(Peer, steps.load)
