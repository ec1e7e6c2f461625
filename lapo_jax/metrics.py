# SPDX-License-Identifier: Apache-2.0
"""What a run keeps of itself: numbers, times and samples.

`summary` turns the arrays of a step into named numbers, `Writer` keeps them
(JSON lines and TensorBoard), `wording` says them to a reader. Process 0 alone
writes; the others call the same code.
"""

from collections.abc import Iterator, Mapping, Sequence
import contextlib
import json
import math
import os
import pathlib
import textwrap
import time
from typing import Any, SupportsFloat

import jax
from jaxtyping import Array, Float
import numpy as np
import tensorboardX

from lapo_jax import types, wording


class Writer:
  """Appends to `metrics.jsonl`, `samples.jsonl` and `tensorboard/`.

  A line of metrics is {'step': int, 'stage': str, name: float, …}. Lines are
  on disk when a call returns. On processes other than 0 nothing is touched.
  """

  def __init__(self, workdir: str | os.PathLike,
               resume_step: int | None = None):
    """Opens the logs of a run, cutting what the run is about to repeat.

    Args:
      workdir: local folder of the run; made when missing.
      resume_step: last step whose lines stay, -1 for none. A run that logged
        step 7 but saved step 5 logs 6 and 7 again. None keeps every line.
    """
    self._active = jax.process_index() == 0
    if not self._active:
      return
    folder = pathlib.Path(workdir)
    folder.mkdir(parents=True, exist_ok=True)
    self._files = {}
    for name in ('metrics', 'samples'):
      path = folder / f'{name}.jsonl'
      _drop_lines(path, resume_step)
      self._files[name] = path.open('a', encoding='utf-8')
    purge_step = None if resume_step is None else resume_step + 1
    self._board = tensorboardX.SummaryWriter(
        str(folder / 'tensorboard'), purge_step=purge_step, flush_secs=10)

  def write(self, step: int, stage: str,
            scalars: Mapping[str, SupportsFloat]) -> None:
    """Writes the numbers of a step; JSON has null for a non-finite one."""
    if not self._active:
      return
    values = {name: float(value) for name, value in scalars.items()}
    self._append('metrics', [{'step': step, 'stage': stage, **values}])
    for name, value in values.items():
      self._board.add_scalar(name, value, step)

  def write_samples(self, step: int, stage: str,
                    rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes a few completions, rows of `wording.samples_table`; JSON too."""
    if not self._active:
      return
    self._append('samples', [{'step': step, 'stage': stage, **row}
                             for row in rows])
    # Indented, not fenced: a completion may hold the characters of a fence.
    text = textwrap.indent(wording.samples_table(rows), '    ')
    self._board.add_text('samples', text, step)

  def close(self) -> None:
    """Flushes and closes the files; a second call does nothing."""
    if not self._active:
      return
    self._board.close()
    for file in self._files.values():
      file.close()

  def __enter__(self):
    return self

  def __exit__(self, *exception):
    self.close()

  def _append(self, name: str, records: Sequence[Mapping[str, Any]]) -> None:
    file = self._files[name]
    file.writelines(to_json(record) + '\n' for record in records)
    file.flush()
    os.fsync(file.fileno())  # a mounted bucket keeps the rest to itself


class Timer:
  """Seconds by stage: `with timer('sample'): …`, added up over uses.

  JAX returns before the device is done: end a timed block with a fetch or
  `jax.block_until_ready`, or its time lands in the next block.
  """

  def __init__(self):
    self._seconds = {}

  @contextlib.contextmanager
  def __call__(self, stage: str) -> Iterator[None]:
    """Adds the time of the block, also of one that raises, to the stage."""
    start = time.perf_counter()
    try:
      yield
    finally:
      spent = time.perf_counter() - start
      self._seconds[stage] = self._seconds.get(stage, 0.0) + spent

  @property
  def seconds(self) -> dict[str, float]:
    """{'time/<stage>': seconds}, in the order of first use."""
    return {f'time/{stage}': spent for stage, spent in self._seconds.items()}


def every(step: int, n: int, last: int | None = None) -> bool:
  """Whether something due each n steps is due after this one.

  Steps count from 0, so n = 5 is due after steps 4, 9, …; n ≤ 0 is never due.
  The step `last` is always due.
  """
  return step == last or (n > 0 and (step + 1) % n == 0)


def summary(outcomes: types.Outcomes, rewards: types.Rewards,
            advantages: Float[Array | np.ndarray, 'P G'],
            update_metrics: Mapping[str, Any],
            timer: Timer) -> dict[str, float]:
  """The numbers of a step, by name.

  Lengths are in tokens and over all completions; rewards and advantages are
  over those that the method keeps. A mean over nothing has no name here. A
  completion is correct from a grade of 0.5; the standard deviation of the
  advantages is divided by n.

  Args:
    outcomes: Outcomes, unshaped by the method.
    rewards: Rewards.
    advantages: float32 [P, G].
    update_metrics: scalars of the update, passed through by name.
    timer: what the step took so far.
  """
  # Fields, not records: on the host their arrays are NumPy's, which the
  # records' annotations do not admit.
  graded, rewarded, advantages, update_metrics = jax.device_get(
      (dict(vars(outcomes)), dict(vars(rewards)), advantages,
       dict(update_metrics)))
  correct, lengths = graded['correct'], graded['lengths']
  terms, weights = rewarded['terms'], rewarded['weights'] or {}
  keep = slice(None) if rewarded['keep'] is None else rewarded['keep']
  names = {f'reward/{name}': term[keep] for name, term in terms.items()}
  names['reward/total'] = sum(term[keep] * weights.get(name, 1.0)
                              for name, term in terms.items())
  names |= {'length/mean': lengths, 'length/correct': lengths[correct >= 0.5]}
  names |= {f'outcome/{name}': grade
            for name, grade in graded['extras'].items()}
  names |= {'outcome/correct': correct,
            'outcome/truncated': graded['truncated']}
  names['advantage/zero_groups'] = correct.max(-1) == correct.min(-1)
  found = {name: float(np.mean(values, dtype=np.float64))
           for name, values in names.items() if values.size}
  found['length/p90'] = float(np.quantile(lengths, 0.9))
  found['length/max'] = float(lengths.max())
  if advantages[keep].size:
    found['advantage/std'] = float(np.std(advantages[keep], dtype=np.float64))
  found |= {name: float(value) for name, value in update_metrics.items()}
  found |= timer.seconds
  if spent := sum(timer.seconds.values()):
    found['time/tokens_per_second'] = float(lengths.sum()) / spent
  return found


def to_json(record: Any, indent: int | None = None) -> str:
  """JSON that every reader accepts: null stands for NaN and infinities."""
  return json.dumps(_without_nan(record), allow_nan=False, indent=indent)


def replace_text(path: pathlib.Path, text: str) -> None:
  """Writes a file so that a reader sees the old text or all of the new."""
  fresh = path.with_name(f'{path.name}.tmp')
  fresh.write_text(text + '\n', encoding='utf-8')
  os.replace(fresh, path)


def _without_nan(value: Any) -> Any:
  if isinstance(value, Mapping):
    return {key: _without_nan(item) for key, item in value.items()}
  if isinstance(value, list | tuple):
    return [_without_nan(item) for item in value]
  if isinstance(value, np.generic):
    value = value.item()
  if isinstance(value, float) and not math.isfinite(value):
    return None
  return value


def _drop_lines(path: pathlib.Path, last: int | None) -> None:
  """Rewrites a log without later steps and without half-written lines."""
  if not path.exists():
    return
  kept = path.with_name(f'{path.name}.tmp')
  with (path.open(encoding='utf-8', errors='replace', newline='\n') as old,
        kept.open('w', encoding='utf-8') as new):
    for line in old:
      try:
        step = json.loads(line)['step']
      except (ValueError, TypeError, KeyError):
        continue
      if last is None or step <= last:
        new.write(line.rstrip('\n') + '\n')
  os.replace(kept, path)
