# SPDX-License-Identifier: Apache-2.0
"""Small array operations that three rooms or more share.

Masks are bool, true = real. A masked statistic equals the statistic of the
subset, and an empty subset gives 0, never NaN, in value and gradient.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Num, ScalarLike


def masked_mean(values: Num[Array, '*A'], mask: Bool[Array, '*A'],
                axis: int | None = -1,
                keepdims: bool = False) -> Float[Array, '...']:
  """Mean of the values where the mask is true; 0 where it nowhere is."""
  values = jnp.where(mask, values, 0).astype(jnp.float32)
  count = jnp.sum(mask, axis=axis, keepdims=keepdims, dtype=jnp.float32)
  total = jnp.sum(values, axis=axis, keepdims=keepdims)
  return total / jnp.maximum(count, 1.0)


def masked_std(values: Num[Array, '*A'], mask: Bool[Array, '*A'],
               axis: int = -1, ddof: int = 1,
               keepdims: bool = False) -> Float[Array, '...']:
  """Standard deviation √(Σ(x − mean)² / (n − ddof)) where the mask is true.

  Two passes over centred values: the one-pass E[x²] − E[x]² cancels in
  float32. Equal values give exactly 0, and so does a count n ≤ ddof.
  """
  mean = masked_mean(values, mask, axis, keepdims=True)
  # Eight times 0.35 has a float32 mean that is not 0.35: compare, don't trust.
  equal = (jnp.min(jnp.where(mask, values, jnp.inf), axis, keepdims=True) ==
           jnp.max(jnp.where(mask, values, -jnp.inf), axis, keepdims=True))
  centred = jnp.where(mask & ~equal, values - mean, 0.0)
  squares = jnp.sum(centred**2, axis=axis, keepdims=keepdims)
  count = jnp.sum(mask, axis=axis, keepdims=keepdims, dtype=jnp.float32)
  variance = squares / jnp.maximum(count - ddof, 1.0)
  positive = (variance > 0) & (count > ddof)
  return jnp.where(positive, jnp.sqrt(jnp.where(positive, variance, 1.0)), 0.0)


def masked_quantile(values: Num[Array, '*A G'], mask: Bool[Array, '*A G'],
                    q: ScalarLike) -> Float[Array, '*A']:
  """Quantile q in [0, 1] over the last axis, linear interpolation (numpy's).

  Counts only values where the mask is true; 0 where it nowhere is.
  """
  values = values.astype(jnp.float32)
  count = jnp.sum(mask, axis=-1)
  ordered = jnp.sort(jnp.where(mask, values, jnp.inf), axis=-1)
  rank = q * (jnp.maximum(count, 1) - 1).astype(jnp.float32)
  low = jnp.floor(rank).astype(jnp.int32)
  high = jnp.minimum(low + 1, jnp.maximum(count - 1, 0))
  pick = lambda i: jnp.take_along_axis(ordered, i[..., None], -1)[..., 0]
  below, above = pick(low), pick(high)
  share = rank - low.astype(jnp.float32)
  empty = count == 0
  below, above = (jnp.where(empty, 0.0, x) for x in (below, above))
  return below + share * (above - below)


def to_groups(values: Num[Array, 'B *A'] | Bool[Array, 'B *A'],
              group_size: int) -> Array:
  """[B, …] -> [P, G, …], row b = p·G + g."""
  return values.reshape(-1, group_size, *values.shape[1:])


def to_batch(values: Array) -> Array:
  """[P, G, …] -> [B, …], row b = p·G + g."""
  return values.reshape(-1, *values.shape[2:])


def positions_from_mask(mask: Bool[Array, 'B S']) -> Int[Array, 'B S']:
  """Positions that start at 0 on each row's first real token."""
  return jnp.maximum(jnp.cumsum(mask, axis=-1, dtype=jnp.int32) - 1, 0)


def positions_from_segments(
    segments: Int[Array, 'B S']) -> Int[Array, 'B S']:
  """Positions that start at 0 where a segment does; of padding, any."""
  first = jnp.diff(segments, axis=1, prepend=-1) != 0
  slots = jax.lax.broadcasted_iota(jnp.int32, segments.shape, 1)
  return slots - jax.lax.cummax(jnp.where(first, slots, 0), axis=1)


def token_logprobs(logits: Float[Array, '*A V'],
                   tokens: Int[Array, '*A']) -> Float[Array, '*A']:
  """log softmax(logits)[token], float32."""
  logits = logits.astype(jnp.float32)
  chosen = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
  return chosen - jax.nn.logsumexp(logits, axis=-1)


def is_any_of(tokens: Int[Array, '*A'],
              ids: Sequence[int]) -> Bool[Array, '*A']:
  """Whether each token is one of a few ids; of none, never."""
  found = jnp.zeros(tokens.shape, bool)
  for i in ids:
    found |= tokens == i
  return found


def bucket(length: int, cap: int, least: int = 16) -> int:
  """The least of 16, 24, 32, 48, 64, 96, … (or the cap) that is ≥ length.

  They start at `least`, a power of two above 1. Shapes cut to buckets compile
  few programs and waste at most a third.

  Raises:
    ValueError: length > cap.
  """
  if length > cap:
    raise ValueError(f'length {length} does not fit the cap of {cap}.')
  size = least
  while size < length:
    size = size * 3 // 2 if size & (size - 1) == 0 else size // 3 * 4
  return min(size, cap)
