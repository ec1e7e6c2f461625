# SPDX-License-Identifier: Apache-2.0
"""LAPO beside its control, several seeds: runs what is missing, then a table.

  python experiments/lapo_tiny/runs.py --workdir=runs/lapo_tiny

Each run is the program's own command in a process of its own; a run that is
already complete is not repeated, one that was killed goes on. Writes table.md
and summary.png (a dot a seed) to the folder.
"""

import argparse
from collections.abc import Iterator
import json
import pathlib
import subprocess
import sys

from matplotlib import figure
import numpy as np

# Arguments of configs/tiny.py, and overrides. Without its sentence the second
# stage is asked as it is evaluated: what the sentence does is the difference.
_METHODS = {'LAPO': ('', {}),
            'accuracy only': ('accuracy', {}),
            'LAPO without the sentence': ('', {'reward.guidance': 'implicit'})}
# Okabe and Ito's colours, for colour-blind readers too.
_LOOKS = (('#000000', 'o'), ('#0072B2', 's'), ('#D55E00', 'D'),
          ('#009E73', '^'), ('#CC79A7', 'v'))


def runs(seeds: int) -> Iterator[tuple[str, int, str, dict[str, str]]]:
  """(method, seed, argument, overrides) of every run, methods alternating."""
  for seed in range(seeds):
    for method, (argument, overrides) in _METHODS.items():
      yield method, seed, argument, overrides


def folder(workdir: pathlib.Path, method: str, seed: int) -> pathlib.Path:
  """The folder of one run."""
  return workdir / f'{method.replace(" ", "_")}_{seed}'


def spread(values: np.ndarray, form: str = '.1f') -> str:
  """Mean ± standard deviation; 'z' in the form: no -0.0."""
  if len(values) == 1:
    return f'{values[0]:z{form}}'
  return f'{values.mean():z{form}} ± {values.std(ddof=1):{form}}'


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--workdir', type=pathlib.Path, required=True)
  parser.add_argument('--seeds', type=int, default=3)
  flags = parser.parse_args()

  found, seconds = {}, {}
  for method, seed, argument, overrides in runs(flags.seeds):
    place = folder(flags.workdir, method, seed)
    if not (place / 'summary.json').exists():
      place.mkdir(parents=True, exist_ok=True)
      with (place / 'log.txt').open('a') as log:
        subprocess.run(
            [sys.executable, '-m', 'lapo_jax.main',
             f'--config=configs/tiny.py:{argument}',
             *(f'--config.{key}={value}' for key, value in overrides.items()),
             f'--config.seed={seed}', f'--workdir={place}'],
            check=True, stdout=log, stderr=log)
    summary = json.loads((place / 'summary.json').read_text())
    for stage in summary['stages']:
      # The base, and a first stage that two methods share, count once.
      if any(stage in stages for stages in found.values()):
        continue
      name = stage['name'] if stage['name'] == 'base' else (
          f'{method}: {stage["name"]}')
      found.setdefault(name, []).append(stage)
    seconds.setdefault(method, []).append(summary['seconds'])
    print(f'{method}, seed {seed}: {summary["seconds"]:.0f} s', flush=True)
  text = '\n'.join([table(found), '', *(
      f'{method}: {spread(np.array(spent), ".0f")} s a run.'
      for method, spent in seconds.items())])
  (flags.workdir / 'table.md').write_text(text + '\n')
  draw(found, flags.workdir / 'summary.png')
  print(text)


def table(found: dict[str, list[dict]]) -> str:
  """Mean ± standard deviation over seeds, as Markdown."""
  lines = ['| policy | steps | accuracy % | mean tokens | tokens % of base | '
           'truncated % | tokens by level | r(level, tokens) |',
           '|---|---|---|---|---|---|---|---|']
  base = np.mean([stage['mean_tokens'] for stage in found['base']])
  for name, stages in found.items():
    pick = lambda key, stages=stages: np.array([s[key] for s in stages])
    levels = np.array([[part['mean_tokens'] for _, part in sorted(
        s['by_level'].items())] for s in stages])
    ranks = np.arange(levels.shape[1])
    correlation = np.array([np.corrcoef(ranks, row)[0, 1] for row in levels])
    lines.append(' | '.join([
        f'| {name}', str(stages[0]['steps']),
        spread(100 * pick('accuracy')), spread(pick('mean_tokens')),
        spread(100 * pick('mean_tokens') / base - 100),
        spread(100 * pick('truncated')),
        ' '.join(f'{x:.0f}' for x in levels.mean(axis=0)),
        spread(correlation, '.2f') + ' |']))
  return '\n'.join(lines)


def draw(found: dict[str, list[dict]], path: pathlib.Path) -> None:
  """Accuracy against tokens, a dot a seed; mean tokens by level."""
  picture = figure.Figure(figsize=(12, 5), dpi=100, layout='constrained')
  plane, levels = picture.subplots(1, 2)
  for (name, stages), (colour, marker) in zip(found.items(), _LOOKS,
                                              strict=False):
    look = {'color': colour, 'marker': marker, 'label': name}
    plane.plot([s['mean_tokens'] for s in stages],
               [100 * s['accuracy'] for s in stages], linestyle='',
               markersize=10, alpha=0.8, **look)
    tokens = np.array([[part['mean_tokens'] for _, part in sorted(
        s['by_level'].items())] for s in stages])
    levels.errorbar(sorted(stages[0]['by_level']), tokens.mean(axis=0),
                    np.ptp(tokens, axis=0) / 2, capsize=3, **look)
  plane.set(xlabel='mean completion length (tokens)', ylabel='accuracy (%)',
            title='Held-out problems, a dot a seed')
  plane.set_xlim(left=0)
  levels.set(xlabel='level', ylabel='mean completion length (tokens)',
             title='Length by level of difficulty (bars: range of the seeds)')
  levels.set_ylim(bottom=0)
  for panel in (plane, levels):
    panel.grid(alpha=0.3)
    panel.spines[['top', 'right']].set_visible(False)
  picture.legend(*plane.get_legend_handles_labels(), ncols=3,
                 loc='outside lower center', frameon=False)
  picture.savefig(path)


if __name__ == '__main__':
  main()
