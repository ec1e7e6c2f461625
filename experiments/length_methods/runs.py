# SPDX-License-Identifier: Apache-2.0
"""Every method from one base, several seeds: runs what is missing, then tells.

  python experiments/length_methods/runs.py --workdir=runs/length_methods

Each run is the program's own command in a process of its own; a run that is
already complete is not repeated, one that was killed goes on. All arms of a
seed come before the next seed, so that what there is at any time is balanced.
A run that fails does not stop the others. Writes table.md after every run,
and at the end report.html and the pictures; --jobs=0 only writes.
"""

import argparse
from collections.abc import Iterator, Sequence
from concurrent import futures
import os
import pathlib
import queue
import shutil
import subprocess
import sys
import threading
import time

import methods

from lapo_jax import arms as arms_lib
from lapo_jax import comparison, report

_TITLE = 'Length methods on the embedded bench'


def runs(names: Sequence[str], seeds: int) -> Iterator[tuple[str, int]]:
  """(arm, seed) of every run, seeds outermost."""
  for seed in range(seeds):
    for name in names:
      yield name, seed


def folder(workdir: pathlib.Path, name: str, seed: int) -> pathlib.Path:
  """The folder of one run."""
  plain = ''.join(c if c.isalnum() or c in '-.' else '_' for c in name)
  return workdir / f'{plain}_{seed}'


def command(name: str, seed: int, steps: int, place: pathlib.Path,
            more: Sequence[str] = ()) -> list[str]:
  """The program's command for one run; `more` are flags of all runs."""
  method = methods.METHODS[name]
  return [sys.executable, '-m', 'lapo_jax.main',
          f'--config=configs/tiny.py:{method.argument}',
          *(f'--config.{key}={value}'
            for key, value in methods.settings(method, steps).items()),
          f'--config.seed={seed}', f'--workdir={place}', *more]


def found(workdir: pathlib.Path, names: Sequence[str],
          seeds: int) -> list[arms_lib.Arm]:
  """The arms of what is complete, in the order of `names`."""
  arms = []
  for name in names:
    places = [folder(workdir, name, seed) for seed in range(seeds)]
    mine = [arms_lib.load(place) for place in places
            if (place / 'summary.json').exists()]
    if mine:
      arms.append(arms_lib.Arm(name, mine, methods.METHODS[name].family))
  return arms


def tell(workdir: pathlib.Path, arms: Sequence[arms_lib.Arm],
         whole: bool = True) -> None:
  """Writes table.md and, if `whole`, report.html and its pictures."""
  rows = arms_lib.rows(arms, methods.CONTROL)
  (workdir / 'table.md').write_text(
      comparison.markdown(rows, methods.CONTROL), encoding='utf-8')
  if not whole:
    return
  shown = comparison.drawn(arms, rows, methods.CONTROL)
  for name, (png, _) in shown.items():
    (workdir / f'{name}.png').write_bytes(png)
  report.write_page(workdir / 'report.html', _TITLE,
                    comparison.parts(arms, rows, shown, methods.CONTROL))


