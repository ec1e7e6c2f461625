# SPDX-License-Identifier: Apache-2.0
"""Compiles the programs of a step for TPUs that are not here.

  echo '{"config": {…}, "topology": "v5e:4x4", "mean_length": 2048}' | \
    python -m lapo_jax.ahead

The JSON that it prints is what `plan` reads. It wants a process of its own,
with libtpu and `plan.ENVIRONMENT`. Of the model it needs the shape alone, of
the task nothing.

Programs are compiled at their worst, see `cases`. A program may use what the
chip has, less what lies beside it: arrays that are kept meanwhile and are none
of its arguments, and all programs.
"""

import bisect
from collections.abc import Callable, Sequence
import json
import pathlib
import re
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections

from lapo_jax import (
  cases,
  checks,
  costs,
  forcing,
  plugins,
  sharding,
)
from lapo_jax import programs as programs_lib
from lapo_jax.models import _configs, _folders

_SHAPES = pathlib.Path(__file__).parent / 'assets' / 'shapes'
# Problems of a task, for the method's memory: some bytes each.
_PROBLEMS = 10_000
# How the compiler says what it would need.
_NEEDS = re.compile(r'\(([\d.]+)([KMGT])\) exceeds|Used ([\d.]+)([KMGT]) of')
_UNITS = {'K': 2**10, 'M': 2**20, 'G': 2**30, 'T': 2**40}


def main() -> None:
  """Reads a request and prints the report; a mistake ends it with one line."""
  request = json.load(sys.stdin)
  try:
    found = report(ml_collections.ConfigDict(request['config']),
                   request['topology'], request['mean_length'])
  except (ValueError, RuntimeError) as error:
    print(' '.join(str(error).split()), file=sys.stderr)
    sys.exit(2)
  json.dump(found, sys.stdout)


def report(config: ml_collections.ConfigDict, topology: str,
           mean_length: int) -> dict[str, Any]:
  """What the programs of a config's step take on each chip of a topology.

  Args:
    config: one stage's.
    topology: see `costs.find`.
    mean_length: tokens of a completion, for the work of a step.

  Raises:
    ValueError: a topology or a setting that does not fit, with what to change.
  """
  from jax.experimental import topologies
  chip = costs.find(topology)
  devices = topologies.get_topology_desc(
      platform='tpu', topology_name=topology).devices
  mesh = programs_lib.make_mesh(config, devices)
  model = read_model(config)
  reward = plugins.make('rewards', config.reward.name, **{
      key: value for key, value in config.reward.items() if key != 'name'})
  found = programs_lib.make(
      config, model, mesh, eos_ids=(0,), pad_id=0, memory=chip.memory,
      # Which tokens they are is no matter.
      forced_words=forcing.Words(0, 0) if checks.forces(config) else None,
      reward_shapes=checks.reward(config, reward, _PROBLEMS))
  sampler = cases.sampler(config, found, found.sampler['num_slots'])
  programs = {name: measure(case, name) for name, case in (
      sampler.cases | cases.trainer(config, found, mesh)).items()}
  # Programs stay where they run.
  code = sum(program.get('code', 0) for program in programs.values())
  free = chip.memory - code
  state = found.state_shapes
  return {
      'topology': topology, 'chips': mesh.size, 'memory': chip.memory,
      'code': code,
      'mesh': {name: int(size) for name, size in mesh.shape.items()},
      'model': config.model.path, 'mean_length': mean_length,
      'kept': {name: cases.device_bytes(tree) for name, tree in (
          ('parameters', state.params), ('optimizer', state.opt_state),
          ('reference', cases.reference(config, found)),
          ('sampler', sampler.params))},
      'programs': programs,
      'slots': _slots(config, found, mesh, programs, free),
      'microbatch': _microbatch(config, mesh, programs, free),
      'floor': _floor(config, model, mesh, found, sampler.pooled,
                      mean_length, chip),
  }


def measure(case: cases.Case, name: str) -> dict[str, Any]:
  """Bytes and operations of a compiled program, on each device.

  `together` is all that is in memory while it runs, but for programs. `flops`
  and `bytes` are the compiler's: the body of a loop counts once.
  """
  started = time.monotonic()
  beside = cases.device_bytes(case.beside)
  try:
    compiled = case.function.lower(*case.arguments).compile()
  except jax.errors.JaxRuntimeError as error:
    if 'RESOURCE_EXHAUSTED' not in str(error):
      raise
    return {'beside': beside, 'together': beside + needed(str(error)),
            'refused': ' '.join(str(error).split())[:300]}
  seconds = round(time.monotonic() - started, 1)
  print(f'plan: {name} compiled in {seconds} s', file=sys.stderr, flush=True)
  memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
  found = {
      'arguments': memory.argument_size_in_bytes,
      'output': memory.output_size_in_bytes - memory.alias_size_in_bytes,
      'temporaries': memory.temp_size_in_bytes,
      'beside': beside}
  # A copy has no operations.
  return {**found, 'together': sum(found.values()),
          'flops': cost.get('flops', 0.0),
          'bytes': cost.get('bytes accessed', 0.0),
          'code': memory.generated_code_size_in_bytes, 'seconds': seconds}


