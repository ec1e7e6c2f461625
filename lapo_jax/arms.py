# SPDX-License-Identifier: Apache-2.0
"""Several runs beside one another: what each arm reached, over its seeds.

A run is what its folder says; an arm is the runs that differ in their seed
alone. `rows` makes numbers of arms, each with a 95 % confidence interval over
the seeds; row 0 is the base, every run's model before training.
"""

from collections.abc import Iterable, Mapping, Sequence
import dataclasses
import json
import math
import os
import pathlib
from typing import Any, NamedTuple

import numpy as np

from lapo_jax import evaluate

# 0.975 quantiles of Student's t with 1, 2, … degrees of freedom. Of more than
# ten seeds the last one is taken, which is a little too wide.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


class Spread(NamedTuple):
  """A mean over seeds, and half of its 95 % interval: NaN for one seed."""

  mean: float
  half: float


@dataclasses.dataclass(frozen=True)
class Run:
  """What a run's folder holds.

  Attributes:
    name: the folder's.
    config: config.json.
    stages: records as `report.write_summary` describes them, the base first;
      of a run that goes on, those that there are.
    steps: the lines of metrics.jsonl that a training step wrote.
    evaluations: its lines that an evaluation wrote.
    samples: the lines of samples.jsonl.
    finished: whether its summary is written.
  """

  name: str
  config: Mapping[str, Any]
  stages: Sequence[Mapping[str, Any]]
  steps: Sequence[Mapping[str, Any]]
  evaluations: Sequence[Mapping[str, Any]]
  samples: Sequence[Mapping[str, Any]]
  finished: bool

  @property
  def seconds(self) -> float:
    """What the training steps took; evaluations are not among them.

    Of every `log_every`-th step it is known; the others count as it does.
    """
    return self.config.get('log_every', 1) * math.fsum(
        value for step in self.steps for name, value in step.items()
        if is_time(name) and value is not None)


@dataclasses.dataclass(frozen=True)
class Arm:
  """Runs that differ in their seed alone; arms of one family look alike."""

  name: str
  runs: Sequence[Run]
  family: str = ''


@dataclasses.dataclass(frozen=True)
class Row:
  """What an arm's last stage reached, over its seeds.

  Attributes:
    number: place among the rows, by which pictures name it; 0 is the base.
    name: the arm's.
    family: the arm's.
    runs: how many.
    accuracy: %.
    gain: of it against the run's own base, points.
    lead: of it against the control's run of the same seed, points; NaN
      without one.
    tokens: mean tokens of a completion.
    change: of them against the run's own base, %.
    aes: of `evaluate.aes`, against the run's own base.
    truncated: % of completions that ran into the cap.
    seconds: of the training steps of a run.
    by_level: means over seeds, {level: {'accuracy', 'mean_tokens'}}.
    front: no other row is both more often right and shorter.
  """

  number: int
  name: str
  family: str
  runs: int
  accuracy: Spread
  gain: Spread
  lead: Spread
  tokens: Spread
  change: Spread
  aes: Spread
  truncated: Spread
  seconds: Spread
  by_level: Mapping[str, Mapping[str, float]]
  front: bool = False


def load(folder: str | os.PathLike) -> Run:
  """Reads a run's folder, also of one that is still going on.

  Raises:
    ValueError: no run lies there, or nothing was evaluated yet.
  """
  folder = pathlib.Path(folder)
  if not (folder / 'config.json').is_file():
    raise ValueError(f'{folder}: expected the --workdir of a run, with its '
                     'config.json.')
  summary = folder / 'summary.json'
  if summary.is_file():
    stages = _read(summary)['stages']
  else:
    files = sorted((folder / 'stages').glob('*.json'),
                   key=lambda file: int(file.stem))
    stages = [_read(file) for file in files]
  if not stages:
    raise ValueError(f'{folder}: the run has evaluated nothing yet, not even '
                     'its base: wait, or start it again.')
  lines = _lines(folder / 'metrics.jsonl')
  return Run(
      name=folder.absolute().name,
      config=_read(folder / 'config.json'),
      stages=[_finite(stage) for stage in stages],
      steps=[line for line in lines if 'length/mean' in line],
      evaluations=[line for line in lines if any(
          name.startswith('eval/') for name in line)],
      samples=_lines(folder / 'samples.jsonl'), finished=summary.is_file())


def grouped(runs: Iterable[Run]) -> list[Arm]:
  """Arms of runs: configs that differ in the seed alone belong together.

  An arm has its first run's name, without a number at its end if it has
  several runs.

  Raises:
    ValueError: two runs of one arm with the same seed, which are one run to
      any statistic.
  """
  found = {}
  for run in runs:
    settings = {k: v for k, v in run.config.items() if k != 'seed'}
    mine = found.setdefault(json.dumps(settings, sort_keys=True), [])
    for other in mine:
      if other.config.get('seed') == run.config.get('seed'):
        raise ValueError(f'{other.name} and {run.name} are runs of one config '
                         'and one seed: expected seeds that differ; leave one '
                         'out.')
    mine.append(run)
  name = lambda runs: (runs[0].name if len(runs) == 1 else
                       runs[0].name.rstrip('0123456789').rstrip('_-. '))
  return [Arm(name(mine) or mine[0].name, mine) for mine in found.values()]


