# SPDX-License-Identifier: Apache-2.0
"""What an evaluation found: rows of completions to scores, text and picture.

A row is one completion. Scores of a benchmark are a plain dict that JSON
holds; NaN is the mean of nothing. All of it is host arithmetic over rows.
"""

from collections.abc import Mapping, Sequence
import math
import pathlib
from typing import Any, NamedTuple

from matplotlib import figure
import numpy as np

from lapo_jax import evaluate, grader, keywords, wording

VERDICTS = (*grader.VERDICTS, 'truncated')

# Okabe and Ito's colours without the yellow; black is the average's.
_COLOURS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9')
_MARKERS = 'osDphv^'


class Row(NamedTuple):
  """One graded completion.

  Attributes:
    problem: the stable problem id.
    sample: its number among the samples of the problem.
    correct: the task's grade in [0, 1].
    tokens: through the stop token.
    verdict: one of `VERDICTS`.
    keywords: counts by class, in the order of `keywords.WORDS`.
  """

  problem: int
  sample: int
  correct: float
  tokens: int
  verdict: str
  keywords: tuple[int, ...]


def of_rows(rows: Sequence[Row],
            levels: Mapping[int, str] | None = None) -> dict[str, Any]:
  """Scores of a benchmark, or of a part of one.

  Args:
    rows: its completions; problems may have unlike numbers of them.
    levels: the level of each problem, for scores by level; None = without.
  """
  rows = sorted(rows)
  problems = np.array([row.problem for row in rows])
  correct = np.array([row.correct >= 0.5 for row in rows])
  tokens = np.array([row.tokens for row in rows])
  verdicts = [row.verdict for row in rows]
  ids, place = np.unique(problems, return_inverse=True)
  returned = np.bincount(place)
  right = np.bincount(place, weights=correct).astype(int)
  accuracy, error = evaluate.pass_at_1(returned, right)
  ks = [2**i for i in range(int(returned.min()).bit_length())]
  total = max(int(tokens.sum()), 1)
  found = {
      'problems': len(ids), 'completions': len(rows),
      'pass_at_1': accuracy, 'standard_error': error,
      'pass_at_k': {str(k): float(
          evaluate.pass_at_k(returned, right, k).mean()) for k in ks},
      **evaluate.length_statistics(
          correct, tokens, np.array([v == 'truncated' for v in verdicts])),
      'verdicts': {name: verdicts.count(name) for name in VERDICTS},
      'keywords_per_1000_tokens': {
          name: 1000 * sum(row.keywords[i] for row in rows) / total
          for i, name in enumerate(keywords.WORDS)}}
  if levels is not None:
    named = sorted({levels[i] for i in ids.tolist()} - {''})
    found['by_level'] = {level: of_rows(
        [row for row in rows if levels[row.problem] == level])
        for level in named}
  return found


