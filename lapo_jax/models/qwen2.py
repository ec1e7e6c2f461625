# SPDX-License-Identifier: Apache-2.0
"""Qwen2: DeepSeek-R1-Distill-Qwen, DeepScaleR, Qwen2.5 (arXiv:2407.10671).

A pre-norm decoder with grouped-query attention, biases on queries, keys and
values, rotary positions and a gated MLP. Loads and saves folders in the
Hugging Face layout.

Departures from the reference: sliding-window attention and rope scaling are
refused by name, not ignored.
"""

import pathlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from lapo_jax.models import _folders, _layers

# Regex on the parameter's path -> how its axes lie on the mesh.
PARTITION_RULES = (
    (r'embedding', PartitionSpec('tensor', 'fsdp')),
    (r'unembedding', PartitionSpec('fsdp', 'tensor')),
    (r'.*/(query|key|value|gate|up)/kernel', PartitionSpec('fsdp', 'tensor')),
    (r'.*/(query|key|value)/bias', PartitionSpec('tensor')),
    (r'.*/(out|down)/kernel', PartitionSpec('tensor', 'fsdp')),
    (r'.*norm/scale', PartitionSpec()),
)

# What config.json must say; the rest has the defaults of transformers.
_SIZES = ('vocab_size', 'hidden_size', 'num_hidden_layers',
          'num_attention_heads', 'num_key_value_heads', 'intermediate_size')

_LAYER = r'model\.layers\.(\d+)\.'
_NAMES = (
    (r'model\.embed_tokens\.weight', 'embedding', False),
    (r'lm_head\.weight', 'unembedding', True),
    (r'model\.norm\.weight', 'final_norm/scale', False),
    (_LAYER + r'input_layernorm\.weight',
     r'layers_\1/attention_norm/scale', False),
    (_LAYER + r'post_attention_layernorm\.weight',
     r'layers_\1/mlp_norm/scale', False),
    *((_LAYER + rf'self_attn\.{theirs}_proj\.weight',
       rf'layers_\1/attention/{ours}/kernel', True)
      for theirs, ours in (('q', 'query'), ('k', 'key'), ('v', 'value'),
                           ('o', 'out'))),
    *((_LAYER + rf'self_attn\.{theirs}_proj\.bias',
       rf'layers_\1/attention/{ours}/bias', False)
      for theirs, ours in (('q', 'query'), ('k', 'key'), ('v', 'value'))),
    *((_LAYER + rf'mlp\.{name}_proj\.weight',
       rf'layers_\1/mlp/{name}/kernel', True)
      for name in ('gate', 'up', 'down')),
)


class _Block(nn.Module):
  """One decoder layer."""

  num_heads: int
  num_kv_heads: int
  head_dim: int
  mlp_width: int
  norm_eps: float
  dtype: Any

  @nn.compact
  def __call__(self, x, angles, mask, past):
    normed = _layers.RMSNorm(self.norm_eps, name='attention_norm')(x)
    mixed, keys, values = _layers.Attention(
        self.num_heads, self.num_kv_heads, self.head_dim, qkv_bias=True,
        dtype=self.dtype, name='attention')(normed, angles, mask, past)
    x = x + mixed
    normed = _layers.RMSNorm(self.norm_eps, name='mlp_norm')(x)
    x = x + _layers.GatedMLP(self.mlp_width, self.dtype, name='mlp')(normed)
    return x, keys, values


class Model(nn.Module):
  """A Qwen2 decoder; the fields are its config.json's, under our names."""

  vocab_size: int
  width: int
  num_layers: int
  num_heads: int
  num_kv_heads: int
  mlp_width: int
  rope_theta: float = 1e6
  norm_eps: float = 1e-6
  tied: bool = True
  max_positions: int = 32768
  dtype: Any = jnp.float32

  @property
  def head_dim(self) -> int:
    return self.width // self.num_heads

  def setup(self):
    normal = nn.initializers.normal(0.02)
    self.embedding = self.param('embedding', normal,
                                (self.vocab_size, self.width), jnp.float32)
    if not self.tied:
      self.unembedding = self.param('unembedding', normal,
                                    (self.width, self.vocab_size), jnp.float32)
    self.layers = [
        _Block(self.num_heads, self.num_kv_heads, self.head_dim,
               self.mlp_width, self.norm_eps, self.dtype)
        for _ in range(self.num_layers)
    ]
    self.final_norm = _layers.RMSNorm(self.norm_eps)

  def __call__(
      self,
      tokens: Int[Array, 'B S'],
      positions: Int[Array, 'B S'],
      key_mask: Bool[Array, 'B C'],
      cache: _layers.KVCache | None = None,
  ) -> tuple[Float[Array, 'B S D'], _layers.KVCache | None]:
    """Final hidden states of the tokens, and the cache with them added.

    Args:
      tokens: the S new tokens of each row.
      positions: their positions; a row's first real token is at 0.
      key_mask: which slots hold real tokens, the new ones included; C is the
        cache's slots, or S without a cache.
      cache: past keys and values; the new ones go to slot `cache.index`.
    """
    index = jnp.int32(0) if cache is None else cache.index
    mask = _layers.attention_mask(key_mask, index, tokens.shape[1])
    angles = _layers.rotary_angles(positions, self.head_dim, self.rope_theta)
    x = self.embedding.astype(self.dtype)[tokens]
    keys, values = [], []
    for i, layer in enumerate(self.layers):
      past = cache and (cache.keys[i], cache.values[i], index)
      x, layer_keys, layer_values = layer(x, angles, mask, past)
      keys.append(layer_keys)
      values.append(layer_values)
    if cache is not None:
      cache = _layers.KVCache(tuple(keys), tuple(values),
                              index + tokens.shape[1])
    return self.final_norm(x), cache

  def unembed(self, hidden: Float[Array, '*A D']) -> Float[Array, '*A V']:
    """Logits of hidden states, float32."""
    table = self.embedding.T if self.tied else self.unembedding
    return jnp.matmul(hidden, table.astype(self.dtype),
                      preferred_element_type=jnp.float32)

  def init_cache(self, batch: int, slots: int) -> _layers.KVCache:
    """An empty cache of this model's shape."""
    return _layers.init_cache(batch, slots, self.num_layers,
                              self.num_kv_heads, self.head_dim, self.dtype)


