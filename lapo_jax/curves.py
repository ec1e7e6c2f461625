# SPDX-License-Identifier: Apache-2.0
"""Training curves: of one run everything it logged, of many arms one metric."""

from collections.abc import Sequence
import math
import re

from matplotlib import axes, figure
import numpy as np

from lapo_jax import arms as arms_lib
from lapo_jax import pictures

# What a run's panels show: a title and the names of its metrics.
_PANELS = (
    ('reward', r'reward/.*'),
    ('length (tokens)', r'length/(mean|correct|p90)'),
    ('share of completions', r'outcome/.*'),
    ('groups of one grade (share)', r'advantage/zero_groups'),
    ('advantage (standard deviation)', r'advantage/std'),
    ('entropy of the policy', r'policy/entropy'),
    ('divergence', r'policy/.*kl'),
    ('tokens out of bounds (share)',
     r'policy/(clip_fraction|sampler_ratio_outside)'),
    ('gradient norm', r'update/grad_norm'),
    ('rollout', r'rollout/.*'),
    ('seconds', r'time/(?!tokens_per_second).*'),
    ('tokens per second', r'time/tokens_per_second'),
    ('held out: accuracy', r'eval/[^/]*/accuracy'),
    ('held out: tokens', r'eval/[^/]*/length'),
)


def of_run(run: arms_lib.Run) -> figure.Figure | None:
  """Every metric of a run over its steps, by kind; dotted: a new stage.

  None where no step was logged.
  """
  if not run.steps:
    return None
  found = []
  for title, pattern in _PANELS:
    records = run.evaluations if pattern.startswith('eval/') else run.steps
    names = list(dict.fromkeys(
        name for record in records for name, value in record.items()
        if re.fullmatch(pattern, name) and value is not None))
    if names:
      found.append((title, records, names))
  columns = min(len(found), 3)
  lines = math.ceil(len(found) / columns)
  picture = figure.Figure(figsize=(3.9 * columns, 2.7 * lines), dpi=110,
                          layout='constrained')
  panels = picture.subplots(lines, columns, squeeze=False).ravel()
  for panel, (title, records, names) in zip(panels, found, strict=False):
    for i, name in enumerate(names):
      points = [(r['step'], r[name]) for r in records
                if r.get(name) is not None]
      panel.plot(*zip(*points, strict=True), linewidth=1.3,
                 color=pictures.COLOURS[(i + 1) % len(pictures.COLOURS)],
                 linestyle='-' if i < 6 else '--',
                 marker='o' if len(points) < 5 else '', markersize=4,
                 label=pictures.plain(name.partition('/')[2]))
    for step in _borders(run):
      panel.axvline(step, color='0.4', linestyle=':', linewidth=1)
    if len(names) > 1:
      panel.legend(frameon=False, fontsize=7, labelspacing=0.2)
    pictures.dress(panel, title, 'step', '')
  for empty in panels[len(found):]:
    empty.remove()
  return picture


def of_arms(arms: Sequence[arms_lib.Arm], rows: Sequence[arms_lib.Row],
            name: str, label: str, control: str = '') -> figure.Figure | None:
  """One metric of every arm, panels as in `pictures.levels`.

  Means over the seeds, smoothed over the steps around each; their range too
  where a panel has few arms. None where no run has logged the metric.

  Args:
    arms: that `rows` was made of.
    rows: of `arms.rows`.
    name: of the metric.
    label: of the axis.
    control: name of an arm that stands in every panel, '' = none.
  """
  found = {row.number: arms_lib.series(arm, name)
           for arm, row in zip(arms, rows[1:], strict=True)}
  if not any(np.isfinite(values).any() for _, values in found.values()):
    return None
  groups = pictures.panels(rows, control)
  picture, panels = pictures.grid(len(groups))
  for panel, (title, drawn) in zip(panels, groups, strict=True):
    for row, colour, marker in drawn:
      if row.number:
        _draw(panel, *found[row.number], colour=colour, marker=marker,
              label=f'{row.number}  {pictures.plain(row.name)}',
              ranges=len(drawn) <= 4)
    if panel.has_data():
      pictures.name_lines(panel)
    pictures.dress(panel, title, 'step', label)
  return picture


def smooth(values: np.ndarray) -> np.ndarray:
  """Means over the steps around each, a twentieth of all on either side.

  Args:
    values: [S]; what is not finite is left out of the means.
  """
  reach = max(len(values) // 20, 1)
  parts = [values[max(i - reach, 0):i + reach + 1] for i in range(len(values))]
  parts = [part[np.isfinite(part)] for part in parts]
  return np.array([part.mean() if part.size else math.nan for part in parts])


def _draw(panel: axes.Axes, steps: np.ndarray, values: np.ndarray, *,
          colour: str, marker: str, label: str, ranges: bool) -> None:
  if not steps.size:
    return
  each = np.array([smooth(mine) for mine in values])
  panel.plot(steps, each.mean(axis=0), color=colour, linewidth=1.3,
             marker=marker, markersize=4, markevery=max(len(steps) // 6, 1),
             label=label)
  if ranges and len(each) > 1:
    panel.fill_between(steps, each.min(axis=0), each.max(axis=0), color=colour,
                       alpha=0.12, linewidth=0)


def _borders(run: arms_lib.Run) -> list[float]:
  """Between which steps a new stage begins."""
  pairs = zip(run.steps, run.steps[1:], strict=False)
  return [after['step'] - 0.5 for before, after in pairs
          if before.get('stage') != after.get('stage')]