def needed(message: str) -> int:
  """Bytes that the compiler asks for in vain, at the least; 0 if unsaid."""
  found = [float(a or b) * _UNITS[c or d]
           for a, c, b, d in _NEEDS.findall(message)]
  return int(max(found, default=0))


def most(fits: Callable[[int], bool], numbers: Sequence[int]) -> int:
  """The last of the rising numbers that fits, where what fits comes first."""
  return ([0] + list(numbers))[bisect.bisect_left(
      numbers, True, key=lambda number: not fits(number))]


def _slots(config: ml_collections.ConfigDict, found: programs_lib.Programs,
           mesh: jax.sharding.Mesh, programs: dict[str, Any],
           memory: int) -> dict[str, int]:
  """Slots as asked, and the most that fit: their arrays are counted.

  Temporaries are taken to grow in proportion.
  """
  shards = sharding.sampling_devices(mesh)
  rows = config.rollout.num_prompts * config.rollout.group_size // shards
  asked = min(-(-found.sampler['num_slots'] // shards), rows)

  def together(name, number):
    called = cases.sampler(config, found, number * shards).cases
    case, state = called[name], called['decode'].arguments[-1]
    # Decoding gives its state back, growing makes a new one beside the old.
    held = (case.arguments, case.beside, state if name == 'grow' else ())
    return cases.device_bytes(held) + programs[name].get(
        'temporaries', 0) * number // asked

  fits = lambda number: all(together(name, number) <= memory
                            for name in ('decode', 'grow'))
  return {'asked': asked * shards,
          'largest': most(fits, range(1, rows + 1)) * shards}


def _microbatch(config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh,
                programs: dict[str, Any], memory: int) -> dict[str, int]:
  """The microbatch as asked, and the largest that fits.

  Temporaries are taken to grow in proportion, though a part stays as it is.
  """
  asked = config.updates.microbatch_size
  parts = [programs[name] for name in ('update', 'score') if name in programs]

  def fits(number):
    return all(
        part['together'] + part.get('temporaries', part['together']) *
        (number / asked - 1) <= memory for part in parts)

  return {'asked': asked, 'largest': most(fits, checks.microbatch_sizes(
      config, sharding.batch_devices(mesh)))}


def _floor(config: ml_collections.ConfigDict, model: Any,
           mesh: jax.sharding.Mesh, found: programs_lib.Programs, pooled: bool,
           mean_length: int, chip: costs.Chip) -> dict[str, Any]:
  """The least time of a step, verb by verb, and what that allows."""
  rollout, sampler = config.rollout, found.sampler['model']
  passes = (int(checks.updates_per_batch(config) > 1) +
            int(config.loss.kl_coef > 0))
  work = costs.step_work(model, costs.Shape(
      prompts=rollout.num_prompts, group_size=rollout.group_size,
      prompt_length=rollout.max_prompt_length, mean_length=mean_length,
      cap=rollout.max_completion_length,
      num_slots=found.sampler['num_slots'], score_passes=passes,
      epochs=config.updates.num_epochs,
      microbatch_size=config.updates.microbatch_size, chips=mesh.size,
      shards=sharding.sampling_devices(mesh), tensor=mesh.shape['tensor'],
      pooled=pooled, weight_bytes=jnp.dtype(sampler.dtype).itemsize,
      cache_dtype=found.sampler['cache_dtype'] or sampler.dtype))
  verbs = {name: {**part._asdict(), 'seconds': part.seconds(chip)}
           for name, part in work.items()}
  seconds = sum(part['seconds'] for part in verbs.values())
  tokens = rollout.num_prompts * rollout.group_size * mean_length
  return {'verbs': verbs, 'seconds': seconds, 'steps_per_hour': 3600 / seconds,
          'tokens_per_second_per_chip': tokens / seconds / mesh.size}


def read_model(config: ml_collections.ConfigDict) -> Any:
  """The model of a folder, or of a name whose shape is known."""
  settings = {key: value for key, value in config.model.items()
              if key not in ('name', 'path')}
  path = str(config.model.path)
  known = sorted(file.parent.name for file in _SHAPES.glob('*/config.json'))
  try:
    folder = _SHAPES / path if path in known else _folders.resolve(path)
  except ValueError as error:
    raise ValueError(f'{error} Or one of {known}, whose shapes are '
                     'known.') from error
  family = plugins.module('models', config.model.name)
  return _configs.read(folder, family.FAMILY, **settings)[0]


if __name__ == '__main__':
  main()
