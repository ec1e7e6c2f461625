# SPDX-License-Identifier: Apache-2.0
"""Qwen2: DeepSeek-R1-Distill-Qwen, DeepScaleR, Qwen2.5 (arXiv:2407.10671).

The decoder with biases on queries, keys and values. Loads and saves folders
in the Hugging Face layout.

Departures from the reference: sliding-window attention and all rope scaling
but Llama 3's are refused by name, not ignored.
"""

from lapo_jax.models import _configs, _decoder, _families

PARTITION_RULES = _decoder.PARTITION_RULES
init_shapes = _decoder.init_shapes
init_params = _decoder.init_params


class Model(_decoder.Decoder):
  """A Qwen2 decoder."""

  rope_theta: float = 1e6
  tied: bool = True
  qkv_bias: bool = True


FAMILY = _configs.Family(
    model_type='qwen2', architecture='Qwen2ForCausalLM', model=Model,
    read=lambda config: {
        'head_dim': _configs.whole(config, 'head_dim', optional=True)},
    write=lambda model: {'use_sliding_window': False})
load = _families.load
save = _families.make_save_fn(FAMILY)


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
  return _families.make(FAMILY, path, dtype, param_dtype)