def rows(arms: Sequence[Arm], control: str = '') -> list[Row]:
  """The base, then each arm; see `Row`.

  Args:
    arms: runs of one base on the same problems.
    control: name of the arm whose runs those of the same seed are held
      against, '' = none.

  Raises:
    ValueError: no arms, or runs of different models or held-out problems,
      whose numbers do not compare.
  """
  runs = [run for arm in arms for run in arm.runs]
  if not runs:
    raise ValueError('got no runs to compare: expected one folder at least.')
  for key in ('model', 'task', 'eval'):
    for run in runs:
      if run.config.get(key) != runs[0].config.get(key):
        raise ValueError(
            f'{run.name} and {runs[0].name} differ in config.{key}: expected '
            'runs of one base on the same problems; report on each by itself.')
  # Every run of a seed evaluates the same base, with the same random numbers.
  bases = {run.config.get('seed'): run.stages[0] for run in runs}
  controls = {run.config.get('seed'): run.stages[-1]['accuracy']
              for arm in arms if arm.name == control for run in arm.runs}
  found = [_row(0, 'base', '', [(base, base) for base in bases.values()], [],
                [])]
  for number, arm in enumerate(arms, start=1):
    leads = [100 * (run.stages[-1]['accuracy'] - controls[seed])
             for run in arm.runs
             if (seed := run.config.get('seed')) in controls]
    found.append(_row(number, arm.name, arm.family,
                      [(run.stages[0], run.stages[-1]) for run in arm.runs],
                      [run.seconds for run in arm.runs], leads))
  better = lambda a, b: (a.accuracy.mean >= b.accuracy.mean and
                         a.tokens.mean <= b.tokens.mean and
                         (a.accuracy.mean, a.tokens.mean) !=
                         (b.accuracy.mean, b.tokens.mean))
  known = lambda row: math.isfinite(row.accuracy.mean + row.tokens.mean)
  return [dataclasses.replace(row, front=known(row) and not any(
      better(other, row) for other in found)) for row in found]


def spread(values: Sequence[float | int] | np.ndarray) -> Spread:
  """Mean ± t·sd/√n, sd divided by n − 1; NaN for the mean of nothing."""
  values = np.asarray(values, float)
  if values.size < 2:
    return Spread(float(values[0]) if values.size else math.nan, math.nan)
  quantile = _T[min(values.size - 1, len(_T)) - 1]
  return Spread(float(values.mean()),
                float(quantile * values.std(ddof=1) / values.size**0.5))


def series(arm: Arm, name: str) -> tuple[np.ndarray, np.ndarray]:
  """(steps [S], values [R, S]) of a metric of the arm's R runs.

  The steps are those that every run has come to; NaN where a run lacks the
  metric.
  """
  by_step = [{line['step']: line.get(name) for line in run.steps}
             for run in arm.runs]
  steps = sorted(set.intersection(*map(set, by_step))) if by_step else []
  values = [[math.nan if mine[step] is None else mine[step] for step in steps]
            for mine in by_step]
  return np.array(steps, int), np.array(values, float)


def is_time(name: str) -> bool:
  """Whether a metric is seconds of a part of a step."""
  return name.startswith('time/') and name != 'time/tokens_per_second'


def _row(number: int, name: str, family: str,
         pairs: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]],
         seconds: Sequence[float], leads: Sequence[float]) -> Row:
  """Of (base, last stage) of each run, and its points over the control."""
  pick = lambda key: [last[key] for _, last in pairs]
  gain, change, scores = [], [], []
  for base, last in pairs:
    facts = [stage[key] for stage in (last, base)
             for key in ('accuracy', 'mean_tokens')]
    scores.append(evaluate.aes(*facts))
    gain.append(100 * (facts[0] - facts[2]))
    change.append(100 * (facts[1] / facts[3] - 1) if facts[3] else math.nan)
  levels = dict.fromkeys(level for _, last in pairs
                         for level in last['by_level'])
  mean = lambda level, key: spread([
      last['by_level'].get(level, {}).get(key, math.nan)
      for _, last in pairs]).mean
  return Row(
      number=number, name=name, family=family, runs=len(pairs),
      accuracy=spread([100 * x for x in pick('accuracy')]),
      gain=spread(gain), lead=spread(leads),
      tokens=spread(pick('mean_tokens')), change=spread(change),
      aes=spread(scores), seconds=spread(seconds),
      truncated=spread([100 * x for x in pick('truncated')]),
      by_level={level: {key: mean(level, key)
                        for key in ('accuracy', 'mean_tokens')}
                for level in levels})


def _finite(stage: Mapping[str, Any]) -> dict[str, Any]:
  """The record, with NaN where JSON has null for what is not finite."""
  return {key: math.nan if value is None else
               _finite(value) if isinstance(value, dict) else value
          for key, value in stage.items()}


def _read(path: pathlib.Path) -> Any:
  return json.loads(path.read_text(encoding='utf-8'))


def _lines(path: pathlib.Path) -> list[dict[str, Any]]:
  """Records of a log, without a last line that is half written."""
  if not path.is_file():
    return []
  found = []
  for line in path.read_text(encoding='utf-8', errors='replace').split('\n'):
    try:
      record = json.loads(line)
    except ValueError:
      continue
    if isinstance(record, dict) and 'step' in record:
      found.append(record)
  return found
