# SPDX-License-Identifier: Apache-2.0
"""What part of a step of the tiny run is neither programs nor grading?

  python -m experiments.speed.overhead

Trains configs/tiny.py for some steps. Each program that the loop calls is
timed until its results are there, grading by the loop's own clock; the rest
of the time from one step to the next is Python's: choosing and encoding
prompts, rewards and advantages, logging. Evaluation and checkpoints are off.
What the sampler does on the host between its own programs counts as programs.
"""

import argparse
import datetime
import json
import pathlib
import tempfile
import time
from typing import Any

import jax
import numpy as np

from configs import tiny
from lapo_jax import train

_PROGRAMS = ('to_sampler', 'sample', 'make_batch', 'score', 'update')
# Steps that compile: completions' lengths give the update several shapes.
_WARM = 4


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--steps', type=int, default=12)
  flags = parser.parse_args()
  jax.config.update('jax_platforms', 'cpu')
  found = measure(flags.steps)
  print(f'{datetime.date.today()}, jax {jax.__version__}, medians of '
        f'{flags.steps - _WARM - 1} steps\n')
  print('| a step, s | programs | grading | the rest, ms | share |\n'
        '|---|---|---|---|---|')
  step, programs, grading = np.median(found, axis=0)
  rest = np.median(found[:, 0] - found[:, 1] - found[:, 2])
  share = np.median(1 - (found[:, 1] + found[:, 2]) / found[:, 0])
  print(f'| {step:.2f} | {programs:.2f} | {grading:.2f} | {1e3 * rest:.0f} | '
        f'{100 * share:.1f} % |')


def measure(steps: int) -> np.ndarray:
  """[steps, 3]: seconds of a step, of its programs, of grading."""
  config = tiny.get_config('accuracy')
  config.total_steps = steps
  config.eval_every = config.checkpoint_every = 0
  config.eval.num_examples = 8
  starts, spent = [], []
  with tempfile.TemporaryDirectory() as folder:
    run, = train.prepare(config, folder)
    run = run._replace(**{
        name: _timed(getattr(run, name), name == 'to_sampler', starts, spent)
        for name in _PROGRAMS})
    train.train([run], folder)
    lines = (pathlib.Path(folder) / 'metrics.jsonl').read_text().splitlines()
  rows = [row for row in map(json.loads, lines) if 'time/grade' in row]
  # Evaluations before the first step and after the last begin so too.
  first = len(starts) - 1 - steps
  starts, spent = starts[first:], spent[first:]
  return np.array([
      (starts[i + 1] - starts[i], spent[i], rows[i]['time/grade'])
      for i in range(_WARM, steps - 1)])


def _timed(program: Any, is_first: bool, starts: list, spent: list) -> Any:
  """The program, whose time is added to its step's; the first begins one."""

  def run(*arguments: Any, **settings: Any) -> Any:
    start = time.perf_counter()
    if is_first:
      starts.append(start)
      spent.append(0.0)
    found = jax.block_until_ready(program(*arguments, **settings))
    spent[-1] += time.perf_counter() - start
    return found

  return run


if __name__ == '__main__':
  main()
