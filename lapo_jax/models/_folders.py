# SPDX-License-Identifier: Apache-2.0
"""Model folders in the Hugging Face layout: config.json and safetensors.

Foreign files are hostile: only JSON and safetensors are read, never pickle
or code. A family file brings the table of names; this file moves arrays.
"""

from collections.abc import Mapping, Sequence
import json
import pathlib
import re
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

_ASSETS = pathlib.Path(__file__).parent.parent / 'assets'

# (regex on the Hugging Face name, our path, whether to transpose); the path
# may use the regex's groups. The reverse direction is `_to_foreign`.
NameTable = Sequence[tuple[str, str, bool]]


def resolve(path: str) -> pathlib.Path:
  """The folder of a model: a local path, or the name of an embedded one.

  Raises:
    ValueError: no such folder, or it holds no config.json.
  """
  for folder in (pathlib.Path(path), _ASSETS / path):
    if (folder / 'config.json').is_file():
      return folder.resolve()
  embedded = sorted(p.parent.name for p in _ASSETS.glob('*/config.json'))
  raise ValueError(
      f'model.path {path!r}: expected a folder with config.json and '
      f'*.safetensors, or one of the embedded models {embedded}.')


def read_config(folder: pathlib.Path,
                model_types: Sequence[str]) -> dict[str, Any]:
  """config.json of a folder whose `model_type` is one of `model_types`.

  Raises:
    ValueError: not JSON, or of another family.
  """
  file = pathlib.Path(folder) / 'config.json'
  try:
    config = json.loads(file.read_text())
  except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
    raise ValueError(f'{file}: expected a JSON object: {error}.') from error
  found = config.get('model_type') if isinstance(config, dict) else None
  if found not in model_types:
    raise ValueError(f'{file}: got model_type {found!r}, expected one of '
                     f'{list(model_types)}; set model.name to its family.')
  return config


def check(folder: pathlib.Path, table: NameTable,
          shapes: Mapping[str, Any]) -> dict[str, tuple]:
  """Compares the headers of the folder's safetensors with the model.

  Args:
    folder: the model folder; one file or several.
    table: how the family's names map.
    shapes: the parameters wanted, a nested dict of ShapeDtypeStruct.

  Returns:
    {our path: (file, name in it, whether to transpose)}.

  Raises:
    ValueError: listing what is missing, unexpected or of another shape.
  """
  files = sorted(pathlib.Path(folder).glob('*.safetensors'))
  if not files:
    raise ValueError(f'{folder}: got no *.safetensors; expected the model\'s '
                     'weights in that format.')
  wanted = flax.traverse_util.flatten_dict(shapes, sep='/')
  found, unexpected, wrong = {}, [], []
  for file in files:
    with _open(file) as tensors:
      for name in tensors.keys():  # noqa: SIM118 (a handle, not a dict)
        path, transpose = _to_ours(name, table)
        if path not in wanted:
          unexpected.append(name)
          continue
        found[path] = (file, name, transpose)
        shape = tuple(tensors.get_slice(name).get_shape())
        shape = shape[::-1] if transpose else shape
        if shape != wanted[path].shape:
          wrong.append(f'{name} {shape}, expected {wanted[path].shape}')
  missing = [_to_foreign(path, table)[0] for path in wanted
             if path not in found]
  if missing or unexpected or wrong:
    raise ValueError(
        f'{folder}: the weights do not fit the model; missing '
        f'{_short(missing)}; unexpected {_short(unexpected)}; of another '
        f'shape {_short(wrong)}.')
  return found


def load(folder: pathlib.Path, table: NameTable,
         shapes: Mapping[str, Any]) -> dict[str, Any]:
  """Parameters of a checked folder, as nested dicts of numpy arrays."""
  wanted = flax.traverse_util.flatten_dict(shapes, sep='/')
  found = {}
  for path, (file, name, transpose) in check(folder, table, shapes).items():
    with _open(file) as tensors:
      array = np.asarray(tensors.get_tensor(name))
    array = array.T if transpose else array
    found[path] = array.astype(wanted[path].dtype)
  return flax.traverse_util.unflatten_dict(found, sep='/')


def save(folder: pathlib.Path, params: Mapping[str, Any], table: NameTable,
         config: Mapping[str, Any]) -> None:
  """Writes config.json and model.safetensors, which transformers loads."""
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  arrays = {}
  for path, value in flax.traverse_util.flatten_dict(params, sep='/').items():
    name, transpose = _to_foreign(path, table)
    array = np.asarray(jax.device_get(value))
    # safetensors writes the buffer as it lies: it must be contiguous.
    arrays[name] = np.ascontiguousarray(array.T if transpose else array)
  safetensors.numpy.save_file(arrays, folder / 'model.safetensors',
                              metadata={'format': 'pt'})
  (folder / 'config.json').write_text(json.dumps(config, indent=2) + '\n')


def _open(file: pathlib.Path):
  """A safetensors file; the flax reader knows bfloat16, numpy's does not."""
  try:
    return safetensors.safe_open(file, framework='flax')
  except (safetensors.SafetensorError, OSError) as error:
    raise ValueError(f'{file}: expected a safetensors file: {error}.'
                     ) from error


def _to_ours(name: str, table: NameTable) -> tuple[str | None, bool]:
  for pattern, path, transpose in table:
    match = re.fullmatch(pattern, name)
    if match:
      return match.expand(path), transpose
  return None, False


def _to_foreign(path: str, table: NameTable) -> tuple[str, bool]:
  """The Hugging Face name of our path: the table read from right to left."""
  for pattern, ours, transpose in table:
    match = re.fullmatch(ours.replace(r'\1', r'(\d+)'), path)
    if match:
      name = pattern.replace(r'(\d+)', r'\1').replace(r'\.', '.')
      return match.expand(name), transpose
  raise ValueError(f'parameter {path} has no name in the family\'s table.')


def _short(names: Sequence[str], limit: int = 6) -> str:
  more = f' and {len(names) - limit} more' if len(names) > limit else ''
  return f'{list(names[:limit])}{more}' if names else 'nothing'


def dtype_of(name: str) -> Any:
  """The compute dtype that a config names.

  Raises:
    ValueError: not one of float32 and bfloat16.
  """
  known = {'float32': jnp.float32, 'bfloat16': jnp.bfloat16}
  if name not in known:
    raise ValueError(f'model.dtype {name!r}: expected one of {sorted(known)}.')
  return known[name]
