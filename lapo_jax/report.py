# SPDX-License-Identifier: Apache-2.0
"""What a run achieved: accuracy and tokens, stage by stage, against its base.

A stage is the record that `write_summary` describes; the first is the base,
the model before training. Text, JSON and one picture are drawn from the same
records, on process 0 only (the caller sees to it).

One HTML page of a run's folder, or of several side by side, where runs that
differ in their seed alone are one arm:

  python -m lapo_jax.report --workdir=runs/tiny --out=report.html
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
import math
import os
import pathlib
import sys
from typing import Any

from lapo_jax import arms as arms_lib
from lapo_jax import (
    comparison,
    curves,
    metrics,
    page,
    pictures,
    stage_picture,
    wording,
)

# Completions that a run's page shows, of its first and of its last ones.
_SAMPLES = (2, 4)


def report(folders: Sequence[str | os.PathLike],
           out: str | os.PathLike) -> pathlib.Path:
  """Writes one page of a run's folder, or of several; returns its path.

  Raises:
    ValueError: a folder without a run, or runs that do not compare.
  """
  runs = [arms_lib.load(folder) for folder in folders]
  if len(runs) == 1:
    return write_page(out, f'Run {runs[0].name}', _run(runs[0]))
  arms = arms_lib.grouped(runs)
  rows = arms_lib.rows(arms)
  parts = comparison.parts(arms, rows, comparison.drawn(arms, rows))
  going = [run.name for run in runs if not run.finished]
  if going:
    parts.insert(0, page.note(
        f'Not finished: {", ".join(going)}. They stand here with the last '
        'stage that was evaluated, which may be the base.'))
  return write_page(out, f'{len(runs)} runs side by side', parts)


def write_page(out: str | os.PathLike, title: str,
               parts: Sequence[str]) -> pathlib.Path:
  """Writes the parts, HTML, as one page; its folder is made when missing."""
  path = pathlib.Path(out)
  path.parent.mkdir(parents=True, exist_ok=True)
  text = page.page(title, parts)
  _replace(path, lambda part: part.write_text(text, encoding='utf-8'))
  return path


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
  lines = wording.align(_stage_cells(stages))
  if cells := _level_cells(stages):
    lines += ['', *wording.align(cells)]
  return '\n'.join(lines)


def draw_summary(stages: Sequence[Mapping[str, Any]],
                 path: str | os.PathLike) -> None:
  """Draws accuracy against tokens and, if there are levels, tokens by level.

  A PNG of 1200 × 500 pixels, 700 × 500 without levels.
  """
  picture = stage_picture.draw(stages)
  _replace(pathlib.Path(path),
           lambda part: picture.savefig(part, format='png'))


def main() -> None:
  """The command; a user's mistake ends it with one line and status 2."""
  parser = argparse.ArgumentParser(
      description='One HTML page of a run, or of several side by side.')
  parser.add_argument('--workdir', action='append', required=True,
                      help='folder of a run; may be given several times')
  parser.add_argument('--out', default='report.html')
  flags = parser.parse_args()
  try:
    print(f'Written: {report(flags.workdir, flags.out)}')
  except (ValueError, OSError) as error:
    print(error, file=sys.stderr)
    sys.exit(2)


def _run(run: arms_lib.Run) -> list[str]:
  """The parts of one run's page."""
  found = [] if run.finished else [page.note(
      'This run is still going on, or was stopped.')]
  found.append(page.table(_stage_cells(run.stages)))
  picture = stage_picture.draw(run.stages)
  found.append(page.picture(pictures.png(picture),
                            'Accuracy and mean tokens of each stage.'))
  if cells := _level_cells(run.stages):
    found.append(page.table(cells))
  picture = curves.of_run(run)
  if picture is not None:
    found += [page.heading('Training curves'),
              page.picture(pictures.png(picture), (
                  'What was logged, step by step; dotted: a new stage.'))]
  first, last = _SAMPLES
  samples = run.samples
  if len(samples) > first + last:
    samples = [*samples[:first], *samples[-last:]]
  if samples:
    found += [page.heading('Completions, the first and the last logged'),
              *map(page.sample, samples)]
  settings = comparison.settings(run.config)
  found += [page.heading('Config'), page.folded(
      f'{len(settings)} settings',
      page.table([['setting', 'value'], *settings.items()], left=(0, 1)))]
  return found


def _stage_cells(stages: Sequence[Mapping[str, Any]]) -> list[list[str]]:
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
  return rows


def _level_cells(stages: Sequence[Mapping[str, Any]]) -> list[list[str]]:
  rows = [['accuracy % / mean tokens', *(s['name'] for s in stages)]]
  for level in stage_picture.levels(stages):
    rows.append([level, *(_level_cell(s['by_level'].get(level))
                          for s in stages)])
  return rows if len(rows) > 1 else []


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


if __name__ == '__main__':
  main()
