# SPDX-License-Identifier: Apache-2.0
"""What becomes of every row of published problem files, and how fast.

  python experiments/problems/measure.py --data=<folder>

Builds each JSON, JSONL or parquet file of the folder into an empty cache,
opens it again as a grading worker does, and reads it. Prints two tables.
"""

import argparse
import collections
import pathlib
import tempfile
import time

# Both imported first: they are no part of what is timed.
import math_verify  # noqa: F401
import tensorflow_datasets  # noqa: F401

from lapo_jax import plugins
from lapo_jax.tasks import _rows

_SUFFIXES = ('.json', '.jsonl', '.parquet')


def _timed(function):
  start = time.perf_counter()
  return function(), time.perf_counter() - start


def _row(*cells):
  print('| ' + ' | '.join(map(str, cells)) + ' |', flush=True)


def _names(counts):
  return ', '.join(f'{n} {name}' for name, n in counts.items()) or 'none'


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--data', type=pathlib.Path, required=True)
  flags = parser.parse_args()
  paths = sorted(path for path in flags.data.iterdir()
                 if path.suffix in _SUFFIXES)

  _row('file', 'rows', 'kept', 'dropped', 'build, s', 'open, ms', 'read, s',
       'fingerprint')
  _row(*8 * ['---'])
  for path in paths:
    name = 'gsm8k' if 'gsm8k' in path.name else 'math'
    with tempfile.TemporaryDirectory() as cache:
      make = lambda name=name, path=path, cache=cache: plugins.make(
          'tasks', name, path=str(path), cache=cache)
      _, built = _timed(make)
      task, opened = _timed(make)
      _, read = _timed(lambda task=task: task[0])
    file, = task.manifest['files']
    _row(path.name, f'{file["rows"]:,}', f'{file["kept"]:,}',
         _names(file['dropped']), f'{built:.2f}', f'{1000 * opened:.0f}',
         f'{read:.2f}', task.manifest['fingerprint'][:12])

  print()
  _row('file', 'rows by answer type')
  _row('---', '---')
  for path in paths:
    types = collections.Counter(
        row.fields['answer_type'] for row in _rows.rows(path.read_bytes())
        if row.fields and 'answer_type' in row.fields)
    if types:
      _row(path.name, _names(types))


if __name__ == '__main__':
  main()
