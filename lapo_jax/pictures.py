# SPDX-License-Identifier: Apache-2.0
"""Pictures of many arms: accuracy against tokens, and tokens by level.

An arm has one number and one marker everywhere. On the plane a family has a
colour; where families have panels of their own, each arm of a panel has one.
"""

from collections.abc import Sequence
import io
import itertools
import math
import statistics
from typing import Any

from matplotlib import axes, figure, lines

from lapo_jax import arms as arms_lib

# Okabe and Ito's colours, told apart by colour-blind readers too, without the
# yellow that vanishes on white; arms also differ by their markers.
COLOURS = ('#000000', '#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00',
           '#56B4E9')
_FIRST, _SMALL_MARKERS = 'o', 's^Dv<>PX*h'  # of base and control, of arms
_GREY = '0.55'
_CROWD = 6  # arms that are worth a panel of their own
_PANEL = 6  # arms that a panel holds where there are no families

# A row, its colour, its marker.
Drawn = tuple[arms_lib.Row, str, str]


def png(picture: figure.Figure) -> bytes:
  """The picture as a PNG file."""
  file = io.BytesIO()
  picture.savefig(file, format='png')
  return file.getvalue()


def plane(rows: Sequence[arms_lib.Row], control: str = '') -> figure.Figure:
  """Accuracy against tokens: a number an arm, 95 % intervals, the front.

  The front is dashed: no arm on it is beaten in both. Arms that crowd in a
  part of the plane are shown again, larger. What leaves a panel of an interval
  is cut.
  """
  drawn = _by_family(rows, control)
  crowd = _crowd(rows)
  picture = figure.Figure(figsize=(15 if crowd else 11, 6.6), dpi=110,
                          layout='constrained')
  places = picture.subplots(1, 2 if crowd else 1, squeeze=False)[0]
  # At least so much around, so that noise does not fill the panel.
  looks = ((rows, 'Accuracy and length on held-out problems (bars: 95 %)', 1.0),
           (crowd, 'Where most arms are', 0.5))
  for panel, (mine, title, least) in zip(places, looks, strict=False):
    x = limits([r.tokens.mean for r in mine], least=3 * least, most=math.inf)
    y = limits([r.accuracy.mean for r in mine], least=least, most=100.0)
    _scatter(panel, drawn, x, y)
    dress(panel, title, 'mean completion length (tokens)', 'accuracy (%)')
  handles = _legend(drawn)
  legend = picture.legend(handles=handles, loc='outside right upper',
                          frameon=False, fontsize=9, handletextpad=0.4,
                          labelspacing=0.35)
  for handle, text in zip(handles, legend.get_texts(), strict=True):
    if handle.get_marker() == 'None':
      text.set_fontweight('bold')
  return picture


def levels(rows: Sequence[arms_lib.Row], control: str = '') -> figure.Figure:
  """Mean tokens by level, a panel a family, base and control in each."""
  names = list(dict.fromkeys(level for row in rows for level in row.by_level))
  groups = panels(rows, control)
  picture, places = grid(len(groups))
  for place, (title, drawn) in zip(places, groups, strict=True):
    for i, (row, colour, marker) in enumerate(drawn):
      # Side by side within a level, so that equal arms do not hide another.
      shift = 0.05 * (i - (len(drawn) - 1) / 2)
      found = [row.by_level.get(level, {}) for level in names]
      place.plot([x + shift for x in range(len(names))],
                 [level.get('mean_tokens', math.nan) for level in found],
                 label=_label(row), color=colour, marker=marker, markersize=5,
                 linewidth=1.2, linestyle='-' if row.number else '--')
    place.set_xticks(range(len(names)), [plain(name) for name in names])
    place.set_ylim(bottom=0)
    name_lines(place)
    dress(place, title, 'level', 'mean tokens')
  return picture