class Runner:
  """Runs what is missing, several at a time, each on cores of its own.

  Two runs of one core each take less time than two after one another on both:
  the host's part of a step keeps a single core busy.
  """

  def __init__(self, workdir: pathlib.Path, names: Sequence[str], seeds: int,
               steps: int, jobs: int, more: Sequence[str]):
    self._workdir, self._names, self._seeds = workdir, names, seeds
    self._steps, self._jobs, self._more = steps, jobs, more
    self._telling = threading.Lock()
    self._failed = {}

  def __call__(self) -> dict[str, str]:
    """{folder: the last line of its log} of the runs that failed."""
    shares = queue.SimpleQueue()
    for cores in _shares(self._jobs):
      shares.put(cores)
    with futures.ThreadPoolExecutor(
        self._jobs, initializer=lambda: _pin(shares.get())) as pool:
      missing = [
          (name, seed) for name, seed in runs(self._names, self._seeds)
          if not (folder(self._workdir, name, seed) / 'summary.json').exists()]
      for done in futures.as_completed(
          [pool.submit(self._run, *run) for run in missing]):
        done.result()
    return self._failed

  def _run(self, name: str, seed: int) -> None:
    place = folder(self._workdir, name, seed)
    place.mkdir(parents=True, exist_ok=True)
    self._lend_base(place, seed)
    started = time.monotonic()
    with (place / 'log.txt').open('a') as log:
      status = subprocess.run(
          command(name, seed, self._steps, place, self._more), stdout=log,
          stderr=log).returncode
    spent = f'{time.monotonic() - started:.0f} s'
    with self._telling:
      if status:
        text = (place / 'log.txt').read_text(errors='replace').strip()
        self._failed[place.name] = text.rpartition('\n')[2]
        print(f'{name}, seed {seed}: FAILED after {spent}', flush=True)
        return
      print(f'{name}, seed {seed}: {spent}', flush=True)
      tell(self._workdir, found(self._workdir, self._names, self._seeds),
           whole=False)

  def _lend_base(self, place: pathlib.Path, seed: int) -> None:
    """Hands on what another run of the seed measured of the base.

    Same model, problems and random numbers: the same record, bit by bit.
    """
    mine = place / 'stages' / '0.json'
    if mine.exists():
      return
    for name in self._names:
      other = folder(self._workdir, name, seed)
      # A summary: the record is whole, and nobody writes to it any more.
      if (other / 'summary.json').exists():
        mine.parent.mkdir(exist_ok=True)
        shutil.copyfile(other / 'stages' / '0.json', mine)
        return


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--workdir', type=pathlib.Path, required=True)
  parser.add_argument('--seeds', type=int, default=3)
  parser.add_argument('--arms', default='', help='some of them, a,b; all')
  parser.add_argument('--steps', type=int, default=methods.STEPS,
                      help='of an arm, over all its stages')
  parser.add_argument('--jobs', type=int, default=1,
                      help='runs at a time, each on its share of the cores; '
                      '0 = tell what there is')
  parser.add_argument('--more', action='append', default=[],
                      help='a flag of the program for all runs, such as '
                      '--more=--config.eval.num_examples=100')
  flags = parser.parse_args()
  try:
    names = chosen(flags.arms)
    methods.settings(methods.METHODS[names[0]], flags.steps)
  except ValueError as error:
    parser.error(str(error))
  flags.workdir.mkdir(parents=True, exist_ok=True)
  failed = {}
  if flags.jobs:
    failed = Runner(flags.workdir, names, flags.seeds, flags.steps, flags.jobs,
                    flags.more)()
  arms = found(flags.workdir, names, flags.seeds)
  if arms:
    tell(flags.workdir, arms)
    print((flags.workdir / 'table.md').read_text(encoding='utf-8'))
  for place, line in failed.items():
    print(f'{place} failed: {line}', file=sys.stderr)
  return 1 if failed else 0


def chosen(names: str) -> list[str]:
  """The arms of a list such as 'LAPO,DLER', all of an empty one.

  Raises:
    ValueError: one that is not there.
  """
  asked = names.split(',') if names else []
  if unknown := sorted(set(asked) - set(methods.METHODS)):
    raise ValueError(f'unknown arms {", ".join(unknown)}: expected some of '
                     f'{"; ".join(methods.METHODS)}.')
  return asked or list(methods.METHODS)


def _shares(jobs: int) -> list[set[int]]:
  """The cores of each job; none told where they cannot be or need not."""
  if jobs == 1 or not hasattr(os, 'sched_getaffinity'):
    return [set()] * jobs
  cores = sorted(os.sched_getaffinity(0))
  if jobs > len(cores):
    return [set()] * jobs
  return [set(cores[i::jobs]) for i in range(jobs)]


def _pin(cores: set[int]) -> None:
  """Pins this thread, and so the processes that it starts."""
  if cores:
    os.sched_setaffinity(0, cores)


if __name__ == '__main__':
  sys.exit(main())
