# SPDX-License-Identifier: Apache-2.0
"""Which recipes fit which TPU slices: a Markdown table of `lapo_jax.plan`.

  python -m experiments.tpu.fits

No TPU is needed, but libtpu (`pip install -e '.[plan]'`). Each line compiles
six programs of a full-size model, minutes on two cores.
"""

import importlib
from typing import Any

from lapo_jax import plan

# Config, slice, mesh.tensor, microbatch; the last is there to be refused.
_CASES = (
    ('lapo_r1_1p5b', 'v5e:4x4', 1, 16),
    ('lapo_r1_1p5b', 'v5e:8x8', 1, 64),
    ('lapo_r1_1p5b', 'v6e:4x4', 1, 16),
    ('lapo_r1_1p5b', 'v5p:2x2x2', 1, 16),
    ('lapo_r1_7b', 'v5p:4x4x4', 1, 64),
    ('lapo_r1_7b', 'v5e:8x8', 4, 16),
    ('lapo_r1_7b', 'v5e:4x4', 1, 16),
)
_COLUMNS = ('config', 'slice', 'tensor', 'HBM, GiB', 'sampling', 'scoring',
            'update', 'slots', 'most', 'microbatch', 'most',
            'steps/hour, at most', 'tokens/s/chip, at most', 'fits')


def ask(name: str, topology: str, tensor: int,
        microbatch: int) -> dict[str, Any]:
  """The report of a config with another tensor axis and microbatch."""
  config = importlib.import_module(f'configs.{name}').get_config()
  config.mesh.tensor = tensor
  config.updates.microbatch_size = microbatch
  [report] = plan.plan(config, topology)
  return report


def row(name: str, report: dict[str, Any]) -> str:
  """One line of the table: GiB are those of the fullest program."""
  programs = report['programs']
  slots, rows, floor = (report[key] for key in ('slots', 'microbatch', 'floor'))

  def gib(*names):
    least = any('refused' in programs[name] for name in names)
    most = max(programs[name]['together'] for name in names) / 2**30
    return f'{"≥ " if least else ""}{most:.1f}'

  return _line((
      name, report['topology'], report['mesh']['tensor'],
      f'{report["memory"] / 2**30:.1f}',
      gib('copy', 'prefill', 'grow', 'decode'), gib('score'), gib('update'),
      slots['asked'], slots['largest'], rows['asked'], rows['largest'],
      f'{floor["steps_per_hour"]:.0f}',
      f'{floor["tokens_per_second_per_chip"]:.0f}',
      'no: ' + ' '.join(plan.misfits(report)) if plan.misfits(report)
      else 'yes'))


def _line(cells: tuple) -> str:
  return f'| {" | ".join(str(cell) for cell in cells)} |'


def main() -> None:
  """Prints the table."""
  print(_line(_COLUMNS), _line(('---',) * len(_COLUMNS)), sep='\n')
  for case in _CASES:
    print(row(case[0], ask(*case)), flush=True)


if __name__ == '__main__':
  main()
