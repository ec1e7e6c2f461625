# SPDX-License-Identifier: Apache-2.0
"""The pre-norm decoder that the families are, each with its own settings.

Grouped-query attention with rotary positions, a gated MLP, one norm before
each and one at the end. What tells the families apart (biases, norms on
queries and keys, the head's width) is a field; a family's file subclasses
`Decoder` to say which it has.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from lapo_jax import attention
from lapo_jax.models import _layers

# Regex on the parameter's path -> how its axes lie on the mesh.
PARTITION_RULES = (
    (r'embedding', PartitionSpec('tensor', 'fsdp')),
    (r'unembedding', PartitionSpec('fsdp', 'tensor')),
    (r'.*/(query|key|value|gate|up)/kernel', PartitionSpec('fsdp', 'tensor')),
    (r'.*/(query|key|value|gate|up)/bias', PartitionSpec('tensor')),
    (r'.*/(out|down)/kernel', PartitionSpec('tensor', 'fsdp')),
    # Added once the parts of a row are summed.
    (r'.*/(out|down)/bias', PartitionSpec()),
    (r'.*norm/scale', PartitionSpec()),
)


class Decoder(nn.Module):
  """A decoder.

  Attributes:
    vocab_size: V.
    width: D.
    num_layers: how many blocks.
    num_heads: H query heads.
    num_kv_heads: K key and value heads, a divisor of H.
    mlp_width: width between the MLP's two halves.
    head_dim: E, None = width / H.
    rope_theta: base of the rotary frequencies.
    rope_scaling: their stretch to longer texts, None = none.
    norm_eps: ε of every norm.
    tied: the embedding also makes the logits.
    qkv_bias: whether queries, keys and values have a bias.
    out_bias: likewise the attention's output.
    mlp_bias: likewise the MLP's three projections.
    qk_norm: whether each head's queries and keys are normed.
    max_positions: how long a text may be; nothing here depends on it.
    dtype: of the arithmetic.
    param_dtype: of the parameters.
  """

  vocab_size: int
  width: int
  num_layers: int
  num_heads: int
  num_kv_heads: int
  mlp_width: int
  head_dim: int | None = None
  rope_theta: float = 10000.0
  rope_scaling: _layers.RopeScaling | None = None
  norm_eps: float = 1e-6
  tied: bool = False
  qkv_bias: bool = False
  out_bias: bool = False
  mlp_bias: bool = False
  qk_norm: bool = False
  max_positions: int = 32768
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

  def __post_init__(self):
    if self.head_dim is None:
      self.head_dim = self.width // self.num_heads
    super().__post_init__()

  def setup(self):
    normal = nn.initializers.normal(0.02)
    self.embedding = self.param('embedding', normal,
                                (self.vocab_size, self.width),
                                self.param_dtype)
    if not self.tied:
      self.unembedding = self.param('unembedding', normal,
                                    (self.width, self.vocab_size),
                                    self.param_dtype)
    norm_eps = self.norm_eps if self.qk_norm else None
    self.layers = [
        _Block(
            _layers.Attention(
                self.num_heads, self.num_kv_heads, self.head_dim,
                self.qkv_bias, self.out_bias, norm_eps, self.dtype,
                self.param_dtype, parent=None),
            _layers.GatedMLP(self.mlp_width, self.mlp_bias, self.dtype,
                             self.param_dtype, parent=None),
            self.norm_eps, self.param_dtype)
        for _ in range(self.num_layers)
    ]
    self.final_norm = _layers.RMSNorm(self.norm_eps, self.param_dtype)

  def __call__(
      self,
      tokens: Int[Array, 'B S'],
      positions: Int[Array, 'B S'],
      mask: Bool[Array, 'B S'] | None = None,
      cache: Any = None,
  ) -> tuple[Float[Array, 'B S D'], Any]:
    """Final hidden states of the tokens, and the cache with them added.

    Args:
      tokens: S tokens of each row.
      positions: their positions; a row's first real token is at 0.
      mask: without a cache, which of them are real.
      cache: past keys and values. For each layer in turn, `cache.attend` is
        given the new queries [B, S, H, E], keys and values [B, S, K, E], and
        returns what the queries find, [B, S, H, E], and the next cache.
    """
    frequencies = _layers.rotary_frequencies(self.head_dim, self.rope_theta,
                                             self.rope_scaling)
    angles = _layers.rotary_angles(positions, jnp.asarray(frequencies))
    x = self.embedding.astype(self.dtype)[tokens]
    for layer in self.layers:
      if cache is None:
        # Over a mesh the compiler cuts this form, and no kernel.
        attend = lambda *qkv: (attention.causal(
            *qkv, mask.astype(jnp.int32), backend='xla'), None)
      else:
        attend = cache.attend
      x, cache = layer(x, angles, attend)
    return self.final_norm(x), cache

  def unembed(self, hidden: Float[Array, '*A D']) -> Float[Array, '*A V']:
    """Logits of hidden states, float32."""
    table = self.embedding.T if self.tied else self.unembedding
    return jnp.matmul(hidden, table.astype(self.dtype),
                      preferred_element_type=jnp.float32)

  def cache_shape(self) -> tuple[int, int, int]:
    """(layers, key/value heads, head width) of the keys and values."""
    return self.num_layers, self.num_kv_heads, self.head_dim


def init_shapes(model: Decoder) -> dict[str, Any]:
  """Shapes of the parameters; nothing is allocated."""
  return jax.eval_shape(lambda: init_params(model, jax.random.key(0)))


def init_params(model: Decoder, key: jax.Array) -> dict[str, Any]:
  """Random parameters, for a model trained from scratch."""
  tokens = jnp.zeros((1, 1), jnp.int32)
  return model.init(key, tokens, tokens, tokens == 0)['params']


class _Block(nn.Module):
  """One decoder layer."""

  attention: nn.Module
  mlp: nn.Module
  norm_eps: float
  param_dtype: Any

  @nn.compact
  def __call__(self, x, angles, attend):
    norm = lambda name: _layers.RMSNorm(self.norm_eps, self.param_dtype,
                                        name=name)
    mixed, cache = self.attention(norm('attention_norm')(x), angles, attend)
    x = x + mixed
    return x + self.mlp(norm('mlp_norm')(x)), cache