def make(path: str = 'tiny_reasoner', dtype: str = 'float32') -> Model:
  """The model that a folder's config.json describes.

  Args:
    path: a model folder or the name of an embedded one.
    dtype: compute dtype, 'float32' or 'bfloat16'; parameters are float32.

  Raises:
    ValueError: no such folder, another family, an unsupported setting, or
      weights that do not fit, by name.
  """
  folder = _folders.resolve(path)
  config = _folders.read_config(folder, ('qwen2',))
  missing = [name for name in _SIZES if not isinstance(config.get(name), int)]
  if missing:
    raise ValueError(f'{path}/config.json: got no {missing}; expected whole '
                     'numbers.')
  rope = config.get('rope_scaling') or config.get('rope_parameters') or {}
  refused = {
      'use_sliding_window': config.get('use_sliding_window', False),
      'hidden_act': config.get('hidden_act', 'silu') != 'silu',
      'rope_scaling': rope.get('rope_type', rope.get('type', 'default'))
                      != 'default',
  }
  if any(refused.values()):
    named = {key: config.get(key) for key, bad in refused.items() if bad}
    raise ValueError(f'{path}/config.json: unsupported {named}; expected no '
                     'sliding window, no rope scaling and hidden_act "silu".')
  model = Model(
      vocab_size=config['vocab_size'],
      width=config['hidden_size'],
      num_layers=config['num_hidden_layers'],
      num_heads=config['num_attention_heads'],
      num_kv_heads=config['num_key_value_heads'],
      mlp_width=config['intermediate_size'],
      rope_theta=float(rope.get('rope_theta',
                                config.get('rope_theta', 10000.0))),
      norm_eps=float(config.get('rms_norm_eps', 1e-6)),
      tied=bool(config.get('tie_word_embeddings', False)),
      max_positions=config.get('max_position_embeddings', 32768),
      dtype=_folders.dtype_of(dtype))
  _folders.check(folder, _NAMES, init_shapes(model))
  return model


def load(path: str, model: Model) -> dict[str, Any]:
  """Parameters of a folder, nested dicts of float32 numpy arrays."""
  return _folders.load(_folders.resolve(path), _NAMES, init_shapes(model))


def save(params: Any, path: str | pathlib.Path, model: Model,
         **special_tokens: int) -> None:
  """Writes a folder that transformers loads.

  Args:
    params: the parameters.
    path: the folder; made if missing.
    model: their model.
    **special_tokens: bos_token_id, eos_token_id, pad_token_id.
  """
  _folders.save(pathlib.Path(path), params, _NAMES, {
      'architectures': ['Qwen2ForCausalLM'],
      'model_type': 'qwen2',
      'vocab_size': model.vocab_size,
      'hidden_size': model.width,
      'intermediate_size': model.mlp_width,
      'num_hidden_layers': model.num_layers,
      'num_attention_heads': model.num_heads,
      'num_key_value_heads': model.num_kv_heads,
      'hidden_act': 'silu',
      'max_position_embeddings': model.max_positions,
      'rms_norm_eps': model.norm_eps,
      'rope_theta': model.rope_theta,
      'tie_word_embeddings': model.tied,
      'use_sliding_window': False,
      'torch_dtype': 'float32',
      **special_tokens,
  })


def init_shapes(model: Model) -> dict[str, Any]:
  """Shapes of the parameters; nothing is allocated."""
  return jax.eval_shape(lambda: init_params(model, jax.random.key(0)))


def init_params(model: Model, key: jax.Array) -> dict[str, Any]:
  """Random parameters, for a model trained from scratch."""
  tokens = jnp.zeros((1, 1), jnp.int32)
  return model.init(key, tokens, tokens, tokens == 0)['params']
