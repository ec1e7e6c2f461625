# SPDX-License-Identifier: Apache-2.0
"""From config.json to a model, and back.

A value that would change the forward pass and that we do not compute is
refused by name. What is left (dropout, initialisation, caching, ids of special
tokens) changes nothing here; unknown names change nothing in transformers
either, whose classes are the reference.
"""

from collections.abc import Callable, Mapping
import json
import pathlib
from typing import Any, NamedTuple

import jax.numpy as jnp

from lapo_jax.models import _layers

# Names in config.json -> fields of a `Decoder`: whole numbers that must be
# there, and the most that we believe. (A folder is a stranger's.)
_SIZES = {
    'vocab_size': ('vocab_size', 2**24),
    'hidden_size': ('width', 2**20),
    'num_hidden_layers': ('num_layers', 2**10),
    'num_attention_heads': ('num_heads', 2**12),
    'intermediate_size': ('mlp_width', 2**22),
}

# What must be absent or one of these values.
_NEUTRAL = {
    'hidden_act': ('silu', 'swish'),
    'use_sliding_window': (False, None),
    'use_mrope': (False, None),
    'partial_rotary_factor': (1.0, None),
    'pretraining_tp': (1, None),
    'is_causal': (True, None),
    'is_encoder_decoder': (False, None),
    'add_cross_attention': (False, None),
    'quantization_config': (None, {}),
    'compression_config': (None, {}),
    'auto_map': (None, {}),
    'logit_scale': (1.0, None),
    'logits_scaling': (1.0, None),
    'embedding_multiplier': (1.0, None),
    'residual_multiplier': (1.0, None),
    'attention_multiplier': (None,),
    'query_pre_attn_scalar': (None,),
    'attn_logit_softcapping': (None,),
    'final_logit_softcapping': (None,),
    'no_rope_layers': (None, []),
    'num_experts': (0, None),
    'num_local_experts': (0, None),
}

_ROPE_NAMES = {
    'default': (),
    'llama3': ('factor', 'low_freq_factor', 'high_freq_factor',
               'original_max_position_embeddings'),
}
# Beyond this a float32 has no room for what is computed from it.
_MOST = 1e30
_DTYPES = {'float32': jnp.float32, 'bfloat16': jnp.bfloat16}


class Family(NamedTuple):
  """What a family adds to what all have in common.

  Attributes:
    model_type: its name in config.json.
    architecture: transformers' class.
    model: our class.
    read: config.json -> the family's own fields of `Decoder`.
    write: a model -> the family's own entries of config.json.
    neutral: further names and the values they may have.
  """

  model_type: str
  architecture: str
  model: type
  read: Callable[[dict], dict]
  write: Callable[[Any], dict]
  neutral: Mapping[str, tuple] = {}


def read(folder: pathlib.Path, family: Family, dtype: str = 'float32',
         param_dtype: str = 'float32') -> tuple[Any, dict[str, Any]]:
  """(model, config.json) of a folder.

  Args:
    folder: the model folder.
    family: the family that it must be of.
    dtype: of the arithmetic, 'float32' or 'bfloat16'.
    param_dtype: of the parameters, likewise.

  Raises:
    ValueError: not JSON, of another family, or a value we do not compute.
  """
  for name, value in (('dtype', dtype), ('param_dtype', param_dtype)):
    if value not in _DTYPES:
      raise ValueError(f'model.{name} {value!r}: expected one of '
                       f'{sorted(_DTYPES)}.')
  file = pathlib.Path(folder) / 'config.json'
  try:
    config = json.loads(file.read_text())
  except (OSError, ValueError, RecursionError) as error:
    raise ValueError(f'{file}: expected a JSON object: {error}.') from error
  found = config.get('model_type') if isinstance(config, dict) else None
  if found != family.model_type:
    raise ValueError(f'{file}: got model_type {found!r}, expected '
                     f'{family.model_type!r}; set model.name to its family.')
  try:
    _check_neutral(config, family)
    model = family.model(
        **_common_fields(config), **family.read(config),
        dtype=_DTYPES[dtype], param_dtype=_DTYPES[param_dtype])
    if model.head_dim < 2 or model.head_dim % 2:
      raise ValueError(f'got heads of {model.head_dim} numbers, expected an '
                       'even number of them')
  except ValueError as error:
    raise ValueError(f'{file}: {error}.') from error
  return model, config


def describe(model: Any, family: Family, param_dtype: Any,
             source: pathlib.Path | None = None) -> dict[str, Any]:
  """The config.json of a model.

  Args:
    model: the model.
    family: its family.
    param_dtype: of the parameters that are written beside it.
    source: folder of the model it was loaded from, whose entries are kept.

  Raises:
    ValueError: the source describes another model.
  """
  if source is None:
    config = {**_common_entries(model, family), **family.write(model)}
  else:
    theirs, config = read(source, family)
    theirs = theirs.clone(dtype=model.dtype, param_dtype=model.param_dtype)
    if theirs != model:
      raise ValueError(f'{source}/config.json describes another model than '
                       'the one to be saved; give its own folder, or none.')
  # transformers 5 says dtype, and reads either.
  name = 'dtype' if 'dtype' in config else 'torch_dtype'
  if name == 'dtype':
    config.pop('torch_dtype', None)
  return {**config, name: jnp.dtype(param_dtype).name}


