# SPDX-License-Identifier: Apache-2.0
"""What a run achieved: accuracy and tokens, stage by stage, against its base.

A stage is the record that `write_summary` describes; the first is the base,
the model before training. Text, JSON and one picture are drawn from the same
records, on process 0 only (the caller sees to it).
"""

from collections.abc import Callable, Mapping, Sequence
import math
import os
import pathlib
from typing import Any

from matplotlib import axes, figure

from lapo_jax import metrics, wording

# Okabe and Ito's colours, told apart by colour-blind readers too, without the
# yellow that vanishes on white; stages also differ by their markers.
_COLOURS = ('#000000', '#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00',
            '#56B4E9')
# All wide enough in the middle to hold a number.
_MARKERS = 'osDph8H'


def write_summary(workdir: str | os.PathLike, stages: list[dict],
                  seconds: float) -> pathlib.Path:
  """Writes `summary.json` and `summary.png`; returns the JSON's path.

  Args:
    workdir: local folder of the run; made when missing.
    stages: the base first, then one record a stage: 'name' (str), 'steps'
      (int), 'accuracy' and 'truncated' (shares in [0, 1]), 'mean_tokens', and
      'by_level', {level: {'accuracy', 'mean_tokens'}}, {} without levels.
    seconds: duration of the whole run.

  Raises:
    ValueError: no stages.
  """
  if not stages:
    raise ValueError('got no stages: expected at least the base, evaluated '
                     'before training.')
  folder = pathlib.Path(workdir)
  folder.mkdir(parents=True, exist_ok=True)
  draw_summary(stages, folder / 'summary.png')
  path = folder / 'summary.json'
  text = metrics.to_json({'stages': stages, 'seconds': seconds}, indent=2)
  _replace(path, lambda part: part.write_text(text + '\n', encoding='utf-8'))
  return path


def table(stages: Sequence[Mapping[str, Any]]) -> str:
  """The stages as aligned text, changes against the first of them.

  A second block tells accuracy (%) / mean tokens by level, if there are any.
  """
  base = stages[0]
  rows = [['stage', 'steps', 'accuracy %', 'points', 'mean tokens', 'tokens %',
           'truncated %']]
  for index, stage in enumerate(stages):
    tokens, base_tokens = stage['mean_tokens'], base['mean_tokens']
    points, change = math.nan, math.nan
    if index:
      points = 100 * (stage['accuracy'] - base['accuracy'])
      change = 100 * (tokens / base_tokens - 1) if base_tokens else math.nan
    rows.append([stage['name'], str(stage['steps']),
                 wording.number(100 * stage['accuracy']),
                 wording.number(points, '+.1f'), wording.number(tokens),
                 wording.number(change, '+.1f'),
                 wording.number(100 * stage['truncated'])])
  lines = wording.align(rows)
  levels = _levels(stages)
  if levels:
    rows = [['accuracy % / mean tokens', *(s['name'] for s in stages)]]
    for level in levels:
      rows.append([level, *(_level_cell(s['by_level'].get(level))
                            for s in stages)])
    lines += ['', *wording.align(rows)]
  return '\n'.join(lines)


def draw_summary(stages: Sequence[Mapping[str, Any]],
                 path: str | os.PathLike) -> None:
  """Draws accuracy against tokens and, if there are levels, tokens by level.

  A PNG of 1200 × 500 pixels, 700 × 500 without levels.
  """
  levels = _levels(stages)
  # The object interface, never pyplot: no global back end is chosen.
  picture = figure.Figure(figsize=(12 if levels else 7, 5), dpi=100,
                          layout='constrained')
  picture.get_layout_engine().set(w_pad=0.15, h_pad=0.1)  # inches
  panels = picture.subplots(1, 2 if levels else 1, squeeze=False)[0]
  _draw_path(panels[0], stages)
  if levels:
    _draw_levels(panels[1], stages, levels)
  handles = panels[0].get_legend_handles_labels()
  picture.legend(*handles, loc='outside lower center', frameon=False,
                 markerscale=0.6, ncols=min(len(stages), 4))
  _replace(pathlib.Path(path),
           lambda part: picture.savefig(part, format='png'))


