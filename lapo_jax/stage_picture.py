# SPDX-License-Identifier: Apache-2.0
"""One picture of a run: where its stages took accuracy and length."""

from collections.abc import Mapping, Sequence
import math
from typing import Any

from matplotlib import axes, figure

from lapo_jax import pictures

# All wide enough in the middle to hold a number.
_MARKERS = 'osDph8H'


def draw(stages: Sequence[Mapping[str, Any]]) -> figure.Figure:
  """Accuracy against tokens and, if there are levels, tokens by level.

  1200 × 500 pixels, 700 × 500 without levels.
  """
  names = levels(stages)
  # The object interface, never pyplot: no global back end is chosen.
  picture = figure.Figure(figsize=(12 if names else 7, 5), dpi=100,
                          layout='constrained')
  picture.get_layout_engine().set(w_pad=0.15, h_pad=0.1)  # inches
  panels = picture.subplots(1, 2 if names else 1, squeeze=False)[0]
  _draw_path(panels[0], stages)
  if names:
    _draw_levels(panels[1], stages, names)
  handles = panels[0].get_legend_handles_labels()
  picture.legend(*handles, loc='outside lower center', frameon=False,
                 markerscale=0.6, ncols=min(len(stages), 4))
  return picture


def levels(stages: Sequence[Mapping[str, Any]]) -> list[str]:
  """Every level, in the order of first appearance."""
  return list(dict.fromkeys(level for s in stages for level in s['by_level']))


def _draw_path(panel: axes.Axes, stages: Sequence[Mapping[str, Any]]) -> None:
  points = [(s['mean_tokens'], 100 * s['accuracy']) for s in stages]
  for start, end in zip(points, points[1:], strict=False):
    panel.annotate('', end, start, zorder=1, arrowprops={
        'arrowstyle': '-|>', 'color': '0.6', 'linewidth': 1.5, 'shrinkA': 10,
        'shrinkB': 10, 'mutation_scale': 16})
  for index, (stage, point) in enumerate(zip(stages, points, strict=True)):
    # Numbers inside the markers cannot collide the way names beside them do.
    panel.plot(*point, label=f'{index}  {pictures.plain(stage["name"])}',
               linestyle='', markersize=18, zorder=2, clip_on=False,
               **_look(index))
    panel.annotate(str(index), point, color='white', fontsize=10,
                   fontweight='bold', ha='center', va='center_baseline',
                   zorder=3)
  # At least this much around, so that noise does not fill the panel.
  tokens, shares = zip(*points, strict=True)
  panel.set_xlim(pictures.limits(tokens, least=10.0, most=math.inf))
  panel.set_ylim(pictures.limits(shares, least=5.0, most=100.0))
  pictures.dress(panel, 'Accuracy and length, stage by stage',
                 'mean completion length (tokens)', 'accuracy (%)')


def _draw_levels(panel: axes.Axes, stages: Sequence[Mapping[str, Any]],
                 names: list[str]) -> None:
  for index, stage in enumerate(stages):
    found = [stage['by_level'].get(level, {}) for level in names]
    # Side by side within a level, so that equal stages do not hide another.
    offset = 0.08 * (index - (len(stages) - 1) / 2)
    panel.plot([place + offset for place in range(len(names))],
               [item.get('mean_tokens', math.nan) for item in found],
               markersize=9, linewidth=1.5, **_look(index))
  crowded = sum(map(len, names)) > 50
  panel.set_xticks(range(len(names)),
                   [pictures.plain(name) for name in names],
                   rotation=30 if crowded else 0,
                   ha='right' if crowded else 'center')
  panel.set_xlim(-0.5, len(names) - 0.5)
  panel.set_ylim(bottom=0)
  pictures.dress(panel, 'Length by level of difficulty', 'level',
                 'mean completion length (tokens)')


def _look(index: int) -> dict[str, Any]:
  return {'color': pictures.COLOURS[index % len(pictures.COLOURS)],
          'marker': _MARKERS[index % len(_MARKERS)],
          'markeredgecolor': 'white'}
