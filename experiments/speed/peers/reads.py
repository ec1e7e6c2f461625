# SPDX-License-Identifier: Apache-2.0
"""Reading the keys and values that decoding needs, and nothing else.

At each step those of every live token, a prompt's once for its group: as many
bytes as that, summed from memory in one jitted loop.
"""

from typing import Any

import jax
import jax.numpy as jnp

from experiments.speed import points, serving
from lapo_jax import paging
from lapo_jax.models import qwen2

# More than caches hold.
_BLOCK = 128 << 20


class Peer:
  """The reads of the point's completions."""

  libraries = ('jax', 'jaxlib')

  def __init__(self, folder: str, work: points.Work):
    total = live_bytes(qwen2.make(folder), work)
    self._block = jnp.zeros(min(total, _BLOCK) // 4, jnp.float32)
    times = max(1, round(total / self._block.nbytes))
    # What is summed depends on the sum before: none can be left out.
    self._loop = jax.jit(lambda block: jax.lax.fori_loop(
        0, times, lambda _, found: jnp.sum(block + found), jnp.float32(0)))

  def run(self, seed: int) -> dict[str, Any]:
    """The loop."""
    self._loop(self._block).block_until_ready()
    return {'facts': {}}

  def compared(self, result: dict[str, Any]) -> None:
    """It samples nothing."""


def live_bytes(model: Any, work: points.Work) -> int:
  """Of the keys and values of all steps, float32."""
  longest = work.lengths.reshape(-1, points.GROUP_SIZE).max(axis=1)
  tokens = (work.lengths * (work.lengths + 1) // 2).sum() + (
      work.prompts.shape[1] * longest.sum())
  return int(tokens) * paging.token_bytes(*model.cache_shape(), jnp.float32)


if __name__ == '__main__':
  serving.serve(Peer)
