# SPDX-License-Identifier: Apache-2.0
"""Chooses problems from one or several files, by count, weight and level.

What is chosen of a file is a pure function of the seed and of the file: the
problems whose hash of seed and text is lowest. So a larger count only adds to
a smaller one, and a row added to the file moves no other. Problems of one
file keep its order. Those of several are ordered by the same hash, so that
any cut of the whole is a mixture too.
"""

from collections.abc import Callable, Mapping, Sequence
import hashlib
import math
import os
from typing import Any, NamedTuple

from lapo_jax.tasks import _problems

_KEYS = ('path', 'count', 'weight', 'levels')


class Wanted(NamedTuple):
  """A file and what is wanted of it.

  Attributes:
    path: of the file.
    count: number of problems, 0 = all.
    levels: their levels, as an Example names them; () = all.
  """

  path: str
  count: int
  levels: tuple[str, ...] = ()


def wanted(path: str, sources: Sequence[Any],
           num_examples: int) -> list[Wanted]:
  """The files that the settings of a task ask for, none opened yet.

  Args:
    path: a file; with sources, the folder of their relative paths.
    sources: mappings of 'path', either 'count' or 'weight', and 'levels'.
    num_examples: of the one file, 0 = all; or what weights share.

  Raises:
    ValueError: settings that do not fit.
  """
  if num_examples < 0:
    raise ValueError(f'task.num_examples {num_examples}: expected 0 for all or '
                     'a number of problems.')
  if not sources:
    return [Wanted(path, num_examples)]
  for i, source in enumerate(sources):
    _check(f'task.sources[{i}]', source)
  weights = [source['weight'] for source in sources if 'weight' in source]
  if not weights and num_examples:
    raise ValueError(f'task.num_examples {num_examples}: expected 0 where the '
                     'sources give counts.')
  if weights and (len(weights) < len(sources) or not num_examples):
    raise ValueError('task.sources by weight: expected a weight for every '
                     f'source and num_examples above 0, got {len(weights)} '
                     f'weights of {len(sources)} and {num_examples}.')
  counts = (_shares(weights, num_examples) if weights else
            [source['count'] for source in sources])
  return [Wanted(os.path.join(path, source['path']), count,
                 tuple(map(level, source.get('levels') or ())))
          for source, count in zip(sources, counts, strict=True)]


def mix(parts: Sequence[Wanted], files: Sequence[_problems.Prepared],
        seed: int) -> tuple[Callable[[], list[_problems.Named]], list[dict]]:
  """What `_problems.Problems` wants: a function that reads, and the entries.

  Args:
    parts: what is wanted of each file.
    files: the files, prepared.
    seed: chooses.

  Raises:
    ValueError: a file with too few problems, or one that is asked twice for
      the same ones.
  """
  counts = []
  for i, (part, file) in enumerate(zip(parts, files, strict=True)):
    known = sum(number for name, number in file.levels.items()
                if not part.levels or name in part.levels)
    counts.append(part.count or known)
    if counts[-1] > known or not known:
      levels = f' of level {", ".join(part.levels)}' if part.levels else ''
      raise ValueError(f'{part.path} has {known:,} problems{levels}, asked for '
                       f'{part.count or "all":,}: lower its count.')
    for other, known_file in zip(parts[:i], files, strict=False):
      apart = part.levels and other.levels and not (
          set(part.levels) & set(other.levels))
      if known_file.entry['sha256'] == file.entry['sha256'] and not apart:
        raise ValueError(f'{part.path} repeats the problems of {other.path}: '
                         'expected each file once, or levels apart.')

  def load() -> list[_problems.Named]:
    chosen = []
    for part, file, count in zip(parts, files, counts, strict=True):
      chosen += _choose(file.problems(), part.levels, count, seed)
    if len(parts) > 1:
      chosen.sort(key=lambda ranked: ranked[0])
    return [named for _, named in chosen]

  return load, [{**file.entry, 'chosen': count}
                for file, count in zip(files, counts, strict=True)]


def level(number: float | int) -> str:
  """A level's name: 5.0 is '5', 4.25 is '4.25'."""
  return f'{number:g}'


def _choose(problems: list[_problems.Named], levels: tuple[str, ...],
            count: int, seed: int) -> list[tuple[bytes, _problems.Named]]:
  """(rank, problem) of the `count` problems of lowest rank, in file order."""
  ranked = []
  for row, (name, example) in enumerate(problems):
    if not levels or example.level in levels:
      text = f'{seed}\0{example.question}\0{example.answer}'
      rank = hashlib.sha256(text.encode()).digest()
      ranked.append((rank, row, (name, example)))
  chosen = sorted(ranked, key=lambda x: x[:2])[:count]
  return [(rank, named) for rank, _, named in sorted(
      chosen, key=lambda x: x[1])]


def _shares(weights: Sequence[float | int], total: int) -> list[int]:
  """Whole numbers in proportion to the weights, with this total."""
  exact = [weight / sum(weights) * total for weight in weights]
  shares = [math.floor(share) for share in exact]
  # The largest remainders take what is left, the first of equal ones first.
  order = sorted(range(len(exact)), key=lambda i: shares[i] - exact[i])
  for i in order[:total - sum(shares)]:
    shares[i] += 1
  if not all(shares):
    raise ValueError(f'task.num_examples {total} leaves nothing for a source '
                     f'of weights {list(weights)}: raise it.')
  return shares


def _check(name: str, source: Any) -> None:
  """Checks the settings of a source."""
  if not isinstance(source, Mapping) or not set(source) <= set(_KEYS):
    raise ValueError(f'{name}: expected a mapping with keys among {_KEYS}, got '
                     f'{source!r}.')
  if not isinstance(source.get('path'), str) or not source['path']:
    raise ValueError(f'{name}: expected a "path", got {source!r}.')
  amounts = [key for key in ('count', 'weight') if key in source]
  if len(amounts) != 1 or not _is_number(source[amounts[0]]) or (
      source[amounts[0]] <= 0) or not isinstance(source.get('count', 1), int):
    raise ValueError(f'{name}: expected either "count", a whole number above '
                     f'0, or "weight", a number above 0, got {source!r}.')
  levels = source.get('levels') or ()
  if not isinstance(levels, Sequence) or not all(map(_is_number, levels)):
    raise ValueError(f'{name} levels: expected numbers such as (3, 4, 5), got '
                     f'{levels!r}.')


def _is_number(value: Any) -> bool:
  return (isinstance(value, int | float) and not isinstance(value, bool) and
          math.isfinite(value))
