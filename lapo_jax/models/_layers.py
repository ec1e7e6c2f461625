# SPDX-License-Identifier: Apache-2.0
"""The parts that decoder families share: norm, rotary, attention, gated MLP.

Shapes: B rows, S slots, D width, H query heads, K
key/value heads, E head width. Queries, keys and values are computed in
`dtype`; norms, softmax and logits in float32. Parameters are held in
`param_dtype`.
"""

import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import numpy as np


class RopeScaling(NamedTuple):
  """Llama 3's stretch of the slow rotary frequencies, see `llama3`.

  Attributes:
    factor: by how much the slowest are slowed down.
    low_freq_factor: a wave that fits fewer times than this into
      `original_positions` is slow.
    high_freq_factor: one that fits more often than this is fast, and stays.
    original_positions: the length of text before the stretch.
  """

  factor: float
  low_freq_factor: float
  high_freq_factor: float
  original_positions: int


def rotary_frequencies(
    head_dim: int, theta: float, scaling: RopeScaling | None = None,
) -> Float[np.ndarray, 'E2']:
  """θ^(−2i/E) for i < E/2 (arXiv:2104.09864), stretched if `scaling` says so.

  On the host, in float32 and in this order, as the reference does: thousands
  of positions on, the last bit of a frequency shows in the logits.
  """
  exponents = np.arange(0, head_dim, 2).astype(np.float32) / np.float32(
      head_dim)
  frequencies = np.float32(1) / np.float32(theta)**exponents
  return llama3(frequencies, scaling) if scaling else frequencies


def llama3(frequencies: Float[np.ndarray, 'E2'],
           scaling: RopeScaling) -> Float[np.ndarray, 'E2']:
  """Frequencies f stretched to longer texts (arXiv:2407.21783).

    n = original_positions · f / 2π        waves that fit into the old length
    s = clip((n − low) / (high − low), 0, 1)
    f' = (1 − s) · f / factor + s · f
  """
  waves = scaling.original_positions * frequencies / (2 * math.pi)
  span = scaling.high_freq_factor - scaling.low_freq_factor
  share = np.clip((waves - scaling.low_freq_factor) / span, 0, 1)
  slow = frequencies / np.float32(scaling.factor)
  return ((1 - share) * slow + share * frequencies).astype(np.float32)


def rotary_angles(
    positions: Int[Array, 'B S'],
    frequencies: Float[Array, 'E2']) -> Float[Array, 'B S E2']:
  """Angles position · frequency."""
  return positions[..., None].astype(jnp.float32) * frequencies[None, None]


def rotary_turns(
    angles: Float[Array, 'B S E2'],
) -> tuple[Float[Array, 'B S E'], Float[Array, 'B S E']]:
  """What a head's numbers and their partners are multiplied with.

  Cosines, and sines whose first half is negative. XLA's CPU backend would
  compute them anew for each head of each layer.
  """
  cos, sin = jnp.cos(angles), jnp.sin(angles)
  return jax.lax.optimization_barrier(
      (jnp.concatenate([cos, cos], -1), jnp.concatenate([-sin, sin], -1)))


def rotate(x: Float[Array, 'B S N E'],
           turns: tuple[Float[Array, 'B S E'], Float[Array, 'B S E']],
           ) -> Float[Array, 'B S N E']:
  """Rotates each head's two halves (Hugging Face's layout of the pairs)."""
  own, other = (part[:, :, None] for part in turns)
  wide = x.astype(jnp.float32)
  # A roll: to join halves that are computed apart costs a CPU twice as much.
  partners = jnp.roll(wide, x.shape[-1] // 2, axis=-1)
  return (wide * own + partners * other).astype(x.dtype)


class RMSNorm(nn.Module):
  """x / √(mean x² + ε) · scale, in float32."""

  eps: float
  param_dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x):
    scale = self.param('scale', nn.initializers.ones, (x.shape[-1],),
                       self.param_dtype)
    wide = x.astype(jnp.float32)
    variance = jnp.mean(wide**2, axis=-1, keepdims=True)
    scale = scale.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + (-1,))
    return (wide * jax.lax.rsqrt(variance + self.eps) * scale).astype(x.dtype)


class Linear(nn.Module):
  """x·kernel (+ bias), arithmetic in `dtype`.

  With `flat` rows and slots are made one axis: XLA's CPU backend then halves
  the backward time. Where both are cut over a mesh that would gather them.
  """

  features: int
  use_bias: bool
  dtype: Any
  param_dtype: Any = jnp.float32
  flat: bool = True

  @nn.compact
  def __call__(self, x):
    kernel = self.param('kernel', nn.initializers.normal(0.02),
                        (x.shape[-1], self.features), self.param_dtype)
    rows = x.astype(self.dtype)
    if self.flat:
      rows = rows.reshape(-1, x.shape[-1])
    y = (rows @ kernel.astype(self.dtype)).reshape(*x.shape[:-1], -1)
    if self.use_bias:
      bias = self.param('bias', nn.initializers.zeros, (self.features,),
                        self.param_dtype)
      y = y + bias.astype(self.dtype).reshape((1,) * (y.ndim - 1) + (-1,))
    return y


class Attention(nn.Module):
  """Grouped-query attention with rotary positions; `attend` does the mixing.

  With `norm_eps`, queries and keys are normed head by head before they turn.
  """

  num_heads: int
  num_kv_heads: int
  head_dim: int
  qkv_bias: bool
  out_bias: bool
  norm_eps: float | None
  dtype: Any
  param_dtype: Any
  flat: bool = True

  @nn.compact
  def __call__(self, x, turns, attend):
    batch, slots, width = x.shape
    linear = lambda features, use_bias, name: Linear(
        features, use_bias, self.dtype, self.param_dtype, self.flat, name=name)

    def project(name, heads, turned):
      y = linear(heads * self.head_dim, self.qkv_bias, name)(x)
      y = y.reshape(batch, slots, heads, self.head_dim)
      if turned and self.norm_eps is not None:
        y = RMSNorm(self.norm_eps, self.param_dtype, name=f'{name}_norm')(y)
      return rotate(y, turns) if turned else y

    mixed, cache = attend(project('query', self.num_heads, True),
                          project('key', self.num_kv_heads, True),
                          project('value', self.num_kv_heads, False))
    mixed = mixed.reshape(batch, slots, -1)
    return linear(width, self.out_bias, 'out')(mixed), cache


class GatedMLP(nn.Module):
  """down(silu(gate(x)) · up(x))."""

  features: int
  use_bias: bool
  dtype: Any
  param_dtype: Any
  flat: bool = True

  @nn.compact
  def __call__(self, x):
    linear = lambda features, name: Linear(
        features, self.use_bias, self.dtype, self.param_dtype, self.flat,
        name=name)
    hidden = nn.silu(linear(self.features, 'gate')(x))
    hidden = hidden * linear(self.features, 'up')(x)
    return linear(x.shape[-1], 'down')(hidden)
