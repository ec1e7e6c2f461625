# SPDX-License-Identifier: Apache-2.0
"""Llama 2 and 3, with Llama 3's rope scaling (arXiv:2407.21783).

The plain decoder; biases where config.json asks for them. Loads and saves
folders in the Hugging Face layout.

Departures from the reference: all rope scaling but Llama 3's is refused by
name, not ignored, and so is a `pretraining_tp` other than 1.
"""

from typing import Any

from lapo_jax.models import _configs, _decoder, _families

PARTITION_RULES = _decoder.PARTITION_RULES
init_shapes = _decoder.init_shapes
init_params = _decoder.init_params


class Model(_decoder.Decoder):
  """A Llama decoder."""


def _read(config: dict[str, Any]) -> dict[str, Any]:
  bias = _configs.flag(config, 'attention_bias')
  return {'head_dim': _configs.whole(config, 'head_dim', optional=True),
          'qkv_bias': bias, 'out_bias': bias,
          'mlp_bias': _configs.flag(config, 'mlp_bias')}


FAMILY = _configs.Family(
    model_type='llama', architecture='LlamaForCausalLM', model=Model,
    read=_read,
    write=lambda model: {'attention_bias': model.qkv_bias,
                         'mlp_bias': model.mlp_bias},
    # Qwen's folders name a window that another entry switches off.
    neutral={'sliding_window': (None,)})
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
