# SPDX-License-Identifier: Apache-2.0
"""The parts that decoder families share: norm, rotary, attention, gated MLP.

Shapes: B rows, S query slots, C cache slots, D width, H query heads, K
key/value heads, E head width. Queries, keys and values are computed in
`dtype`; norms, softmax and logits in float32.
"""

from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# Finite, so that a row without a single real key gives no NaN.
_MASKED = -1e30


@flax.struct.dataclass
class KVCache:
  """Keys and values of past slots, one array per layer.

  Heads lie before slots: a decoding step then reads each head's slots in one
  run of memory, and needs no transposed copy.

  Attributes:
    keys: per layer [B, K, C, E], rotated.
    values: per layer [B, K, C, E].
    index: int32 [], the slot that the next token is written to.
  """

  keys: tuple[jax.Array, ...]
  values: tuple[jax.Array, ...]
  index: jax.Array

  def repeat(self, times: int) -> 'KVCache':
    """Each row `times` times in a row: prompts to their groups."""
    widen = lambda x: jnp.repeat(x, times, axis=0)
    return self.replace(keys=tuple(map(widen, self.keys)),
                        values=tuple(map(widen, self.values)))

  def grow(self, slots: int) -> 'KVCache':
    """The same cache with room for `slots` slots."""
    widen = lambda x: jnp.pad(
        x, ((0, 0), (0, 0), (0, slots - x.shape[2]), (0, 0)))
    return self.replace(keys=tuple(map(widen, self.keys)),
                        values=tuple(map(widen, self.values)))


def init_cache(batch: int, slots: int, num_layers: int, num_kv_heads: int,
               head_dim: int, dtype: Any) -> KVCache:
  """An empty cache."""
  empty = lambda: tuple(
      jnp.zeros((batch, num_kv_heads, slots, head_dim), dtype)
      for _ in range(num_layers))
  return KVCache(keys=empty(), values=empty(), index=jnp.int32(0))


def rotary_angles(positions: Int[Array, 'B S'], head_dim: int,
                  theta: float) -> Float[Array, 'B S E2']:
  """Angles position · θ^(−2i/E) for i < E/2 (arXiv:2104.09864)."""
  exponents = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
  frequencies = 1.0 / theta**exponents
  return positions[..., None].astype(jnp.float32) * frequencies[None, None]


def rotate(x: Float[Array, 'B S N E'],
           angles: Float[Array, 'B S E2']) -> Float[Array, 'B S N E']:
  """Rotates each head's two halves (Hugging Face's layout of the pairs)."""
  cos, sin = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  rotated = jnp.concatenate(
      [first * cos - second * sin, second * cos + first * sin], axis=-1)
  return rotated.astype(x.dtype)


def attention_mask(key_mask: Bool[Array, 'B C'], index: Int[Array, ''],
                   num_queries: int) -> Bool[Array, 'B S C']:
  """A query in slot s sees real keys in slots ≤ s; query 0 is at `index`."""
  query_slots = index + jnp.arange(num_queries)
  causal = jnp.arange(key_mask.shape[1])[None, :] <= query_slots[:, None]
  return causal[None] & key_mask[:, None, :]


def attend(queries: Float[Array, 'B S H E'], keys: Float[Array, 'B K C E'],
           values: Float[Array, 'B K C E'],
           mask: Bool[Array, 'B S C']) -> Float[Array, 'B S H E']:
  """softmax(q·kᵀ/√E)·v; each key head serves H/K query heads."""
  batch, slots, heads, width = queries.shape
  kv_heads = keys.shape[1]
  shared = heads // kv_heads
  # Matrix products over leading batch axes, [B, K, H/K · S, E] by [B, K, C, E]:
  # the form that every backend has a fast routine for.
  rows = queries.transpose(0, 2, 1, 3).reshape(batch, kv_heads, -1, width)
  scores = jnp.einsum('bkre,bkce->bkrc', rows, keys,
                      preferred_element_type=jnp.float32) * width**-0.5
  scores = scores.reshape(batch, kv_heads, shared, slots, -1)
  scores = jnp.where(mask[:, None, None], scores, _MASKED)
  weights = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
  mixed = jnp.einsum('bkrc,bkce->bkre',
                     weights.reshape(batch, kv_heads, shared * slots, -1),
                     values)
  return mixed.reshape(batch, heads, slots, width).transpose(0, 2, 1, 3)


class RMSNorm(nn.Module):
  """x / √(mean x² + ε) · scale, in float32."""

  eps: float

  @nn.compact
  def __call__(self, x):
    scale = self.param('scale', nn.initializers.ones, (x.shape[-1],),
                       jnp.float32)
    wide = x.astype(jnp.float32)
    variance = jnp.mean(wide**2, axis=-1, keepdims=True)
    scale = scale.reshape((1,) * (x.ndim - 1) + (-1,))
    return (wide * jax.lax.rsqrt(variance + self.eps) * scale).astype(x.dtype)


class Linear(nn.Module):
  """x·kernel (+ bias); float32 parameters, arithmetic in `dtype`."""

  features: int
  use_bias: bool
  dtype: Any

  @nn.compact
  def __call__(self, x):
    kernel = self.param('kernel', nn.initializers.normal(0.02),
                        (x.shape[-1], self.features), jnp.float32)
    # Rows and slots as one axis: XLA's CPU backend halves the backward time.
    flat = x.astype(self.dtype).reshape(-1, x.shape[-1])
    y = (flat @ kernel.astype(self.dtype)).reshape(*x.shape[:-1], -1)
    if self.use_bias:
      bias = self.param('bias', nn.initializers.zeros, (self.features,),
                        jnp.float32)
      y = y + bias.astype(self.dtype).reshape((1,) * (y.ndim - 1) + (-1,))
    return y


class Attention(nn.Module):
  """Grouped-query attention with rotary positions and an explicit cache."""

  num_heads: int
  num_kv_heads: int
  head_dim: int
  qkv_bias: bool
  dtype: Any

  @nn.compact
  def __call__(self, x, angles, mask, past):
    batch, slots, width = x.shape
    project = lambda heads, name: Linear(
        heads * self.head_dim, self.qkv_bias, self.dtype, name=name)(
            x).reshape(batch, slots, heads, self.head_dim)
    queries = rotate(project(self.num_heads, 'query'), angles)
    heads_first = lambda x: x.transpose(0, 2, 1, 3)
    keys = heads_first(rotate(project(self.num_kv_heads, 'key'), angles))
    values = heads_first(project(self.num_kv_heads, 'value'))
    if past is not None:
      past_keys, past_values, index = past
      write = jax.lax.dynamic_update_slice_in_dim
      keys = write(past_keys, keys.astype(past_keys.dtype), index, axis=2)
      values = write(past_values, values.astype(past_values.dtype), index,
                     axis=2)
    mixed = attend(queries, keys, values, mask).reshape(batch, slots, -1)
    return Linear(width, False, self.dtype, name='out')(mixed), keys, values


class GatedMLP(nn.Module):
  """down(silu(gate(x)) · up(x))."""

  features: int
  dtype: Any

  @nn.compact
  def __call__(self, x):
    linear = lambda features, name: Linear(
        features, False, self.dtype, name=name)
    hidden = nn.silu(linear(self.features, 'gate')(x))
    hidden = hidden * linear(self.features, 'up')(x)
    return linear(x.shape[-1], 'down')(hidden)
