# SPDX-License-Identifier: Apache-2.0
"""Drawing tokens from logits: greedy, at a temperature, of top-p and top-k.

One uniform number a row against the cumulated probabilities: Gumbel noise for
a large vocabulary costs more than the rest of a decoding step on a CPU. The
sum goes over blocks of the vocabulary first, so that no array of its size is
cumulated or written.

Top-p and top-k are for evaluation. Training leaves them alone: a truncated
support biases the ratio of policies (trl#6789).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class How(NamedTuple):
  """How each row's token is drawn; all traced: changing them compiles nothing.

  Attributes:
    temperature: float32 [N], 0 = greedy.
    top_p: float32 [N], the fewest likeliest tokens whose share of the mass
      reaches it stay, the one that crosses it included (arXiv:1904.09751);
      1 = all.
    top_k: int32 [N], the likeliest that stay, of which top_p takes its share;
      0 = all.
  """

  temperature: jax.Array
  top_p: jax.Array
  top_k: jax.Array

  def kind(self) -> Int[Array, '']:
    """0: all rows plain; 1: some greedy; 2: some of top-p or top-k."""
    greedy = jnp.any(self.temperature == 0)
    return jnp.where(jnp.any(self.truncated()), 2, greedy.astype(jnp.int32))

  def truncated(self) -> Bool[Array, 'N']:
    """Rows of which not all tokens stay."""
    return (self.top_p < 1) | (self.top_k > 0)


def uniforms(keys: Array) -> Float[Array, 'N']:
  """One number in [0, 1) of each key: its last 24 bits.

  A key that `fold_in` has made is itself a hash; to hash it again costs a
  small model as much as a layer.
  """
  bits = jax.random.key_data(keys)[..., -1] >> 8
  return bits.astype(jnp.float32) * 2.0**-24


def draw(logits: Float[Array, 'N V'], uniforms: Float[Array, 'N'], how: How,
         kind: Int[Array, '']) -> tuple[Int[Array, 'N'], Float[Array, 'N']]:
  """Tokens, and their log-probs under softmax(logits / temperature).

  Greedy rows have those of softmax(logits); no row has those of the
  truncated distribution.

  Args:
    logits: float32.
    uniforms: in [0, 1).
    how: of each row.
    kind: `how.kind()` of all rows there are, those elsewhere included.
  """
  greedy = how.temperature == 0
  scaled = logits / jnp.where(greedy, 1.0, how.temperature)[:, None]
  plain, total = _draw(scaled, uniforms)
  # Branches, not masks of all ones: sorting costs more than the draw, and
  # so does an argmax on a CPU.
  likeliest = lambda: jnp.argmax(logits, axis=-1).astype(jnp.int32)
  mixed = lambda: jnp.where(greedy, likeliest(), plain)
  # Each row by its own rule: no row's token depends on its neighbours'.
  truncated = lambda: jnp.where(how.truncated() & ~greedy, _draw_likeliest(
      scaled, uniforms, how.top_p, how.top_k), mixed())
  tokens = jax.lax.switch(kind, [lambda: plain, mixed, truncated])
  chosen = jnp.take_along_axis(scaled, tokens[:, None], axis=1)[:, 0]
  return tokens, chosen - total


def _draw(logits: Float[Array, 'N V'], uniforms: Float[Array, 'N']
          ) -> tuple[Int[Array, 'N'], Float[Array, 'N']]:
  """The token of each row in whose share of the mass the number falls.

  And log Σ exp(logits), whose terms are at hand.
  """
  rows, size = logits.shape
  width = _block(size)
  blocks = logits.reshape(rows, -1, width)
  peaks = jnp.max(logits, axis=-1)[:, None, None]
  masses = jnp.sum(jnp.exp(blocks - peaks), axis=-1)
  cumulated = jnp.cumsum(masses, axis=-1)
  # Against the total, which float32 leaves a little beside 1.
  wanted = uniforms * cumulated[:, -1]
  block = _first_above(cumulated, wanted)
  take = lambda x: jnp.take_along_axis(x, block[:, None], axis=1)[:, 0]
  # Not below 0: rounding must not reach a token without mass.
  rest = jnp.maximum(wanted - take(cumulated) + take(masses), 0.0)
  inside = jnp.exp(jnp.take_along_axis(
      blocks, block[:, None, None], axis=1) - peaks)[:, 0]
  tokens = block * width + _first_above(jnp.cumsum(inside, axis=-1), rest)
  return tokens, peaks[:, 0, 0] + jnp.log(cumulated[:, -1])


def _draw_likeliest(logits: Float[Array, 'N V'], uniforms: Float[Array, 'N'],
                    top_p: Float[Array, 'N'],
                    top_k: Int[Array, 'N']) -> Int[Array, 'N']:
  """Draws from the top k, and of these from the nucleus of mass top_p.

  Equal tokens stay in the order of their ids.
  """
  order = jnp.argsort(-logits, axis=-1, stable=True)
  ranked = jnp.take_along_axis(logits, order, axis=1)
  masses = jnp.exp(ranked - ranked[:, :1])
  rank = jnp.arange(masses.shape[1])[None]
  top_p, top_k = top_p[:, None], top_k[:, None]
  masses = jnp.where((top_k <= 0) | (rank < top_k), masses, 0.0)
  cumulated = jnp.cumsum(masses, axis=-1)
  # Against the mass before a token: a token crosses where it starts below.
  below = cumulated - masses < top_p * cumulated[:, -1:]
  kept = (rank == 0) | (top_p >= 1) | below
  cumulated = jnp.cumsum(jnp.where(kept, masses, 0.0), axis=-1)
  places = _first_above(cumulated, uniforms * cumulated[:, -1])
  return jnp.take_along_axis(order, places[:, None], axis=1)[:, 0]


def _first_above(cumulated: Float[Array, 'N M'],
                 wanted: Float[Array, 'N']) -> Int[Array, 'N']:
  """The first entry that exceeds the wanted mass, or the last with any."""
  below = jnp.sum(cumulated <= wanted[:, None], axis=-1, dtype=jnp.int32)
  # Rounding can leave the wanted mass at or above the total: the last token
  # that has mass, not one behind it that is impossible.
  last = jnp.sum(cumulated < cumulated[:, -1:], axis=-1, dtype=jnp.int32)
  return jnp.minimum(below, last)


def _block(size: int) -> int:
  """A power of two that divides the vocabulary, near its root."""
  width = 1
  while size % (2 * width) == 0 and 4 * width * width <= 2 * size:
    width *= 2
  return width
