# SPDX-License-Identifier: Apache-2.0
"""Qwen2: DeepSeek-R1-Distill-Qwen, DeepScaleR, Qwen2.5 (arXiv:2407.10671).

The decoder with biases on queries, keys and values. Loads and saves folders
in the Hugging Face layout.

Departures from the reference: sliding-window attention and all rope scaling
but Llama 3's are refused by name, not ignored.
"""

import pathlib
from typing import Any

from lapo_jax.models import (
    _configs,
    _decoder,
    _folders,
    _layout,
    _loading,
    _saving,
)

PARTITION_RULES = _decoder.PARTITION_RULES
init_shapes = _decoder.init_shapes
init_params = _decoder.init_params


class Model(_decoder.Decoder):
  """A Qwen2 decoder."""

  rope_theta: float = 1e6
  tied: bool = True
  qkv_bias: bool = True


_FAMILY = _configs.Family(
    model_type='qwen2', architecture='Qwen2ForCausalLM', model=Model,
    read=lambda config: {
        'head_dim': _configs.whole(config, 'head_dim', optional=True)},
    write=lambda model: {'use_sliding_window': False})


def make(path: str = 'tiny_reasoner', dtype: str = 'float32',
         param_dtype: str = 'float32') -> Model:
  """The model that a folder's config.json describes.

  Args:
    path: a model folder, the name of an embedded one, or owner/name@<commit>.
    dtype: of the arithmetic, 'float32' or 'bfloat16'.
    param_dtype: of the parameters, likewise.

  Raises:
    ValueError: no such folder, another family, an unsupported setting, or
      weights that do not fit, by name.
  """
  folder = _folders.resolve(path)
  model, _ = _configs.read(folder, _FAMILY, dtype, param_dtype)
  _loading.check(folder, _layout.NAMES, init_shapes(model))
  return model


def load(path: str, model: Model, shardings: Any = None) -> dict[str, Any]:
  """Parameters of a folder: on `shardings`, or without them in numpy."""
  return _loading.load(_folders.resolve(path), _layout.NAMES,
                       init_shapes(model), shardings)


def save(params: Any, path: str | pathlib.Path, model: Model, *,
         source: str | None = None,
         max_shard_bytes: int = _saving.MAX_SHARD_BYTES,
         **special_tokens: Any) -> None:
  """Writes a folder that transformers loads.

  Args:
    params: the parameters.
    path: the folder; made if missing.
    model: their model.
    source: where the model was loaded from, to keep its config.json's entries.
    max_shard_bytes: of each file of weights.
    **special_tokens: bos_token_id, eos_token_id, pad_token_id.
  """
  config = _configs.describe(model, _FAMILY, params['embedding'].dtype,
                             source and _folders.resolve(source))
  _saving.save(path, params, _layout.NAMES, {**config, **special_tokens},
               max_shard_bytes)
