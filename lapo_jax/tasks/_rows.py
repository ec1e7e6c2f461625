# SPDX-License-Identifier: Apache-2.0
"""Reads the rows of foreign files: a JSON array, JSON lines or parquet.

What a file is its first bytes say, not its name. A byte order mark and Windows
line ends are accepted. A row that cannot be used comes with its fault, so that
the caller may go on; a file whose rest cannot be read is refused.

Nothing in a file is trusted: messages quote little of it, and values nested
deeper than Python's stack are a fault like any other.
"""

from collections.abc import Iterator
import json
import re
from typing import Any, NamedTuple

_BOM = b'\xef\xbb\xbf'
_PARQUET = b'PAR1'
_BLANKS = re.compile(r'[ \t\r\n]*')
_DECODER = json.JSONDecoder()
_MAX_QUOTED = 100
_KINDS = {type(None): 'null', str: 'text', bool: 'a truth value',
          int: 'a number', float: 'a number', list: 'an array',
          dict: 'an object'}


class BadRow(ValueError):
  """What is wrong with a row.

  Attributes:
    reason: the kind of fault, the same for all rows that have it.
  """

  def __init__(self, reason: str, found: str):
    super().__init__(f'{reason}: {found}')
    self.reason = reason


class Row(NamedTuple):
  """A row of a file: its fields, or the fault that hides them.

  Attributes:
    place: where in the file, counted from 1: 'line 7', 'row 7'.
    fields: values by name, None with a fault.
    fault: None with fields.
  """

  place: str
  fields: dict[str, Any] | None
  fault: BadRow | None


def rows(data: bytes) -> Iterator[Row]:
  """The rows of a file, in its order.

  Args:
    data: the whole file.

  Raises:
    ValueError: the rest of the file cannot be read; says where that begins.
  """
  if data.startswith(_PARQUET):
    return _parquet(data)
  data = data.removeprefix(_BOM)
  return _array(data) if data.lstrip().startswith(b'[') else _lines(data)


def text(fields: dict[str, Any], name: str) -> str:
  """The text of a field that a row must have.

  Raises:
    BadRow: the field is absent, empty or holds something else.
  """
  if name not in fields:
    names = ', '.join(map(repr, fields))[:_MAX_QUOTED]
    raise BadRow(f'no field {name!r}', f'the row has {names or "none"}')
  value = fields[name]
  if not isinstance(value, str):
    raise BadRow(f'field {name!r} is not text', f'got {kind(value)}')
  if not value.strip():
    raise BadRow(f'field {name!r} is empty', 'expected text')
  try:
    value.encode()
  except UnicodeEncodeError as error:
    raise BadRow(f'field {name!r} is not Unicode',
                 f'half a character at {error.start}') from error
  return value


def kind(value: Any) -> str:
  """What a value is, in words."""
  return _KINDS.get(type(value), type(value).__name__)


def _lines(data: bytes) -> Iterator[Row]:
  """Rows of JSON lines; each stands for itself."""
  for number, line in enumerate(data.split(b'\n'), start=1):
    if line.strip():
      try:
        found = _row(f'line {number}', json.loads(line.decode()))
      except UnicodeDecodeError as error:
        found = _fault(f'line {number}', 'not UTF-8', f'at byte {error.start}')
      except json.JSONDecodeError as error:
        found = _fault(f'line {number}', 'not JSON',
                       f'{error.msg} at column {error.colno}')
      except (ValueError, RecursionError) as error:
        found = _fault(f'line {number}', 'not JSON that can be read',
                       _first_line(error))
      yield found


def _array(data: bytes) -> Iterator[Row]:
  """Rows of a JSON array; what follows a broken one cannot be told apart."""
  try:
    letters = data.decode()
  except UnicodeDecodeError as error:
    line = 1 + data.count(b'\n', 0, error.start)
    raise ValueError(f'line {line}: not UTF-8.') from error
  at, number, line, counted = letters.index('['), 0, 1, 0
  while letters[at] != ']':
    at = _skip(letters, at + 1)
    if not number and letters.startswith(']', at):
      break  # an empty array
    number, line = number + 1, line + letters.count('\n', counted, at)
    counted = at
    try:
      value, at = _DECODER.raw_decode(letters, at)
      at = _skip(letters, at)
      if not letters.startswith((',', ']'), at):
        raise json.JSONDecodeError('Expecting , or ]', letters, at)
    except json.JSONDecodeError as error:
      raise ValueError(
          f'row {number}, line {error.lineno}: not JSON: {error.msg} at column '
          f'{error.colno}; the rest of the array cannot be read.') from error
    except (ValueError, RecursionError) as error:
      raise ValueError(
          f'row {number}, line {line}: not JSON that can be read: '
          f'{_first_line(error)}; nor can the rest of the array.') from error
    yield _row(f'row {number}, line {line}', value)
  rest = _skip(letters, at + 1)
  if rest < len(letters):
    line += letters.count('\n', counted, rest)
    raise ValueError(f'line {line}: not JSON: more after the end of the array.')


def _parquet(data: bytes) -> Iterator[Row]:
  """Rows of a parquet file."""
  try:
    import pyarrow
    import pyarrow.parquet
  except ImportError as error:
    raise ValueError('a parquet file needs pyarrow: pip install pyarrow.'
                     ) from error
  try:
    found = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(data)).read()
    values = found.to_pylist()
  except (pyarrow.ArrowException, ValueError, OSError) as error:
    raise ValueError(f'not parquet that can be read: {_first_line(error)}'
                     ) from error
  for number, value in enumerate(values, start=1):
    yield _row(f'row {number}', value)


def _row(place: str, value: Any) -> Row:
  if isinstance(value, dict):
    return Row(place, value, None)
  return _fault(place, 'not an object with fields', f'got {kind(value)}')


def _fault(place: str, reason: str, found: str) -> Row:
  return Row(place, None, BadRow(reason, found))


def _first_line(error: Exception) -> str:
  if isinstance(error, RecursionError):
    return 'nested too deeply'
  return str(error).split('\n', 1)[0][:_MAX_QUOTED]


def _skip(letters: str, at: int) -> int:
  """Where the next letter that is not blank stands."""
  return _BLANKS.match(letters, at).end()
