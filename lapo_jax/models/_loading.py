# SPDX-License-Identifier: Apache-2.0
"""Parameters from safetensors, one at a time.

Foreign files are hostile: safetensors alone are read, never pickle or code,
and their headers are compared with the model before a number is. A checkpoint
is `model.safetensors`, or the files of `model.safetensors.index.json`.

Each device's part is cut from the file by itself, so a host holds little more
than what its devices hold, whatever the size of the model.
"""

from collections.abc import Mapping, Sequence
import json
import pathlib
import re
from typing import Any, NamedTuple

import flax.traverse_util
import jax
import numpy as np
import safetensors

from lapo_jax.models import _layout

# Tables that old files carry and that follow from config.json.
_IGNORED = re.compile(
    r'model\.(layers\.\d+\.self_attn\.)?rotary_emb\.'
    r'(inv_freq|cos_cached|sin_cached)')
_EMBEDDING, _UNEMBEDDING = 'embedding', 'unembedding'
# Rows of the embedding that are compared at once.
_ROWS = 4096


class _Place(NamedTuple):
  """Where a tensor lies: its file, its name there, whether to transpose."""

  file: pathlib.Path
  name: str
  transpose: bool

  def read(self, index: tuple[slice, ...], dtype: Any) -> np.ndarray:
    """The part of our array that `index` cuts out.

    The file is opened for each part and closed after: the pages of an open
    one stay in memory.
    """
    with _open(self.file) as tensors:
      index = index[::-1] if self.transpose else index
      array = tensors.get_slice(self.name)[index]
    array = array.T if self.transpose else array
    return array.astype(dtype, copy=False)


def check(folder: pathlib.Path, table: _layout.NameTable,
          shapes: Mapping[str, Any]) -> None:
  """Compares a folder's files with the model, by their headers.

  A model whose embedding also makes the logits may carry a copy of it for
  them; it must be a copy.

  Raises:
    ValueError: what is missing, unexpected, of another shape or dtype, or not
      the same though it should be.
  """
  found, spare = _find(folder, table, shapes)
  if spare is None:
    return
  rows, width = shapes[_EMBEDDING].shape
  for start in range(0, rows, _ROWS):
    index = (slice(start, min(start + _ROWS, rows)), slice(0, width))
    ours, theirs = (place._replace(transpose=False).read(index, np.float32)
                    for place in (found[_EMBEDDING], spare))
    if not np.array_equal(ours, theirs):
      raise ValueError(
          f'{spare.file}: config.json says tie_word_embeddings, but '
          f'{spare.name} is not the embedding; expected the same numbers or '
          'none, or tie_word_embeddings false.')


def load(folder: pathlib.Path, table: _layout.NameTable,
         shapes: Mapping[str, Any], shardings: Any = None) -> dict[str, Any]:
  """Parameters of a folder, in the dtypes of `shapes`.

  Args:
    folder: the model folder.
    table: how the family's names map.
    shapes: the parameters wanted, a nested dict of ShapeDtypeStruct.
    shardings: a tree like it of shardings; None = arrays of numpy.

  Raises:
    ValueError: the files do not fit the model.
  """
  wanted = flax.traverse_util.flatten_dict(shapes, sep='/')
  places, _ = _find(folder, table, shapes)
  by_path = (None if shardings is None else
             flax.traverse_util.flatten_dict(shardings, sep='/'))
  found = {}
  # The largest first: what is read and what is copied from it are in memory
  # together, and that counts least while little else is.
  for path in sorted(wanted, key=lambda path: -wanted[path].size):
    shape, dtype = wanted[path].shape, wanted[path].dtype
    read = lambda index, place=places[path], dtype=dtype: place.read(index,
                                                                     dtype)
    if by_path is None:
      found[path] = read((slice(None),) * len(shape))
    else:
      found[path] = jax.make_array_from_callback(shape, by_path[path], read,
                                                 dtype=dtype)
      # Or the reads run ahead of the copies to the devices.
      found[path].block_until_ready()
  return flax.traverse_util.unflatten_dict(found, sep='/')


def _find(folder: pathlib.Path, table: _layout.NameTable,
          shapes: Mapping[str, Any],
          ) -> tuple[dict[str, _Place], _Place | None]:
  """({our path: place}, place of a tied model's second embedding)."""
  wanted = flax.traverse_util.flatten_dict(shapes, sep='/')
  found, unexpected, wrong = {}, [], []
  spare = None
  for file, listed in _files(pathlib.Path(folder)).items():
    with _open(file) as tensors:
      names = set(tensors.keys())
      if listed is not None and names != listed:
        raise ValueError(
            f'{file}: {_layout.INDEX} and the file differ; not in the file '
            f'{_short(sorted(listed - names))}; not in the index '
            f'{_short(sorted(names - listed))}.')
      for name in sorted(names):
        if _IGNORED.fullmatch(name):
          continue
        path, transpose = _layout.to_ours(name, table)
        place = _Place(file, name, transpose)
        if path == _UNEMBEDDING and path not in wanted:
          spare, path = place, _EMBEDDING
          transpose = False
        elif path in wanted:
          found[path] = place
        else:
          unexpected.append(name)
          continue
        header = tensors.get_slice(name)
        shape, kind = tuple(header.get_shape()), header.get_dtype()
        shape = shape[::-1] if transpose else shape
        if shape != wanted[path].shape or kind not in _layout.DTYPES:
          wrong.append(f'{name} {kind} {shape}, expected '
                       f'{wanted[path].shape}')
  missing = [_layout.to_foreign(path, table)[0] for path in wanted
             if path not in found]
  if missing or unexpected or wrong:
    raise ValueError(
        f'{folder}: the weights do not fit the model; missing '
        f'{_short(missing)}; unexpected {_short(unexpected)}; of another '
        f'shape or not of {sorted(_layout.DTYPES)} {_short(wrong)}.')
  return found, spare


def _files(folder: pathlib.Path) -> dict[pathlib.Path, set[str] | None]:
  """The folder's weights: {file: the names it should hold, None = any}."""
  there = {file.name for file in folder.glob('*.safetensors')}
  index = folder / _layout.INDEX
  if not index.is_file():
    if len(there) != 1:
      raise ValueError(
          f'{folder}: got {sorted(there) or "no *.safetensors"}; expected the '
          f'weights in one such file, or in several and {_layout.INDEX}.')
    return {folder / there.pop(): None}
  try:
    files = {}
    for name, file in json.loads(index.read_text())['weight_map'].items():
      files.setdefault(str(file), set()).add(name)
  except (OSError, ValueError, KeyError, TypeError, AttributeError,
          RecursionError) as error:
    raise ValueError(f'{index}: expected an object weight_map of names and '
                     f'files: {error!r}.') from error
  # Names alone: a path would lead out of the folder.
  if set(files) != there:
    raise ValueError(
        f'{folder}: {_layout.INDEX} and the files differ; not there '
        f'{_short(sorted(set(files) - there))}; not in the index '
        f'{_short(sorted(there - set(files)))}.')
  return {folder / file: names for file, names in files.items()}


def _open(file: pathlib.Path):
  """A safetensors file; opening it checks that the header fits its size."""
  try:
    return safetensors.safe_open(file, framework='numpy')
  except (safetensors.SafetensorError, OSError) as error:
    raise ValueError(f'{file}: expected a safetensors file: {error}.'
                     ) from error


def _short(names: Sequence[str], limit: int = 6) -> str:
  more = f' and {len(names) - limit} more' if len(names) > limit else ''
  return f'{list(names[:limit])}{more}' if names else 'nothing'
