# SPDX-License-Identifier: Apache-2.0
"""What a run says of itself: numbers, times, samples and plain words.

`summary` turns the arrays of a step into named numbers, `Writer` keeps them
(JSON lines and TensorBoard), `log_line`, `explain` and `samples_table` say
them to a reader. Process 0 alone writes; the others call the same code.
"""

from collections.abc import Iterator, Mapping, Sequence
import contextlib
import json
import math
import os
import pathlib
import re
import sys
import textwrap
import time
from typing import Any, SupportsFloat
import unicodedata

import jax
from jaxtyping import Array, Float
import numpy as np
import tensorboardX
import tqdm

from lapo_jax import types

_TABLE_WIDTH = 100  # columns
# Sequences that a terminal would obey: CSI (colours, cursor), OSC (window
# title, links, clipboard), then any other pair. None runs past the start of
# the next, so hostile text costs linear time.
_ESCAPES = re.compile(
    r'(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]'
    r'|(?:\x1b\]|\x9d)[^\x07\x1b\x9c\x9d]*(?:\x07|\x1b\\|\x9c)'
    r'|\x1b[^\x1b]?')


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
    self._append('metrics', {'step': step, 'stage': stage, **values})
    for name, value in values.items():
      self._board.add_scalar(name, value, step)

  def write_samples(self, step: int, stage: str,
                    rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes a few completions, as rows of `samples_table`; JSON has all."""
    if not self._active:
      return
    for row in rows:
      self._append('samples', {'step': step, 'stage': stage, **row})
    # Indented, not fenced: a completion may hold the characters of a fence.
    text = textwrap.indent(samples_table(rows), '    ')
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

  def _append(self, name: str, record: Mapping[str, Any]) -> None:
    file = self._files[name]
    file.write(to_json(record) + '\n')
    file.flush()


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


def explain(scalars: Mapping[str, float], completions: int,
            max_completion_length: int) -> list[str]:
  """What a `summary` means, in plain words; empty when nothing stands out.

  Args:
    scalars: the result of `summary`.
    completions: completions in the step, B.
    max_completion_length: the cap, in tokens.
  """
  lines = []
  truncated = scalars['outcome/truncated']
  if truncated > 0.5:
    lines.append(
        f'Most completions ({truncated:.0%}) ran into the cap of '
        f'{max_completion_length} tokens without a stop token: they count as '
        'wrong. Raise rollout.max_completion_length, or start from a model '
        'that answers more briefly.')
  correct, equal = scalars['outcome/correct'], scalars['advantage/zero_groups']
  if correct == 0:
    lines.append(
        f'No completion of this step was correct (0 of {completions}): the '
        'task is beyond this model, or its answers are not understood. '
        'Nothing can be learned from correctness; look at the samples, then '
        'try an easier task or a better model.')
  elif correct == 1:
    lines.append(
        f'Every completion of this step was correct ({completions} of '
        f'{completions}): correctness teaches nothing more here, only the '
        'other terms of the reward (length) still do.')
  elif equal > 0.5:
    words = (('right', 'easy', 'harder') if correct >= 0.5 else
             ('wrong', 'hard', 'easier'))
    lines.append(
        f'In most groups ({equal:.0%}) all completions have the same grade, '
        f'mostly {words[0]} ({correct:.0%} correct): correctness teaches '
        f'nothing there. The task is too {words[1]} for this model; try '
        f'{words[2]} problems or a larger rollout.group_size.')
  norm = scalars.get('update/grad_norm', 0.0)
  if norm > 0 and abs(scalars.get('update/loss', math.inf)) < 1e-3:
    lines.append(
        f'The loss is {scalars["update/loss"]:.4f}: that is normal. On-policy '
        'it is 0 by construction, because the advantages of a group sum to 0; '
        f'learning shows in update/grad_norm ({norm:.3g}).')
  return lines


def log_line(step: int, total: int, scalars: Mapping[str, float]) -> str:
  """One compact line for a step; a number the step lacks is left out."""
  spent = [value for name, value in scalars.items()
           if name.startswith('time/') and name != 'time/tokens_per_second']
  scalars = {**scalars, 'seconds': sum(spent)}
  parts = (('reward', 'reward/total', '{:.3f}'),
           ('correct', 'outcome/correct', '{:.1%}'),
           ('length', 'length/mean', '{:.1f}'),
           ('truncated', 'outcome/truncated', '{:.1%}'),
           ('zero groups', 'advantage/zero_groups', '{:.0%}'),
           ('entropy', 'policy/entropy', '{:.3f}'),
           ('grad norm', 'update/grad_norm', '{:.3g}'),
           ('s/step', 'seconds', '{:.2f}'))
  words = [f'{label} {form.format(scalars[name])}'
           for label, name, form in parts if name in scalars]
  return '  '.join([f'step {step:>{len(str(total))}}/{total}', *words])


def progress(total: int, initial: int, desc: str) -> tqdm.tqdm:
  """A bar on stderr; silent off a terminal and off process 0."""
  # None is tqdm's word for "silent unless the stream is a terminal".
  disable = None if jax.process_index() == 0 else True
  return tqdm.tqdm(total=total, initial=initial, desc=desc, file=sys.stderr,
                   disable=disable, dynamic_ncols=True)


def samples_table(rows: Sequence[Mapping[str, Any]]) -> str:
  """A few completions as text of at most 100 columns, safe on a terminal.

  Args:
    rows: each with 'prompt', 'completion', 'gold' and 'verdict' (str),
      'length' (tokens) and 'reward'. Model text is hostile: escapes and
      control characters go, newlines show as \\n, long text loses its middle.
  """
  lines = ['verdict     tokens    reward  gold', '-' * _TABLE_WIDTH]
  for row in rows:
    lines.append(f'{_shorten(row["verdict"], 10):10}{row["length"]:>8}'
                 f'{row["reward"]:>+10.3f}  {_shorten(row["gold"], 30)}')
    lines += _wrap('  prompt      ', _shorten(row['prompt'], 160))
    lines += _wrap('  completion  ', _shorten(row['completion'], 480))
    lines.append('-' * _TABLE_WIDTH)
  return '\n'.join(lines)


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


def _shorten(text: str, limit: int) -> str:
  """Printable text of at most `limit` characters, cut in the middle."""
  text = _ESCAPES.sub('', text).replace('\r\n', '\n').replace('\n', '\\n')
  text = ''.join(c if c.isprintable() else ' ' if c.isspace() else ''
                 for c in text)
  if len(text) <= limit:
    return text
  half = (limit - 3) // 2
  return f'{text[:half]} … {text[-half:]}'


def _wrap(label: str, text: str) -> list[str]:
  # Chinese and its like fill two columns: a stand-in widens them meanwhile.
  wide = ''.join(c + '\0' if unicodedata.east_asian_width(c) in 'WF' else c
                 for c in text)
  # One column less: a break may part a character from its stand-in.
  lines = textwrap.wrap(wide, _TABLE_WIDTH - 1, initial_indent=label,
                        subsequent_indent=' ' * len(label))
  return [line.replace('\0', '') for line in lines or [label.rstrip()]]
