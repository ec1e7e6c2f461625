# SPDX-License-Identifier: Apache-2.0
"""A run in plain words, for the person who watches it.

`log_line` says a step in one line, `explain` what its numbers mean,
`samples_table` shows what the model wrote, `progress` how far it is; `align`
and `number` are the parts of tables.
"""

from collections.abc import Mapping, Sequence
import math
import re
import sys
import textwrap
from typing import Any
import unicodedata

import jax
import tqdm

_TABLE_WIDTH = 100  # columns
# Sequences that a terminal would obey: CSI (colours, cursor), OSC (window
# title, links, clipboard), then any other pair. None runs past the start of
# the next, so hostile text costs linear time.
_ESCAPES = re.compile(
    r'(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]'
    r'|(?:\x1b\]|\x9d)[^\x07\x1b\x9c\x9d]*(?:\x07|\x1b\\|\x9c)'
    r'|\x1b[^\x1b]?')


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
  outside = scalars.get('policy/sampler_ratio_outside', 0.0)
  if outside > 0.01:
    lines.append(
        f'For {outside:.1%} of the tokens the sampler and the trainer disagree '
        'on the probability by more than a fifth: what is learned from was '
        'sampled by a slightly other policy. loss.importance_cap=2 makes up '
        'for it.')
  norm = scalars.get('update/grad_norm', 0.0)
  if norm > 0 and abs(scalars.get('update/loss', math.inf)) < 1e-3:
    lines.append(
        f'The loss is {scalars["update/loss"]:.4f}: that is normal. On-policy '
        'it is 0 by construction, because the advantages of a group sum to 0; '
        f'learning shows in update/grad_norm ({norm:.3g}).')
  return lines


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


def align(rows: Sequence[Sequence[str]]) -> list[str]:
  """Lines of a table: the first column to the left, the others to the right."""
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  return ['  '.join([row[0].ljust(widths[0]),
                     *(cell.rjust(width) for cell, width in
                       zip(row[1:], widths[1:], strict=True))]).rstrip()
          for row in rows]


def number(value: float | int, form: str = '.1f') -> str:
  """The number, '-' if it is none."""
  return format(value, form) if math.isfinite(value) else '-'


def progress(total: int, initial: int, desc: str) -> tqdm.tqdm:
  """A bar on stderr; silent off a terminal and off process 0."""
  # None is tqdm's word for "silent unless the stream is a terminal".
  disable = None if jax.process_index() == 0 else True
  return tqdm.tqdm(total=total, initial=initial, desc=desc, file=sys.stderr,
                   disable=disable, dynamic_ncols=True)


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