def average(benchmarks: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
  """The unweighted mean over benchmarks of accuracy and mean tokens."""
  mean = lambda name: float(np.mean([b[name] for b in benchmarks.values()]))
  return {name: mean(name) for name in ('pass_at_1', 'mean_tokens',
                                        'truncated')}


def against(found: Mapping[str, Any], base: Mapping[str, Any]
            ) -> dict[str, Any]:
  """The base run's scores beside `found`, and AES between the averages."""
  mine, theirs = found['average'], base['average']
  short = lambda scores: {name: scores[name]
                          for name in ('pass_at_1', 'mean_tokens')}
  return {'aes': evaluate.aes(mine['pass_at_1'], mine['mean_tokens'],
                              theirs['pass_at_1'], theirs['mean_tokens']),
          'average': short(theirs),
          'benchmarks': {name: short(base['benchmarks'][name])
                         for name in found['benchmarks']}}


def line(name: str, scores: Mapping[str, Any]) -> str:
  """A benchmark in one line."""
  return (f'{name}: pass@1 {_share(scores["pass_at_1"])} ± '
          f'{_share(scores["standard_error"])} %, mean tokens '
          f'{wording.number(scores["mean_tokens"])}, truncated '
          f'{_share(scores["truncated"])} %, {scores["problems"]} problems, '
          f'{scores["completions"]} completions')


def table(found: Mapping[str, Any]) -> str:
  """All scores as aligned text: one block each for what differs in kind."""
  benchmarks, base = found['benchmarks'], found['base']
  rows = [['benchmark', 'problems', 'samples', 'pass@1 %', '±', 'pass@k %',
           'tokens', 'median', 'correct', 'wrong', 'truncated %',
           *(['points', 'tokens %'] if base else [])]]
  for name, b in benchmarks.items():
    k, best = list(b['pass_at_k'].items())[-1]
    rows.append([
        name, str(b['problems']), f'{b["completions"] / b["problems"]:g}',
        _share(b['pass_at_1']), _share(b['standard_error']),
        f'{_share(best)} (k {k})',
        *(wording.number(b[f'{kind}_tokens'])
          for kind in ('mean', 'median', 'correct', 'wrong')),
        _share(b['truncated']),
        *(_change(b, base['benchmarks'][name]) if base else [])])
  mean = found['average']
  rows.append(['average', '', '', _share(mean['pass_at_1']), '', '',
               wording.number(mean['mean_tokens']), '', '', '',
               _share(mean['truncated']),
               *(_change(mean, base['average']) if base else [])])
  blocks = [rows]
  for title, key, form in (('verdicts', 'verdicts', 'd'),
                           ('keywords per 1,000 tokens',
                            'keywords_per_1000_tokens', '.2f')):
    kinds = list(next(iter(benchmarks.values()))[key])
    blocks.append([[title, *kinds], *(
        [name, *(format(b[key][kind], form) for kind in kinds)]
        for name, b in benchmarks.items())])
  levels = [[f'{name}, level {level}', str(b['problems']),
             _share(b['pass_at_1']), wording.number(b['mean_tokens']),
             _share(b['truncated'])]
            for name, scores in benchmarks.items()
            for level, b in scores['by_level'].items()]
  if levels:
    blocks.append([['by level', 'problems', 'pass@1 %', 'tokens',
                    'truncated %'], *levels])
  if found['conflict']:
    blocks.append([['stated budget', 'pass@1 %', 'tokens'], *(
        [name, _share(b['pass_at_1']), wording.number(b['mean_tokens'])]
        for name, b in found['conflict']['budgets'].items())])
  text = '\n\n'.join('\n'.join(wording.align(block)) for block in blocks)
  if base:
    aes = wording.number(base['aes'], '+.3f')
    text += f'\n\nAES against the base run: {aes}'
  return text


def draw(found: Mapping[str, Any], path: pathlib.Path) -> None:
  """Draws accuracy against mean tokens; an arrow comes from the base run."""
  picture = figure.Figure(figsize=(8, 5.5), dpi=100, layout='constrained')
  panel = picture.subplots()
  base = found['base']
  points = [*found['benchmarks'].items(), ('average', found['average'])]
  for i, (name, scores) in enumerate(points):
    average_ = name == 'average'
    look = {'color': '#000000' if average_ else _COLOURS[i % len(_COLOURS)],
            'marker': '*' if average_ else _MARKERS[i % len(_MARKERS)],
            'markersize': 16 if average_ else 11, 'linestyle': ''}
    point = scores['mean_tokens'], 100 * scores['pass_at_1']
    if base:
      theirs = base['average'] if average_ else base['benchmarks'][name]
      start = theirs['mean_tokens'], 100 * theirs['pass_at_1']
      panel.plot(*start, **look, fillstyle='none', clip_on=False)
      panel.annotate('', point, start, zorder=1, arrowprops={
          'arrowstyle': '-|>', 'color': '0.6', 'shrinkA': 9, 'shrinkB': 9})
    panel.plot(*point, **look, label=name.replace('$', r'\$'), clip_on=False)
    if not average_:
      panel.errorbar(*point, yerr=100 * np.nan_to_num(scores['standard_error']),
                     color=look['color'], elinewidth=1.2, capsize=3)
  panel.set_xlim(0, 1.05 * panel.get_xlim()[1])
  panel.set_ylim(0, max(5.0, min(100.0, 1.05 * panel.get_ylim()[1])))
  panel.set_title('Accuracy and length by benchmark' +
                  (' (hollow: the base run)' if base else ''), pad=12)
  panel.set_xlabel('mean completion length (tokens)')
  panel.set_ylabel('pass@1 (%)')
  panel.grid(alpha=0.3)
  panel.spines[['top', 'right']].set_visible(False)
  picture.legend(loc='outside lower center', frameon=False, ncols=5,
                 markerscale=0.8)
  picture.savefig(path, format='png')


def _change(scores: Mapping[str, Any], base: Mapping[str, Any]) -> list[str]:
  points = 100 * (scores['pass_at_1'] - base['pass_at_1'])
  tokens = (100 * (scores['mean_tokens'] / base['mean_tokens'] - 1)
            if base['mean_tokens'] else math.nan)
  return [wording.number(points, '+.1f'), wording.number(tokens, '+.1f')]


def _share(value: float) -> str:
  return wording.number(100 * value)
