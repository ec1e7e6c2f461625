# SPDX-License-Identifier: Apache-2.0
"""From foreign files to problems: checked, counted and kept in a cache.

A file is parsed once per content: its problems lie in the cache under a name
that holds a hash of the file's bytes and of the code that read them, so that
changed files and changed code are read anew. The order of the file is the
order of the problems.

A row ends in one of three ways: it is a problem; it is left out for a reason
of the data set, such as an answer that nobody could grade; or it is bad, not
as it should be, which is an error unless the caller drops such rows. All that
is left out is counted by reason.
"""

import collections
from collections.abc import Callable, Iterator
import functools
import hashlib
import json
import pathlib
import re
import sys
from typing import Any, NamedTuple

from absl import logging
from etils import epath

from lapo_jax import types
from lapo_jax.tasks import _builder, _rows

BAD_ROWS = ('refuse', 'drop')

# Fields of a row -> its problem, or the reason why it is left out; raises
# `_rows.BadRow` for a row that is not as it should be.
Parse = Callable[[dict[str, Any]], types.Example | str]

# A problem under its id: the row's `unique_id` or `id`, else '#' and the row's
# number, which counts from 1.
Named = tuple[str, types.Example]


class Prepared(NamedTuple):
  """A file whose problems lie in the cache.

  Attributes:
    folder: where they lie.
    levels: number of problems by level.
    entry: the manifest's entry: 'file' (its name), 'sha256', 'rows', 'kept',
      'dropped' by reason.
  """

  folder: pathlib.Path
  levels: dict[str, int]
  entry: dict[str, Any]

  def problems(self) -> list[Named]:
    """The problems, in the file's order."""
    return [_named(record) for record in _builder.read(self.folder)]


class Problems:
  """Problems held in memory from their first use on; a task adds `grade`."""

  def __init__(self, load: Callable[[], list[Named]],
               files: list[dict[str, Any]], thinking: bool):
    """Keeps what is known of the problems without reading them.

    Args:
      load: gives the problems.
      files: the manifest's entries, with 'chosen', the number of problems
        that each file gives.
      thinking: whether prompts open `<think>`.
    """
    self._load = load
    self._files = files
    self._thinking = thinking

  @functools.cached_property
  def _problems(self) -> list[Named]:
    return self._load()

  @functools.cached_property
  def ids(self) -> list[str]:
    """The id that each problem has in its file."""
    return [name for name, _ in self._problems]

  @property
  def manifest(self) -> dict[str, Any]:
    """What the problems are made of.

    'files': of each, 'file', 'sha256', 'rows' read, 'kept', 'dropped' by
    reason, and 'chosen' of those kept. 'fingerprint': SHA-256 of the problems
    in their order.
    """
    found = hashlib.sha256()
    for named in self._problems:
      found.update(json.dumps(_record(*named)).encode() + b'\n')
    return {'files': self._files, 'fingerprint': found.hexdigest()}

  def __len__(self) -> int:
    return sum(file['chosen'] for file in self._files)

  def __getitem__(self, index: int) -> types.Example:
    return self._problems[index][1]


def prepare(path: str, parse: Parse, bad_rows: str, cache: str) -> Prepared:
  """Puts a file's problems into the cache, unless they are there.

  Args:
    path: a JSON array, JSON lines or parquet file, local or on gs://.
    parse: reads a row.
    bad_rows: 'refuse' or 'drop' rows that are not as they should be.
    cache: folder, '' = ~/.cache/lapo_jax/datasets.

  Raises:
    ValueError: an unreadable file, a bad row, or no problem left; the message
      names the file and the place in it.
  """
  if bad_rows not in BAD_ROWS:
    raise ValueError(f'task.bad_rows {bad_rows!r}: expected one of {BAD_ROWS}.')
  if '://' in path and not path.startswith('gs://'):
    raise ValueError(f'task.path {path!r}: expected a local file, or one on '
                     'gs://.')
  try:
    data = epath.Path(path).read_bytes()
  except OSError as error:
    raise ValueError(f'cannot read {path!r} ({error}): set --config.task.path='
                     '... to a JSON, JSONL or parquet file.') from error
  digest = hashlib.sha256(data).hexdigest()
  name = re.sub(r'[^A-Za-z0-9]+', '_', pathlib.Path(path).stem)[:40]
  folder = _builder.cache_folder(cache, name, digest,
                                 sys.modules[parse.__module__].__file__)
  if not folder.exists():
    problems, summary = _read(path, data, parse, bad_rows)
    _builder.write(folder, [_record(*named) for named in problems], summary)
  summary = _builder.read_summary(folder)
  levels, fault = summary.pop('levels'), summary.pop('fault')
  if fault and bad_rows == 'refuse':  # another run dropped it
    raise ValueError(f'{path}, {fault}')
  return Prepared(folder, levels, {'file': pathlib.Path(path).name,
                                   'sha256': digest, **summary})


def _read(path: str, data: bytes, parse: Parse,
          bad_rows: str) -> tuple[list[Named], dict[str, Any]]:
  """The problems of a file and what is to be known without reading them."""
  problems, dropped, num_rows, fault = [], collections.Counter(), 0, ''
  try:
    for place, name, found in _parsed(_rows.rows(data), parse):
      num_rows += 1
      if isinstance(found, types.Example):
        problems.append((name, found))
        continue
      if isinstance(found, _rows.BadRow):
        fault = fault or (f'{place}: {found}. (--config.task.bad_rows=drop '
                          'leaves such rows out.)')
        if bad_rows == 'refuse':
          raise ValueError(fault)
        found = found.reason
      dropped[found] += 1
  except ValueError as error:
    raise ValueError(f'{path}, {error}') from error
  if not problems:
    raise ValueError(f'{path} holds no problems: {num_rows} rows read, dropped '
                     f'{dict(dropped)}.')
  if dropped:
    logging.info('%s: %d rows, dropped %s', path, num_rows, dict(dropped))
  levels = collections.Counter(example.level for _, example in problems)
  return problems, {'rows': num_rows, 'kept': len(problems),
                    'dropped': dict(dropped), 'levels': dict(levels),
                    'fault': fault}


def _parsed(rows: Iterator[_rows.Row], parse: Parse) -> Iterator[
    tuple[str, str, types.Example | str | _rows.BadRow]]:
  """(place, id, problem or what is against it) of each row; ids differ."""
  places = {}
  for number, row in enumerate(rows, start=1):
    name, found = '', row.fault
    if found is None:
      try:
        name = _id(row.fields, number)
        if name in places:
          raise _rows.BadRow('duplicate id', f'that of {places[name]}')
        places[name] = row.place
        found = parse(row.fields)
      except _rows.BadRow as fault:
        found = fault
    yield row.place, name, found


def _id(fields: dict[str, Any], number: int) -> str:
  """The row's id; BadRow says why it has none."""
  for field in ('unique_id', 'id'):
    value = fields.get(field)
    if isinstance(value, int) and not isinstance(value, bool):
      return str(value)
    if value is not None:
      return _rows.text(fields, field)
  return f'#{number}'


def _record(name: str, example: types.Example) -> _builder.Record:
  """What a file decides of a problem."""
  return {'id': name, 'question': example.question, 'answer': example.answer,
          'unit': example.unit, 'tolerance': repr(example.tolerance),
          'level': example.level}


def _named(record: _builder.Record) -> Named:
  fields = dict(record)
  name, tolerance = fields.pop('id'), fields.pop('tolerance')
  return name, types.Example(**fields, tolerance=float(tolerance))
