# SPDX-License-Identifier: Apache-2.0
"""Small decoders of odd shapes, their weights, texts, and others' logits.

Weights are a formula of uniform random numbers, alike on every machine, so
that stored logits need no stored weights.
"""

import pathlib
from typing import Any, NamedTuple
import warnings

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from lapo_jax import ops, plugins
from lapo_jax.models import _layers

_LLAMA3 = _layers.RopeScaling(8.0, 1.0, 4.0, 8192)
_LLAMA32 = _layers.RopeScaling(32.0, 1.0, 4.0, 8192)
_SHORT = _layers.RopeScaling(4.0, 1.0, 4.0, 64)  # bends within 200 slots


class Case(NamedTuple):
  """A model and texts: rows of `slots` slots at first, first + stride, …

  Attention sees differences of positions alone: only a stride over one tells
  whether slow frequencies are right.
  """

  family: str
  fields: dict[str, Any]
  slots: int = 11
  first: int = 0
  stride: int = 1

  def model(self, **fields):
    """The model."""
    return plugins.module('models', self.family).Model(
        **{'vocab_size': 67, 'width': 32, 'num_layers': 2, 'mlp_width': 40,
           **self.fields, **fields})

  def texts(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, mask and positions [3, S]: a full row and two padded ones."""
    lengths = np.array([self.slots, self.slots - 4, 3])
    mask = np.arange(self.slots) >= self.slots - lengths[:, None]
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 67, mask.shape).astype(np.int32)
    positions = np.asarray(ops.positions_from_mask(jnp.asarray(mask)))
    return tokens, mask, self.first + self.stride * positions


CASES = {
    'qwen2 shared heads, tied': Case('qwen2', dict(
        width=36, num_heads=6, num_kv_heads=2)),
    'qwen2 own heads, untied': Case('qwen2', dict(
        num_layers=3, num_heads=4, num_kv_heads=4, rope_theta=1e4,
        tied=False)),
    'qwen2 heads do not fill the width': Case('qwen2', dict(
        width=34, num_heads=4, num_kv_heads=2, rope_theta=1e4)),
    'qwen2 positions 5,000 to 14,970': Case('qwen2', dict(
        num_heads=2, num_kv_heads=1, rope_theta=1e4, tied=False),
        first=5000, stride=997),
    'qwen2 200 slots': Case('qwen2', dict(
        num_heads=4, num_kv_heads=2, norm_eps=1e-5), slots=200),
    'qwen3 wide heads, tied': Case('qwen3', dict(
        num_heads=4, num_kv_heads=2, head_dim=24, rope_theta=1e6, tied=True)),
    'qwen3 own heads, biases, untied': Case('qwen3', dict(
        num_heads=3, num_kv_heads=3, head_dim=8, qkv_bias=True,
        out_bias=True)),
    'qwen3 positions 5,000 to 14,970': Case('qwen3', dict(
        num_heads=4, num_kv_heads=1, head_dim=16, rope_theta=1e6),
        first=5000, stride=997),
    'llama shared heads, untied': Case('llama', dict(
        num_heads=4, num_kv_heads=2, norm_eps=1e-5)),
    'llama own heads, all biases, tied': Case('llama', dict(
        num_heads=4, num_kv_heads=4, qkv_bias=True, out_bias=True,
        mlp_bias=True, tied=True)),
    'llama scaled 8 times, 5,000 to 14,970': Case('llama', dict(
        num_heads=2, num_kv_heads=1, rope_theta=5e5, rope_scaling=_LLAMA3),
        first=5000, stride=997),
    'llama scaled 32 times, 20,000 to 119,730': Case('llama', dict(
        num_heads=4, num_kv_heads=2, head_dim=16, rope_theta=5e5,
        rope_scaling=_LLAMA32, tied=True), first=20000, stride=9973),
    'llama scaled within 200 slots': Case('llama', dict(
        num_heads=2, num_kv_heads=2, rope_theta=1e4, rope_scaling=_SHORT),
        slots=200),
}


def make_params(model: Any, seed: int = 0) -> dict[str, Any]:
  """Parameters whose activations are of order one."""
  shapes = flax.traverse_util.flatten_dict(
      plugins.module('models', 'qwen2').init_shapes(model), sep='/')

  def values(number, path):
    shape = shapes[path].shape
    centred = np.random.default_rng([seed, number]).random(shape) - 0.5
    if path.endswith('scale'):
      return 1.0 + 0.4 * centred
    if path == 'embedding' or path.endswith('bias'):
      return centred
    return centred * np.sqrt(12 / shape[0])

  return flax.traverse_util.unflatten_dict({
      path: values(number, path).astype(shapes[path].dtype)
      for number, path in enumerate(sorted(shapes))}, sep='/')


def logits(model: Any, params: Any, texts: tuple) -> np.ndarray:
  """Ours, float32 [3, S, V]."""

  @jax.jit
  def forward(params, tokens, mask, positions):
    hidden, _ = model.apply({'params': params}, tokens, positions, mask)
    return model.apply({'params': params}, hidden, method='unembed')

  return np.asarray(forward(params, *texts))


def transformers_model(folder: str | pathlib.Path) -> Any:
  """The folder's model in transformers, float32 and without fused parts."""
  import torch
  import transformers
  torch.set_num_threads(1)
  transformers.utils.logging.disable_progress_bar()
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')
    return transformers.AutoModelForCausalLM.from_pretrained(
        str(folder), dtype=torch.float32, attn_implementation='eager').eval()


def transformers_logits(folder: str | pathlib.Path,
                        texts: tuple) -> np.ndarray:
  """Theirs, float32 [3, S, V]."""
  import torch
  tokens, mask, positions = (torch.tensor(x, dtype=torch.long) for x in texts)
  model = transformers_model(folder)
  with torch.no_grad(), warnings.catch_warnings():
    warnings.simplefilter('ignore')
    return model(tokens, attention_mask=mask,
                 position_ids=positions).logits.numpy()
