# SPDX-License-Identifier: Apache-2.0
"""How fast is grading, and what does a batch of hostile answers cost?

  python experiments/grading/measure.py --data=<folder with the data sets>

Prints pairs a second of the first tier, the time of an item through the
`Grader`, and of 256 hostile answers the time, the verdicts and what became of
the memory of this process.
"""

import argparse
import collections
import pathlib
import random
import sys
import time

import numpy as np
import pairs

from lapo_jax import grader, types
from lapo_jax.tasks import _equivalence

_NUM_ORDINARY = 1000


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--data', required=True)
  flags = parser.parse_args()
  ordinary = pairs.ordinary(flags.data)
  ordinary = random.Random(0).sample(ordinary, _NUM_ORDINARY)

  start, cpu = time.perf_counter(), time.process_time()
  decided = [_equivalence.decide(answer, gold) for _, answer, gold in ordinary]
  wall, cpu = time.perf_counter() - start, time.process_time() - cpu
  print(f'first tier: {_NUM_ORDINARY / cpu:.0f} pairs a second of CPU, '
        f'{_NUM_ORDINARY / wall:.0f} by the clock, '
        f'{decided.count(None)} of {_NUM_ORDINARY} left open')

  sys.path.append(str(pathlib.Path(__file__).parents[1]))  # for workers
  with grader.Grader(('grading.boxed', {})) as it:
    _time_items(it, ordinary)
    _time_hostile(it)


def _time_items(it: grader.Grader, ordinary: list) -> None:
  """Items one at a time, then all in one call."""
  texts = [_completion(answer) for _, answer, _ in ordinary]
  examples = [types.Example(question='', answer=gold)
              for _, _, gold in ordinary]
  it.grade(texts[:1], examples[:1])
  seconds = []
  for text, example in zip(texts, examples, strict=True):
    start = time.perf_counter()
    it.grade([text], [example])
    seconds.append(time.perf_counter() - start)
  p50, p99 = np.percentile(seconds, (50, 99)) * 1e3
  print(f'an item through the grader: p50 {p50:.2f} ms, p99 {p99:.2f} ms, '
        f'largest {max(seconds) * 1e3:.0f} ms')
  start = time.perf_counter()
  it.grade(texts, examples)
  print(f'{len(texts)} items in one call: '
        f'{len(texts) / (time.perf_counter() - start):.0f} a second, '
        f'{it.counts}')


def _time_hostile(it: grader.Grader) -> None:
  """Every answer is hostile, and half of the golds want the second tier."""
  answers = pairs.hostile()
  texts = [_completion(answer) for answer in answers]
  examples = [types.Example(question='', answer=(r'\log_2 8', '5')[i % 2])
              for i in range(len(texts))]
  before, start = _memory(), time.perf_counter()
  results = it.grade(texts, examples)
  wall = time.perf_counter() - start
  print(f'{len(results)} hostile answers: {wall:.1f} s, {it.counts}, memory of '
        f'this process {before / 2**20:.1f} MiB before, '
        f'{_memory() / 2**20:.1f} after')
  slow = collections.Counter(
      answers[i][:40] for i, result in enumerate(results)
      if result['verdict'] in ('timeout', 'crash', 'correct'))
  print(f'not wrong or unparsed: {dict(slow)}')


def _completion(answer: str) -> str:
  return f'Let me think.</think>The answer is \\boxed{{{answer}}}.'


def _memory() -> int:
  """Bytes of this process in memory."""
  for line in pathlib.Path('/proc/self/status').read_text().splitlines():
    if line.startswith('VmRSS:'):
      return int(line.split()[1]) * 1024
  raise OSError('no VmRSS: this script needs Linux')


if __name__ == '__main__':
  main()
