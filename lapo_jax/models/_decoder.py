# SPDX-License-Identifier: Apache-2.0
"""The pre-norm decoder that the families are, each with its own settings.

Grouped-query attention with rotary positions, a gated MLP, one norm before
each and one at the end. What tells the families apart (biases, norms on
queries and keys, the head's width) is a field; a family's file subclasses
`Decoder` to say which it has.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from lapo_jax import attention, stacking
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

# What the backward pass of a layer computes again rather than holding it, and
# jax.checkpoint's name of what it holds; of 'full' that is the layer's input.
REMAT = {'none': None, 'dots': 'dots_with_no_batch_dims_saveable',
         'full': 'nothing_saveable'}


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
    remat: what a layer computes again for its gradient, one of `REMAT`.
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
  remat: str = 'none'
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
    self.layers = [self._block() for _ in range(self.num_layers)]
    self.final_norm = _layers.RMSNorm(self.norm_eps, self.param_dtype)

  def __call__(
      self,
      tokens: Int[Array, 'B S'],
      positions: Int[Array, 'B S'],
      mask: Bool[Array, 'B S'] | None = None,
      cache: Any = None,
  ) -> tuple[Float[Array, 'B S D'], Any]:
    """Final hidden states of the tokens, and the cache with them added.

    Parameters that `stack` made run through one loop over the layers, whose
    compile time does not depend on their number.

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
    turns = _layers.rotary_turns(
        _layers.rotary_angles(positions, jnp.asarray(frequencies)))
    # Looked up first: the gradient of a row is then summed as it is held.
    x = self.embedding[tokens].astype(self.dtype)
    if cache is None:
      # Over a mesh the compiler cuts this form, and no kernel.
      cache = attention.Whole(mask.astype(jnp.int32), backend='xla')
    if isinstance(cache, attention.Whole):
      x = cache.lay(x)
    if self.is_initializing():
      for layer in self.layers:
        x, cache = layer(x, turns, cache.attend)
    else:
      x, cache = self._run(x, turns, cache)
    return self.final_norm(x), cache

  def unembed(self, hidden: Float[Array, '*A D']) -> Float[Array, '*A V']:
    """Logits of hidden states, float32."""
    return jnp.matmul(hidden, self.output_table().astype(self.dtype),
                      preferred_element_type=jnp.float32)

  def output_table(self) -> Float[Array, 'D V']:
    """What hidden states are multiplied with to give the logits."""
    return self.embedding.T if self.tied else self.unembedding

  def stack(self, tree: dict[str, Any],
            join: Callable[[list[Any]], Any]) -> dict[str, Any]:
    """`layers_0`, `layers_1`, … of a parameter tree as one tree, `layers`.

    Args:
      tree: of parameters, or of anything else per parameter.
      join: what becomes of a parameter's leaves, all layers in turn; see
        `stacking` for shapes, shardings and arrays.
    """
    layers = [tree[name] for name in self._layer_names()]
    rest = {name: leaf for name, leaf in tree.items()
            if name not in self._layer_names()}
    return {**rest, 'layers': jax.tree.map(lambda *leaves: join(list(leaves)),
                                           *layers)}

  def unstack(self, tree: dict[str, Any]) -> dict[str, Any]:
    """What `stack` with jnp.stack did, undone."""
    rest = {name: leaf for name, leaf in tree.items() if name != 'layers'}
    return rest | {name: jax.tree.map(lambda leaf, i=i: leaf[i], tree['layers'])
                   for i, name in enumerate(self._layer_names())}

  def cache_shape(self) -> tuple[int, int, int]:
    """(layers, key/value heads, head width) of the keys and values."""
    return self.num_layers, self.num_kv_heads, self.head_dim

  def _layer_names(self):
    return [f'layers_{i}' for i in range(self.num_layers)]

  def _block(self, flat=True, **settings):
    return _Block(
        _layers.Attention(
            self.num_heads, self.num_kv_heads, self.head_dim, self.qkv_bias,
            self.out_bias, self.norm_eps if self.qk_norm else None, self.dtype,
            self.param_dtype, flat, parent=None),
        _layers.GatedMLP(self.mlp_width, self.mlp_bias, self.dtype,
                         self.param_dtype, flat, parent=None),
        self.norm_eps, self.param_dtype, **settings)

  def _run(self, x, turns, cache):
    """The layers in turn, as functions of their parameters."""
    cut = isinstance(cache, attention.Whole) and cache.cuts_slots
    block = self._block(flat=not cut, parent=None)
    params = self.variables['params']
    stacked = stacking.is_stacked(params)

    def layer(carry, params):
      x, cache = carry
      return block.apply({'params': params}, x, turns, cache.attend)

    if self.remat != 'none':
      layer = jax.checkpoint(
          layer, policy=getattr(jax.checkpoint_policies, REMAT[self.remat]),
          # A loop's body is compiled by itself: nothing to be merged with.
          prevent_cse=not stacked)
    carry = x, cache
    if stacked:
      return jax.lax.scan(lambda carry, params: (layer(carry, params), None),
                          carry, params['layers'])[0]
    for name in self._layer_names():
      carry = layer(carry, params[name])
    return carry


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
  def __call__(self, x, turns, attend):
    norm = lambda name: _layers.RMSNorm(self.norm_eps, self.param_dtype,
                                        name=name)
    mixed, cache = self.attention(norm('attention_norm')(x), turns, attend)
    x = x + mixed
    return x + self.mlp(norm('mlp_norm')(x)), cache
