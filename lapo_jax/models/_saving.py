# SPDX-License-Identifier: Apache-2.0
"""Parameters to safetensors, one at a time, and their config.json."""

from collections.abc import Callable, Mapping, Sequence
import json
import os
import pathlib
import re
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from lapo_jax.models import _layout

MAX_SHARD_BYTES = 5 * 10**9

_OURS = re.compile(r'model(-\d{5}-of-\d{5})?\.safetensors')


def save(folder: str | pathlib.Path, params: Mapping[str, Any],
         table: _layout.NameTable, config: Mapping[str, Any],
         max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
  """Writes config.json and the weights, which transformers loads.

  Every file appears whole or not at all, config.json last. A host holds one
  parameter at a time.

  Args:
    folder: where to; made if missing. Weights that are there are replaced.
    params: the parameters, on devices or not.
    table: how the family's names map.
    config: what config.json says.
    max_shard_bytes: of each file; a larger tensor has one of its own.
  """
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  tensors = {}
  for path, value in flax.traverse_util.flatten_dict(params, sep='/').items():
    name, transpose = _layout.to_foreign(path, table)
    tensors[name] = (value, transpose)
  shards = _shards(tensors, max_shard_bytes)
  names = (['model.safetensors'] if len(shards) == 1 else
           [f'model-{i:05d}-of-{len(shards):05d}.safetensors'
            for i in range(1, len(shards) + 1)])
  for name, shard in zip(names, shards, strict=True):
    _write(folder / name,
           lambda part, shard=shard: _write_tensors(part, shard, tensors))
  there = {file.name for file in folder.iterdir()}
  index = folder / _layout.INDEX
  if len(shards) > 1:
    where = {name: file for file, shard in zip(names, shards, strict=True)
             for name in shard}
    total = sum(value.nbytes for value, _ in tensors.values())
    _write_json(index, {'metadata': {'total_size': total},
                        'weight_map': where})
  else:
    index.unlink(missing_ok=True)
  for name in there - set(names):
    if _OURS.fullmatch(name):
      (folder / name).unlink()
  _write_json(folder / 'config.json', config)


def _shards(tensors: Mapping[str, tuple],
            max_shard_bytes: int) -> list[list[str]]:
  """The names, sorted, in parts of no more than so many bytes."""
  shards, size = [[]], 0
  for name in sorted(tensors):
    num_bytes = tensors[name][0].nbytes
    if shards[-1] and size + num_bytes > max_shard_bytes:
      shards.append([])
      size = 0
    shards[-1].append(name)
    size += num_bytes
  return shards


def _write_tensors(file: pathlib.Path, names: Sequence[str],
                   tensors: Mapping[str, tuple]) -> None:
  """A safetensors file: a header's length, the header, the numbers.

  The library's own writer takes all arrays at once.
  """
  header, start = {'__metadata__': {'format': 'pt'}}, 0
  kinds = {jnp.dtype(dtype): kind for kind, dtype in _layout.DTYPES.items()}
  for name in names:
    value, transpose = tensors[name]
    shape = value.shape[::-1] if transpose else value.shape
    header[name] = {'dtype': kinds[jnp.dtype(value.dtype)],
                    'shape': list(shape),
                    'data_offsets': [start, start + value.nbytes]}
    start += value.nbytes
  text = json.dumps(header, separators=(',', ':')).encode()
  text += b' ' * (-len(text) % 8)  # numbers start at a multiple of 8
  with file.open('wb') as stream:
    stream.write(len(text).to_bytes(8, 'little') + text)
    for name in names:
      value, transpose = tensors[name]
      # A copy: an array on devices keeps the host's copy of it for ever.
      array = np.asarray(value.copy() if isinstance(value, jax.Array)
                         else value)
      array = np.ascontiguousarray(array.T if transpose else array)
      # As bytes: the buffer protocol knows no bfloat16.
      stream.write(array.reshape(-1).view(np.uint8).data)


def _write(file: pathlib.Path,
           write: Callable[[pathlib.Path], Any]) -> None:
  """Writes beside the file, then renames: readers never see half of it."""
  part = file.with_name(f'{file.name}.tmp')
  write(part)
  os.replace(part, file)


def _write_json(file: pathlib.Path, content: Mapping[str, Any]) -> None:
  _write(file, lambda part: part.write_text(
      json.dumps(content, indent=2) + '\n'))
