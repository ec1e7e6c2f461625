# SPDX-License-Identifier: Apache-2.0
"""Whether a run fits a TPU slice, told on any x86 Linux machine.

  pip install 'lapo_jax[plan]'
  python -m lapo_jax.plan --config=configs/lapo_r1_1p5b.py --topology=v5e:4x4

All programs of the config's step are compiled ahead of time, in a process of
its own (`ahead`). Printed are the bytes of each on a chip, beside what else
lies there meanwhile; the most slots and the largest microbatch that fit; and,
from the chip's peak and its bandwidth alone, the least time of a step
(`costs`). No chip is faster than that; how much slower it is, no compiler
knows.

Of the model it reads config.json, or it knows the shape by the model's name.
Ends with status 2 if something does not fit, and says what to change.
"""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from typing import Any

from absl import flags
from ml_collections import config_flags

from lapo_jax import build, costs, main

# A process in which JAX compiles for TPUs, whether there are any or not.
ENVIRONMENT = {
    'JAX_PLATFORMS': 'cpu', 'TPU_SKIP_MDS_QUERY': '1',
    'ALLOW_MULTIPLE_LIBTPU_LOAD': 'true', 'TPU_WORKER_HOSTNAMES': 'localhost',
    'TF_CPP_MIN_LOG_LEVEL': '2'}

# The sections that the programs depend on.
_SECTIONS = ('model', 'rollout', 'loss', 'optimizer', 'updates', 'mesh')
_GIB = 2**30
# What to change when a program does not fit, and when no number fits.
_COPY = 'raise mesh.tensor, which cuts the sampler\'s copy of the parameters'
_SLOTS = 'lower rollout.num_slots or rollout.cache_share ({} slots fit)'
_ROWS = 'lower updates.microbatch_size ({} fits)'
_MESH = ('take more chips or raise mesh.sequence or mesh.tensor; '
         'updates.remat="full" and updates.offload_reference spare memory too')
_REMEDIES = {
    'copy': ('slots', _COPY, _COPY),
    **dict.fromkeys(('prefill', 'grow', 'decode'), ('slots', _SLOTS, _COPY)),
    **dict.fromkeys(('update', 'score'), ('microbatch', _ROWS, _MESH))}


def run() -> None:
  """The command."""
  values = flags.FlagValues()
  config = config_flags.DEFINE_config_file(
      'config', None, 'The run.', flag_values=values)
  topology = flags.DEFINE_string(
      'topology', None, 'The slice, such as v5e:4x4.', flag_values=values)
  mean_length = flags.DEFINE_integer(
      'mean_length', 0, 'Tokens of a completion, for the time of a step; 0 = '
      'half the cap.', flag_values=values, lower_bound=0)
  as_json = flags.DEFINE_bool('json', False, 'Prints JSON.',
                              flag_values=values)
  try:
    if rest := values(main.names_first(sys.argv))[1:]:
      raise ValueError(f'got {" ".join(rest)}: expected flags alone.')
    if config.value is None or topology.value is None:
      raise ValueError('expected --config=configs/lapo_r1_1p5b.py '
                       '--topology=v5e:4x4')
    reports = plan(config.value, topology.value, mean_length.value)
  except (flags.Error, ValueError, TypeError, KeyError, AttributeError,
          OSError, RuntimeError) as error:
    main.stop(error)
  if as_json.value:
    print(json.dumps(reports, indent=2))
  else:
    print('\n\n'.join(table(report) for report in reports))
  if any(misfits(report) for report in reports):
    sys.exit(2)


