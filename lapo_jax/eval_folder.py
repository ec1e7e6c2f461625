# SPDX-License-Identifier: Apache-2.0
"""The folder of an evaluation: what of it is done, and another's scores.

chunks.jsonl holds graded rows, a line a chunk, eval.json the scores in the
end. Process 0 alone reads and writes the rows; what is done is told to the
others, so that all do the same.
"""

from collections.abc import Iterable
import json
import os
import pathlib
from typing import Any

import jax
import numpy as np

from lapo_jax import metrics, scores, sharding

Key = tuple[str, int]


class Log:
  """chunks.jsonl; a line is on disk when `append` returns."""

  def __init__(self, folder: pathlib.Path):
    """Reads the lines, and cuts off one that a kill has torn.

    Raises:
      ValueError: another line is damaged.
    """
    self._active = jax.process_index() == 0
    self._rows: dict[Key, dict[tuple[int, int], scores.Row]] = {}
    self._seconds: dict[Key, np.ndarray] = {}
    self._path = folder / 'chunks.jsonl'
    if not self._active or not self._path.exists():
      return
    text = self._path.read_bytes()
    whole = text[:text.rfind(b'\n') + 1]
    if whole != text:
      os.truncate(self._path, len(whole))
    for number, line in enumerate(whole.splitlines(), 1):
      try:
        self._take(**json.loads(line))
      except (ValueError, TypeError) as error:
        raise ValueError(
            f'{self._path}, line {number}: expected a chunk as it was written: '
            f'{error}. Delete the line, and it is done again.') from error

  def done(self, wanted: Iterable[tuple[Key, np.ndarray, range]]) -> np.ndarray:
    """Whether all rows of each (pass, problems, samples) are here, bool [n].

    The same on every process.
    """
    flags = np.array([
        all((problem, sample) in self._rows.get(key, {})
            for problem in problems.tolist() for sample in samples)
        for key, problems, samples in wanted], np.int32)
    known = np.arange(len(flags) if self._active else 0)
    return sharding.from_hosts(known, flags[known], len(flags)) > 0

  def append(self, key: Key, rows: list[scores.Row],
             seconds: tuple[float, float]) -> None:
    """Adds a chunk of a pass."""
    if not self._active:
      return
    record = {'benchmark': key[0], 'budget': key[1], 'seconds': seconds,
              'rows': rows}
    with self._path.open('ab') as file:
      file.write(metrics.to_json(record).encode() + b'\n')
      file.flush()
      os.fsync(file.fileno())
    self._take(**record)

  def rows(self, key: Key, problems: np.ndarray,
           num_samples: int) -> list[scores.Row]:
    """The rows of these problems, each with its first samples."""
    mine = self._rows[key]
    return [mine[problem, sample] for problem in problems.tolist()
            for sample in range(num_samples)]

  def seconds(self, key: Key) -> dict[str, float]:
    """What sampling and grading took, over all starts."""
    return dict(zip(('sample', 'grade'), self._seconds[key].tolist(),
                    strict=True))

  def _take(self, benchmark: str, budget: int, seconds: Iterable[float],
            rows: Iterable[Any]) -> None:
    mine = self._rows.setdefault((benchmark, budget), {})
    for *numbers, words in rows:
      row = scores.Row(*numbers, tuple(words))
      mine[row.problem, row.sample] = row
    self._seconds[benchmark, budget] = np.add(
        self._seconds.get((benchmark, budget), 0.0), tuple(seconds))


def read_base(folder: str, problems: dict[str, str],
              cap: int) -> dict[str, Any] | None:
  """The scores of a finished evaluation, None for ''.

  Raises:
    ValueError: there is none, or it asked other problems or under another cap.
  """
  if not folder:
    return None
  try:
    found = json.loads((pathlib.Path(folder) / 'eval.json').read_text())
    theirs = {name: b['data'] for name, b in found['benchmarks'].items()}
    their_cap = found['max_completion_length']
  except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
    raise ValueError(f'base_run {folder!r}: expected the folder of a finished '
                     f'evaluation, with eval.json: {error!r}.') from error
  if theirs != problems or their_cap != cap:
    raise ValueError(
        f'base_run {folder!r}: its problems of {sorted(theirs)} under a cap of '
        f'{their_cap} tokens are not those of {sorted(problems)} under {cap}: '
        'evaluate both alike.')
  return found
