# SPDX-License-Identifier: Apache-2.0
"""LAPO beside its control, several seeds: runs what is missing, then a table.

  python experiments/lapo_tiny/runs.py --workdir=runs/lapo_tiny

Each run is the program's own command in a process of its own; a run that is
already complete is not repeated, one that was killed goes on. Writes table.md
and summary.png (of the first seed) to the folder.
"""

import argparse
from collections.abc import Iterator
import json
import pathlib
import resource
import subprocess
import sys

import numpy as np

_METHODS = {'LAPO': 'configs/tiny.py', 'accuracy only':
            'configs/tiny.py:accuracy'}


def runs(seeds: int) -> Iterator[tuple[str, int, str]]:
  """(method, seed, config) of every run, the methods alternating."""
  for seed in range(seeds):
    for method, config in _METHODS.items():
      yield method, seed, config


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--workdir', type=pathlib.Path, required=True)
  parser.add_argument('--seeds', type=int, default=3)
  flags = parser.parse_args()

  found, seconds = {}, {}
  for method, seed, config in runs(flags.seeds):
    folder = flags.workdir / f'{method.replace(" ", "_")}_{seed}'
    if not (folder / 'summary.json').exists():
      folder.mkdir(parents=True, exist_ok=True)
      with (folder / 'log.txt').open('a') as log:
        subprocess.run(
            [sys.executable, '-m', 'lapo_jax.main', f'--config={config}',
             f'--config.seed={seed}', f'--workdir={folder}'],
            check=True, stdout=log, stderr=log)
    summary = json.loads((folder / 'summary.json').read_text())
    for stage in summary['stages']:
      name = stage['name'] if stage['name'] == 'base' else (
          f'{method}: {stage["name"]}')
      found.setdefault(name, []).append(stage)
    seconds.setdefault(method, []).append(summary['seconds'])
    print(f'{method}, seed {seed}: {summary["seconds"]:.0f} s', flush=True)
  # Of the largest of all runs of this call, in KiB.
  peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
  text = '\n'.join([table(found), '', *(
      f'{method}: {_spread(np.array(spent), ".0f")} s a run.'
      for method, spent in seconds.items()),
      f'Peak memory of a process: {peak / 2**20:.1f} GiB.'])
  (flags.workdir / 'table.md').write_text(text + '\n')
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
        _spread(100 * pick('accuracy')), _spread(pick('mean_tokens')),
        _spread(100 * pick('mean_tokens') / base - 100),
        _spread(100 * pick('truncated')),
        ' '.join(f'{x:.0f}' for x in levels.mean(axis=0)),
        _spread(correlation, '.2f') + ' |']))
  return '\n'.join(lines)


def _spread(values: np.ndarray, form: str = '.1f') -> str:
  if len(values) == 1:
    return f'{values[0]:{form}}'
  return f'{values.mean():{form}} ± {values.std(ddof=1):{form}}'


if __name__ == '__main__':
  main()