def plan(config: Any, topology: str,
         mean_length: int = 0) -> list[dict[str, Any]]:
  """The reports of a config's stages, see `ahead.report`; alike ones once.

  Args:
    config: see configs/default.py.
    topology: see `costs.find`.
    mean_length: tokens of a completion; 0 = half the cap.

  Raises:
    ValueError: what does not fit together, or a topology that is not known.
    RuntimeError: libtpu is missing, or the compiler broke down.
  """
  costs.find(topology)
  if importlib.util.find_spec('libtpu') is None:
    raise RuntimeError('compiling for TPUs needs libtpu: pip install '
                       "'lapo_jax[plan]', on x86 Linux.")
  stages = {}
  for name, stage in build.stage_configs(config):
    sections = {key: stage[key].to_dict() for key in _SECTIONS}
    stages.setdefault(json.dumps(sections, sort_keys=True), (name, stage))
  reports = []
  for name, stage in stages.values():
    cap = stage.rollout.max_completion_length
    if mean_length > cap:
      raise ValueError(f'mean_length {mean_length}: expected at most '
                       f'rollout.max_completion_length {cap}.')
    reports.append({'stage': name, **_compile({
        'config': json.loads(stage.to_json()), 'topology': topology,
        'mean_length': mean_length or -(-cap // 2)})})
  return reports


def misfits(report: dict[str, Any]) -> list[str]:
  """A sentence for each program that does not fit."""
  available = report['memory'] - report['code']
  found = []
  for name, program in report['programs'].items():
    # What the compiler refuses may ask for little more than there is.
    over = program['together'] - available
    if over <= 0 and 'refused' not in program:
      continue
    least = 'at least ' if 'refused' in program else ''
    what, some, none = _REMEDIES[name]
    number = report[what]['largest']
    found.append(
        f'{name} does not fit: it needs {least}'
        f'{program["together"] / _GIB:.1f} of {available / _GIB:.1f} GiB, '
        f'{max(over, 0) / _GIB:.1f} too much; '
        f'{some.format(number) if number else none}.')
  return found


def table(report: dict[str, Any]) -> str:
  """A report as text."""
  mesh = ', '.join(f'{name} {size}' for name, size in report['mesh'].items())
  kept, floor = report['kept'], report['floor']
  slots, microbatch = report['slots'], report['microbatch']
  gib = lambda size: f'{size / _GIB:.3g}'
  lines = [
      f'{report["model"]}, {report["stage"]}, on {report["topology"]}: '
      f'{report["chips"]} chips of {gib(report["memory"])} GiB, mesh {mesh}.',
      '', _row('GiB on each chip', 'arguments', 'output', 'temporaries',
               'beside', 'together', '%')]
  for name, program in report['programs'].items():
    share = f'{100 * program["together"] / report["memory"]:.0f}'
    columns = [gib(program[column]) if column in program else 'refused'
               for column in ('arguments', 'output', 'temporaries', 'beside',
                              'together')]
    lines.append(_row(name, *columns, share))
  lines += [
      '',
      'Of these ' + ', '.join(f'{gib(size)} {what}'
                              for what, size in kept.items()) +
      f'; {gib(report["code"])} for all programs\' code.',
      f'Slots: {slots["asked"]}; {slots["largest"]} fit. Microbatch: '
      f'{microbatch["asked"]}; {microbatch["largest"]} fits. '
      '(Arrays are counted, temporaries taken to grow in proportion.)',
      '', _row('on each chip', 'TFLOP', 'GB', 'seconds', 'compiled:',
               'GFLOP', 'GB')]
  for name, part in floor['verbs'].items():
    program = report['programs'].get(name, {})
    compiled = [f'{program[key] / 1e9:.3g}' if key in program else '-'
                for key in ('flops', 'bytes')]
    lines.append(_row(name, f'{part["flops"] / 1e12:.3g}',
                      f'{part["bytes"] / 1e9:.3g}', f'{part["seconds"]:.3g}',
                      '', *compiled))
  lines += [
      '',
      f'With completions of {report["mean_length"]} tokens a step takes at '
      f'least {floor["seconds"]:.3g} s: at most '
      f'{floor["steps_per_hour"]:.0f} steps an hour and '
      f'{floor["tokens_per_second_per_chip"]:.0f} tokens a second and chip. '
      '(The compiler counts a loop\'s body once: one decoding step; of one '
      'microbatch one layer, with updates.scan_layers.)', '']
  return '\n'.join([*lines, *(misfits(report) or ['It fits.'])])


def _row(name: str, *columns: str) -> str:
  return f'{name:<18}' + ''.join(f'{column:>12}' for column in columns)


def _compile(request: dict[str, Any]) -> dict[str, Any]:
  """Asks `ahead` in a process of its own; its lines of progress pass."""
  with tempfile.TemporaryFile('w+') as given, tempfile.TemporaryFile(
      'w+') as answer:
    json.dump(request, given)
    given.seek(0)
    last = ''
    with subprocess.Popen(
        [sys.executable, '-m', 'lapo_jax.ahead'], stdin=given, stdout=answer,
        stderr=subprocess.PIPE, text=True,
        env={**os.environ, **ENVIRONMENT}) as process:
      for line in process.stderr:
        if line.startswith('plan: '):
          print(line.rstrip(), file=sys.stderr, flush=True)
        elif line.strip():
          last = line.strip()
    if process.returncode:
      raise RuntimeError(last or f'it ended with status {process.returncode}.')
    answer.seek(0)
    return json.load(answer)


if __name__ == '__main__':
  run()
