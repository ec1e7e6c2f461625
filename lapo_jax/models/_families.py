# SPDX-License-Identifier: Apache-2.0
"""What every family offers, given its entries of config.json."""

from collections.abc import Callable
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


def make(family: _configs.Family, path: str, dtype: str,
         param_dtype: str) -> _decoder.Decoder:
  """The model that a folder's config.json describes; see a family's `make`."""
  folder = _folders.resolve(path)
  model, _ = _configs.read(folder, family, dtype, param_dtype)
  _loading.check(folder, _layout.NAMES, _decoder.init_shapes(model))
  return model


def load(path: str, model: _decoder.Decoder,
         shardings: Any = None) -> dict[str, Any]:
  """Parameters of a folder: on `shardings`, or without them in numpy."""
  return _loading.load(_folders.resolve(path), _layout.NAMES,
                       _decoder.init_shapes(model), shardings)


def make_save_fn(family: _configs.Family) -> Callable:
  """The `save` of a family."""

  def save(params: Any, path: str | pathlib.Path, model: _decoder.Decoder, *,
           source: str | None = None,
           max_shard_bytes: int = _saving.MAX_SHARD_BYTES,
           **special_tokens: Any) -> None:
    """Writes a folder that transformers loads.

    Args:
      params: the parameters.
      path: the folder; made if missing.
      model: their model.
      source: where the model was loaded from, to keep its config.json's
        entries.
      max_shard_bytes: of each file of weights.
      **special_tokens: bos_token_id, eos_token_id, pad_token_id.
    """
    config = _configs.describe(model, family, params['embedding'].dtype,
                               source and _folders.resolve(source))
    _saving.save(path, params, _layout.NAMES, {**config, **special_tokens},
                 max_shard_bytes)

  return save
