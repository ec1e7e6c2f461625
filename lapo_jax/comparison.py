# SPDX-License-Identifier: Apache-2.0
"""Arms side by side: the table, the pictures, and the page that holds them."""

from collections.abc import Mapping, Sequence
from typing import Any

from lapo_jax import arms as arms_lib
from lapo_jax import curves, page, pictures, wording

# A metric, its axis.
_CURVES = (('length/mean', 'mean tokens'), ('outcome/correct', 'correct'),
           ('outcome/truncated', 'truncated'),
           ('policy/entropy', 'entropy (nats)'))
_HOW = (
    'Mean ± half of the 95 % confidence interval over seeds (Student\'s t). '
    'Held-out problems, the last policy of each run. A seed draws its own '
    'samples, for the base too: what is told against the run\'s own base, or '
    'against another arm\'s run of the same seed, varies less than the '
    'accuracy itself. AES, against the base: saved share of tokens, plus 3 '
    'times the relative gain in accuracy, or minus 5 times the relative loss. '
    'Seconds are those of the training steps of a run. Bold: no other arm is '
    'as often right with as few tokens.')


def cells(rows: Sequence[arms_lib.Row], control: str = '') -> list[list[str]]:
  """The table of arms, headings first; with a control, points over it too."""
  overs = ['points over base', *([f'points over {control}'] if control else [])]
  found = [['#', 'arm', 'seeds', 'accuracy %', *overs, 'mean tokens',
            'tokens % of base', 'AES', 'truncated %', 'seconds']]
  for row in rows:
    # Base and control are measured against themselves; the base costs no steps.
    against = ([_cell(row.gain, '+.1f'), _cell(row.change, '+.1f'),
                _cell(row.aes, '.2f')] if row.number else ['-', '-', '-'])
    lead = ['-' if row.name == control else _cell(row.lead, '+.1f')]
    found.append([str(row.number), row.name, str(row.runs),
                  _cell(row.accuracy), against[0], *(lead if control else []),
                  _cell(row.tokens), *against[1:], _cell(row.truncated),
                  _cell(row.seconds, '.0f')])
  return found


def level_cells(rows: Sequence[arms_lib.Row]) -> list[list[str]]:
  """Accuracy (%) / mean tokens by level, headings first; [] without levels."""
  levels = list(dict.fromkeys(level for row in rows for level in row.by_level))
  if not levels:
    return []
  found = [['#', 'arm', *levels]]
  for row in rows:
    mine = [row.by_level.get(level) for level in levels]
    found.append([str(row.number), row.name, *(
        '-' if level is None else
        f'{wording.number(100 * level["accuracy"])} / '
        f'{wording.number(level["mean_tokens"], ".0f")}' for level in mine)])
  return found


def markdown(rows: Sequence[arms_lib.Row], control: str = '') -> str:
  """Both tables and how they were made, as Markdown."""
  strong = [row.front for row in rows]
  parts = [_markdown(cells(rows, control), strong), '', _HOW]
  if by_level := level_cells(rows):
    parts += ['', 'Accuracy % / mean tokens, by level:', '',
              _markdown(by_level, strong)]
  return '\n'.join(parts) + '\n'


def drawn(arms: Sequence[arms_lib.Arm], rows: Sequence[arms_lib.Row],
          control: str = '') -> dict[str, tuple[bytes, str]]:
  """{name: (PNG, what it shows)} of every picture that there is matter for.

  Args:
    arms: that `rows` was made of.
    rows: of `arms.rows`.
    control: name of an arm that stands in every panel, '' = none.
  """
  found = {'plane': (pictures.plane(rows, control), (
      'Accuracy against mean tokens; the dashed line joins the arms that no '
      'other beats in both. Bars: 95 % intervals, cut at the border.'))}
  if any(row.by_level for row in rows):
    found['levels'] = (pictures.levels(rows, control), (
        'Mean tokens by level of difficulty, means over the seeds.'))
  for name, label in _CURVES:
    picture = curves.of_arms(arms, rows, name, label, control)
    if picture is not None:
      found[name.replace('/', '_')] = (picture, (
          f'{name} of the training batches, means over the seeds, smoothed '
          'over a tenth of the steps.'))
  return {name: (pictures.png(picture), words)
          for name, (picture, words) in found.items()}


def parts(arms: Sequence[arms_lib.Arm], rows: Sequence[arms_lib.Row],
          shown: Mapping[str, tuple[bytes, str]],
          control: str = '') -> list[str]:
  """The page's parts, as HTML.

  Args:
    arms: that `rows` was made of.
    rows: of `arms.rows`.
    shown: of `drawn`.
    control: name of the arm that the others are held against, '' = none.
  """
  strong = [i for i, row in enumerate(rows) if row.front]
  shown = dict(shown)
  found = [page.table(cells(rows, control), left=(1,), strong=strong),
           page.note(_HOW)]
  first = [page.picture(*shown.pop(name)) for name in ('plane', 'levels')
           if name in shown]
  found += [page.heading('Accuracy and length'), *first]
  if by_level := level_cells(rows):
    found += [page.heading('Accuracy % / mean tokens by level', 3),
              page.table(by_level, left=(1,), strong=strong)]
  if shown:
    found += [page.heading('Training curves'),
              *(page.picture(*picture) for picture in shown.values())]
  found.append(page.heading('Arms'))
  for arm, row in zip(arms, rows[1:], strict=True):
    found.append(page.folded(f'{row.number}  {arm.name}', _arm(arm, arms[0])))
  return found


def settings(section: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
  """A config's values by dotted key."""
  found = {}
  for key, value in section.items():
    if isinstance(value, dict) and value:
      found |= settings(value, f'{prefix}{key}.')
    else:
      found[f'{prefix}{key}'] = value
  return found


def _arm(arm: arms_lib.Arm, first: arms_lib.Arm) -> str:
  """Where its config differs from the first arm's, and what it wrote last."""
  mine, theirs = (settings(a.runs[0].config) for a in (arm, first))
  rows = [[key, mine.get(key, '-'), theirs.get(key, '-')]
          for key in sorted({**mine, **theirs})
          if mine.get(key) != theirs.get(key)]
  found = []
  if rows:
    found.append(page.table([['setting', arm.name, first.name], *rows],
                            left=(0, 1, 2)))
  found += [page.sample(row) for row in arm.runs[0].samples[-2:]]
  return '\n'.join(found)


def _markdown(rows: Sequence[Sequence[str]], strong: Sequence[bool]) -> str:
  """The rows below the headings, bold where asked; the first is headings."""
  clean = lambda cell: cell.replace('|', r'\|').replace('\n', ' ')
  line = lambda row: f'| {" | ".join(map(clean, row))} |'
  found = [line(rows[0]), '|' + '---|' * len(rows[0])]
  for row, bold in zip(rows[1:], strong, strict=True):
    found.append(line([row[0], f'**{row[1]}**' if bold else row[1], *row[2:]]))
  return '\n'.join(found)


def _cell(spread: arms_lib.Spread, form: str = '.1f') -> str:
  mean = wording.number(spread.mean, form)
  half = wording.number(spread.half, form.removeprefix('+'))
  return mean if half == '-' else f'{mean} ± {half}'