def panels(rows: Sequence[arms_lib.Row],
           control: str = '') -> list[tuple[str, list[Drawn]]]:
  """(title, arms with their looks) of each panel, the base in all of them.

  Arms share a panel with their family; without families, a few at a time.

  Args:
    rows: of `arms.rows`, the base first.
    control: name of an arm that stands in every panel, '' = none.
  """
  base, *others = rows
  always = [(base, _GREY, '.')] + [
      (row, COLOURS[0], _FIRST) for row in others if row.name == control]
  others = [row for row in others if row.name != control]
  looks = list(zip(COLOURS[1:], _SMALL_MARKERS, strict=False))
  found = []
  for family, mine in _families(others):
    for start in range(0, len(mine), _PANEL):
      part = mine[start:start + _PANEL]
      found.append((plain(family), always + [
          (row, *look) for row, look in zip(part, looks, strict=False)]))
  return found or [('', always)]


def grid(count: int) -> tuple[figure.Figure, list[axes.Axes]]:
  """A picture of `count` panels, three in a row, one scale for all."""
  columns = min(count, 3)
  lines_ = math.ceil(count / columns)
  picture = figure.Figure(figsize=(1 + 3.6 * columns, 0.4 + 3.8 * lines_),
                          dpi=110, layout='constrained')
  found = picture.subplots(lines_, columns, squeeze=False, sharey=True)
  found = list(found.ravel())
  for empty in found[count:]:
    empty.remove()
  return picture, found[:count]


def dress(panel: axes.Axes, title: str, x: str, y: str) -> None:
  """Title, names of the axes, a light grid."""
  panel.set_title(title, pad=12)
  panel.set_xlabel(x)
  panel.set_ylabel(y)
  panel.grid(alpha=0.3)
  panel.spines[['top', 'right']].set_visible(False)


def name_lines(panel: axes.Axes) -> None:
  """The legend, below the panel: above it nothing is hidden."""
  panel.legend(loc='upper center', bbox_to_anchor=(0.5, -0.17), ncols=2,
               frameon=False, fontsize=8, labelspacing=0.3)


def limits(values: Sequence[float | int], least: float,
           most: float) -> tuple[float, float]:
  """Ends of an axis with a margin around the values, within [0, most]."""
  values = [value for value in values if math.isfinite(value)] or [0.0]
  low, high = min(values), max(values)
  margin = max(0.15 * (high - low), least)
  return max(low - margin, 0.0), min(high + margin, most)


def plain(text: str) -> str:
  """The text as it is, not as matplotlib's mathematics between two dollars."""
  return text.replace('$', r'\$')


def _crowd(rows: Sequence[arms_lib.Row]) -> list[arms_lib.Row]:
  """The arms near the median one, if these are most and the others far."""
  rows = [row for row in rows if _finite(row)]
  found = rows
  for value in (lambda row: row.tokens.mean, lambda row: row.accuracy.mean):
    values = [value(row) for row in rows]
    middle = statistics.median(values)
    usual = statistics.median(abs(v - middle) for v in values)
    found = [row for row in found if abs(value(row) - middle) <= 4 * usual]
  span = lambda mine: (max(row.tokens.mean for row in mine) -
                       min(row.tokens.mean for row in mine))
  crowded = (len(found) >= _CROWD and 2 * len(found) > len(rows) and
             span(found) < span(rows) / 2)
  return found if crowded else []


def _scatter(panel: axes.Axes, drawn: Sequence[Drawn], x: tuple[float, float],
             y: tuple[float, float]) -> None:
  """The arms within these limits, their intervals, and the front."""
  for row, colour, marker in drawn:
    bars = [[0.0 if math.isnan(s.half) else s.half]
            for s in (row.tokens, row.accuracy)]
    panel.errorbar(row.tokens.mean, row.accuracy.mean, bars[1], bars[0],
                   fmt='none', ecolor=colour, elinewidth=0.8, alpha=0.35,
                   zorder=1)
    panel.plot(row.tokens.mean, row.accuracy.mean, marker=marker, color=colour,
               markersize=8, markeredgecolor='white', linestyle='', zorder=3)
  front = sorted((row.tokens.mean, row.accuracy.mean) for row, _, _ in drawn
                 if row.front)
  panel.plot(*zip(*front, strict=True), color=_GREY, linestyle='--',
             linewidth=1, zorder=0)
  panel.set_xlim(x)
  panel.set_ylim(y)
  inside = lambda row: (x[0] <= row.tokens.mean <= x[1] and
                        y[0] <= row.accuracy.mean <= y[1])
  _number(panel, [part for part in drawn if inside(part[0])], x, y)