def flag(config: Mapping[str, Any], name: str) -> bool:
  """A value that is true or false; false if absent.

  Raises:
    ValueError: it is something else.
  """
  value = config.get(name, False)
  if not isinstance(value, bool):
    raise ValueError(f'got {name} {value!r}, expected true or false')
  return value


def whole(config: Mapping[str, Any], name: str, most: int = 2**20,
          default: int | None = None, optional: bool = False) -> int | None:
  """A whole number from 1 to `most`; `default` if absent or null.

  Raises:
    ValueError: it is something else, or absent without a default and not
      optional.
  """
  value = config.get(name)
  if value is None and (optional or default is not None):
    return default
  if isinstance(value, bool) or not isinstance(value, int) or not (
      1 <= value <= most):
    raise ValueError(f'got {name} {value!r}, expected a whole number from 1 '
                     f'to {most}')
  return value


def _number(config: Mapping[str, Any], name: str,
            default: float | None = None) -> float:
  value = config.get(name)
  value = default if value is None else value
  real = isinstance(value, int | float) and not isinstance(value, bool)
  if not real or not 0 < value < _MOST:  # NaN is neither
    raise ValueError(f'got {name} {value!r}, expected a positive number')
  return float(value)


def _check_neutral(config: Mapping[str, Any], family: Family) -> None:
  neutral = {**_NEUTRAL, **family.neutral}
  bad = [f'{name} {config[name]!r}, expected it absent or one of '
         f'{list(legal)}' for name, legal in neutral.items()
         if name in config and config[name] not in legal]
  layers = config.get('layer_types') or []
  if layers != ['full_attention'] * len(_list(layers)):
    bad.append(f'layer_types {layers!r}, expected "full_attention" alone')
  classes = config.get('architectures') or [family.architecture]
  if family.architecture not in _list(classes):
    bad.append(f'architectures {classes!r}, expected {family.architecture!r}')
  if bad:
    raise ValueError(f'unsupported {"; ".join(bad)}')


def _list(value: Any) -> list:
  return value if isinstance(value, list) else []


def _common_fields(config: Mapping[str, Any]) -> dict[str, Any]:
  """The fields of a `Decoder` that all families read alike."""
  fields = {ours: whole(config, theirs, most)
            for theirs, (ours, most) in _SIZES.items()}
  heads = fields['num_heads']
  kv_heads = whole(config, 'num_key_value_heads', default=heads)
  if heads % kv_heads:
    raise ValueError(f'got num_key_value_heads {kv_heads}, expected a divisor '
                     f'of num_attention_heads {heads}')
  positions = whole(config, 'max_position_embeddings', 2**40, default=32768)
  theta, scaling = _rope(config, positions)
  return {**fields, 'num_kv_heads': kv_heads, 'rope_theta': theta,
          'rope_scaling': scaling, 'max_positions': positions,
          'norm_eps': _number(config, 'rms_norm_eps', 1e-6),
          'tied': flag(config, 'tie_word_embeddings')}


def _rope(config: Mapping[str, Any],
          positions: int) -> tuple[float, _layers.RopeScaling | None]:
  """Base and stretch, as transformers 4 wrote them or as 5 does."""
  rope = config.get('rope_scaling') or config.get('rope_parameters') or {}
  if not isinstance(rope, dict):
    raise ValueError(f'got rope_scaling {rope!r}, expected an object')
  kind = rope.get('rope_type') or rope.get('type') or 'default'
  if not isinstance(kind, str) or kind not in _ROPE_NAMES:
    raise ValueError(f'unsupported rope_scaling of rope_type {kind!r}, '
                     f'expected one of {list(_ROPE_NAMES)}')
  legal = ('rope_type', 'type', 'rope_theta', *_ROPE_NAMES[kind])
  unknown = {name: value for name, value in rope.items() if name not in legal
             and (name, value) != ('partial_rotary_factor', 1.0)}
  if unknown:
    raise ValueError(f'unsupported rope_scaling {unknown} of rope_type '
                     f'{kind!r}, expected some of {list(legal)}')
  theta = _number(rope, 'rope_theta', _number(config, 'rope_theta', 10000.0))
  if kind == 'default':
    return theta, None
  name = 'original_max_position_embeddings'
  scaling = _layers.RopeScaling(
      *(_number(rope, name) for name in _ROPE_NAMES[kind][:3]),
      # A config that has it outside means that one.
      whole(config if name in config else rope, name, 2**40, positions))
  if scaling.low_freq_factor >= scaling.high_freq_factor:
    raise ValueError(f'got low_freq_factor {scaling.low_freq_factor}, '
                     f'expected less than high_freq_factor '
                     f'{scaling.high_freq_factor}')
  return theta, scaling


def _common_entries(model: Any, family: Family) -> dict[str, Any]:
  scaling = model.rope_scaling
  rope = {} if scaling is None else {'rope_scaling': {
      'rope_type': 'llama3',
      **dict(zip(_ROPE_NAMES['llama3'], scaling, strict=True))}}
  return {
      'architectures': [family.architecture],
      'model_type': family.model_type,
      **{theirs: getattr(model, ours) for theirs, (ours, _) in _SIZES.items()},
      'num_key_value_heads': model.num_kv_heads,
      'head_dim': model.head_dim,
      'hidden_act': 'silu',
      'max_position_embeddings': model.max_positions,
      'rms_norm_eps': model.norm_eps,
      'rope_theta': model.rope_theta,
      **rope,
      'tie_word_embeddings': model.tied,
  }