def _draw_path(panel: axes.Axes, stages: Sequence[Mapping[str, Any]]) -> None:
  points = [(s['mean_tokens'], 100 * s['accuracy']) for s in stages]
  for start, end in zip(points, points[1:], strict=False):
    panel.annotate('', end, start, zorder=1, arrowprops={
        'arrowstyle': '-|>', 'color': '0.6', 'linewidth': 1.5, 'shrinkA': 10,
        'shrinkB': 10, 'mutation_scale': 16})
  for index, (stage, point) in enumerate(zip(stages, points, strict=True)):
    # Numbers inside the markers cannot collide the way names beside them do.
    panel.plot(*point, label=f'{index}  {_plain(stage["name"])}',
               linestyle='', markersize=18, zorder=2, clip_on=False,
               **_look(index))
    panel.annotate(str(index), point, color='white', fontsize=10,
                   fontweight='bold', ha='center', va='center_baseline',
                   zorder=3)
  # At least this much around, so that noise does not fill the panel.
  tokens, shares = zip(*points, strict=True)
  panel.set_xlim(_limits(tokens, least=10.0, most=math.inf))
  panel.set_ylim(_limits(shares, least=5.0, most=100.0))
  _dress(panel, 'Accuracy and length, stage by stage',
         'mean completion length (tokens)', 'accuracy (%)')


def _draw_levels(panel: axes.Axes, stages: Sequence[Mapping[str, Any]],
                 levels: list[str]) -> None:
  for index, stage in enumerate(stages):
    found = [stage['by_level'].get(level, {}) for level in levels]
    # Side by side within a level, so that equal stages do not hide another.
    offset = 0.08 * (index - (len(stages) - 1) / 2)
    panel.plot([place + offset for place in range(len(levels))],
               [item.get('mean_tokens', math.nan) for item in found],
               markersize=9, linewidth=1.5, **_look(index))
  crowded = sum(map(len, levels)) > 50
  panel.set_xticks(range(len(levels)), [_plain(level) for level in levels],
                   rotation=30 if crowded else 0,
                   ha='right' if crowded else 'center')
  panel.set_xlim(-0.5, len(levels) - 0.5)
  panel.set_ylim(bottom=0)
  _dress(panel, 'Length by level of difficulty', 'level',
         'mean completion length (tokens)')


def _dress(panel: axes.Axes, title: str, x: str, y: str) -> None:
  panel.set_title(title, pad=12)
  panel.set_xlabel(x)
  panel.set_ylabel(y)
  panel.grid(alpha=0.3)
  panel.spines[['top', 'right']].set_visible(False)


def _limits(values: Sequence[float | int], least: float,
            most: float) -> tuple[float, float]:
  """Ends of an axis with a margin around the values, within [0, most]."""
  values = [value for value in values if math.isfinite(value)] or [0.0]
  low, high = min(values), max(values)
  margin = max(0.15 * (high - low), least)
  return max(low - margin, 0.0), min(high + margin, most)


def _look(index: int) -> dict[str, Any]:
  return {'color': _COLOURS[index % len(_COLOURS)],
          'marker': _MARKERS[index % len(_MARKERS)],
          'markeredgecolor': 'white'}


def _plain(text: str) -> str:
  # matplotlib would read what stands between two dollars as mathematics.
  return text.replace('$', r'\$')


def _levels(stages: Sequence[Mapping[str, Any]]) -> list[str]:
  """Every level, in the order of first appearance."""
  return list(dict.fromkeys(level for s in stages for level in s['by_level']))


def _level_cell(found: Mapping[str, Any] | None) -> str:
  if found is None:
    return '-'
  return (f'{wording.number(100 * found["accuracy"])} / '
          f'{wording.number(found["mean_tokens"])}')


def _replace(path: pathlib.Path,
             write: Callable[[pathlib.Path], Any]) -> None:
  """Writes beside the file, then renames: readers never see half of it."""
  part = path.with_name(f'{path.name}.tmp')
  write(part)
  os.replace(part, path)
