# SPDX-License-Identifier: Apache-2.0
"""Qwen3, the dense ones (arXiv:2505.09388).

The decoder with norms on each head's queries and keys, and heads whose width
is a setting. Loads and saves folders in the Hugging Face layout.

Departures from the reference: sliding-window attention and all rope scaling
but Llama 3's are refused by name, not ignored.
"""

from typing import Any

from lapo_jax.models import _configs, _decoder, _families

PARTITION_RULES = _decoder.PARTITION_RULES
init_shapes = _decoder.init_shapes
init_params = _decoder.init_params


class Model(_decoder.Decoder):
  """A Qwen3 decoder."""

  qk_norm: bool = True


def _read(config: dict[str, Any]) -> dict[str, Any]:
  bias = _configs.flag(config, 'attention_bias')
  # A folder that does not say has heads of 128, as in transformers.
  return {'head_dim': _configs.whole(config, 'head_dim', default=128),
          'qkv_bias': bias, 'out_bias': bias}


FAMILY = _configs.Family(
    model_type='qwen3', architecture='Qwen3ForCausalLM', model=Model,
    read=_read,
    write=lambda model: {'attention_bias': model.qkv_bias,
                         'use_sliding_window': False})
load = _families.load
save = _families.make_save_fn(FAMILY)


def make(path: str = '', dtype: str = 'float32',
         param_dtype: str = 'float32') -> Model:
  """The model that a folder's config.json describes.

  Args:
    path: a model folder, or owner/name@<commit> on the hub.
    dtype: of the arithmetic, 'float32' or 'bfloat16'.
    param_dtype: of the parameters, likewise.

  Raises:
    ValueError: no such folder, another family, an unsupported setting, or
      weights that do not fit, by name.
  """
  return _families.make(FAMILY, path, dtype, param_dtype)