def _families(rows: Sequence[arms_lib.Row]
              ) -> list[tuple[str, list[arms_lib.Row]]]:
  names = dict.fromkeys(row.family for row in rows)
  return [(name, [row for row in rows if row.family == name])
          for name in names]


def _by_family(rows: Sequence[arms_lib.Row], control: str) -> list[Drawn]:
  """Every row with its family's colour; without families, one of its own."""
  base, *others = rows
  found = [(base, _GREY, _FIRST)]
  families = _families(others)
  for i, (_, mine) in enumerate(families):
    for j, row in enumerate(mine):
      colour = COLOURS[(i if len(families) > 1 else j + 1) % len(COLOURS)]
      marker = _SMALL_MARKERS[j % len(_SMALL_MARKERS)]
      found.append((row, colour, _FIRST if row.name == control else marker))
  return found


def _legend(drawn: Sequence[Drawn]) -> list[lines.Line2D]:
  """The arms, each family under its name."""
  handles = []
  for family, mine in itertools.groupby(drawn, key=lambda part: part[0].family):
    if family:
      handles.append(lines.Line2D([], [], linestyle='', label=plain(family)))
    handles += [lines.Line2D([], [], linestyle='', marker=marker, color=colour,
                             markersize=7, label=_label(row))
                for row, colour, marker in mine]
  return handles


def _label(row: arms_lib.Row) -> str:
  return f'{row.number}  {plain(row.name)}'


def _number(panel: axes.Axes, drawn: Sequence[Drawn],
            x: tuple[float, float], y: tuple[float, float]) -> None:
  """Writes each row's number beside its point, where there is room."""
  # Points (1/72 inch) of the panel, roughly: room is a matter of taste.
  width, height = 520.0, 400.0
  place = lambda row: (width * (row.tokens.mean - x[0]) / (x[1] - x[0]),
                       height * (row.accuracy.mean - y[0]) / (y[1] - y[0]))
  points = [place(row) for row, _, _ in drawn if _finite(row)]
  turns = [(radius * math.cos(angle), radius * math.sin(angle), radius)
           for radius in (11.0, 16.0, 22.0, 29.0, 37.0, 46.0)
           for angle in (math.tau * i / 16 for i in range(16))]
  taken = []
  for row, colour, _ in drawn:
    if not _finite(row):
      continue
    own = place(row)

    def cost(turn: tuple[float, float, float], own=own) -> float:
      at = own[0] + turn[0], own[1] + turn[1]
      outside = not (8 < at[0] < width - 8 and 8 < at[1] < height - 8)
      near = sum(abs(at[0] - p[0]) < 11 and abs(at[1] - p[1]) < 9
                 for p in points)
      over = sum(abs(at[0] - p[0]) < 15 and abs(at[1] - p[1]) < 11
                 for p in taken)
      return 100 * outside + 20 * near + 30 * over + turn[2] / 10

    best = min(turns, key=cost)
    taken.append((own[0] + best[0], own[1] + best[1]))
    panel.annotate(
        str(row.number), (row.tokens.mean, row.accuracy.mean), best[:2],
        textcoords='offset points', color=colour, fontsize=9.5, ha='center',
        va='center', fontweight='bold' if row.front else 'normal', zorder=4,
        arrowprops=_leader(colour) if best[2] > 14 else None)


def _leader(colour: str) -> dict[str, Any]:
  return {'arrowstyle': '-', 'color': colour, 'linewidth': 0.6, 'shrinkA': 3,
          'shrinkB': 4}


def _finite(row: arms_lib.Row) -> bool:
  return math.isfinite(row.tokens.mean) and math.isfinite(row.accuracy.mean)
