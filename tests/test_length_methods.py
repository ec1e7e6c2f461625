# SPDX-License-Identifier: Apache-2.0
"""The comparison of methods: one rule for all arms, and how they are run."""

import ast
import importlib
import os
import pathlib
import sys

from absl import flags
import folders_of_runs
from ml_collections import config_flags
import pytest

from lapo_jax import build, checks, plugins

_ROOT = pathlib.Path(__file__).parent.parent
_FOLDER = _ROOT / 'experiments' / 'length_methods'
sys.path.append(str(_FOLDER))
methods, runs = map(importlib.import_module, ('methods', 'runs'))
sys.path.remove(str(_FOLDER))

# Each the paper's number times 256/C, or per token times C/256.
_SCALED = {
    'LAPO-D': {'slope': 100 * 256 / 4096, 'sigma': 120 * 256 / 4096},
    'LAPO': {'slope': 6.25, 'sigma': 7.5},
    'LAPO with DLER': {'slope': 6.25, 'sigma': 7.5},
    'LEAD': {'low': 1000 * 256 // 8000},
    'GDPO': {'limit': 4000 * 256 // 8000},
    'ShorterBetter': {'beta': 1e-3 * 6000 / 256},
    'LASER-D': {'variant': 'difficulty', 'target': 4096 * 256 // 16384},
    'L1-Max': {'mode': 'mixed', 'alpha': 3e-4 * 4000 / 256, 'low': 6,
               'high': 256},
    'HBPO': {'budgets': (32, 64, 128, 160), 'alpha': 1 / 256},
    'GFPO': {'k': 4}, 'QLPO': {'m': 4}, 'SAS': {'delimiter': ';'},
    # 3 of at most 31/√32 = 5.480 deviations, so of at most 7/√8 = 2.475.
    'DOT': {'alpha': pytest.approx(1.35484, abs=1e-5), 'slack': 2},
}


def config_of(name, monkeypatch):
  """The locked config that the arm's own command asks for."""
  monkeypatch.chdir(_ROOT)
  command = runs.command(name, 3, methods.STEPS, pathlib.Path('there'))
  monkeypatch.setattr(sys, 'argv', command[2:])  # overrides are read there
  values = flags.FlagValues()
  flags.DEFINE_string('workdir', None, 'its folder', flag_values=values)
  found = config_flags.DEFINE_config_file('config', flag_values=values)
  values(command[2:])
  assert values.workdir == 'there'
  return found.value


@pytest.mark.parametrize('name', methods.METHODS)
def test_an_arm_builds_with_the_steps_and_the_cap_of_all(name, monkeypatch):
  config = config_of(name, monkeypatch)
  bench = importlib.import_module('configs.tiny').get_config(
      methods.METHODS[name].argument)
  assert config.is_locked and config.seed == 3
  stages = build.stage_configs(config)
  assert sum(stage.total_steps for _, stage in stages) == 60
  assert stages[0][1].rollout.max_completion_length == 256
  for _, stage in stages:
    checks.choices(stage)
    settings = {k: v for k, v in stage.reward.items() if k != 'name'}
    reward = plugins.make('rewards', stage.reward.name, **settings)
    checks.reward(stage, reward, 480)
    assert stage.rollout.max_completion_length in (256, 192, 128)
    assert (stage.rollout.max_completion_length == 256 or
            name == 'ThinkPrune')
    # What is the bench's stays the bench's.
    for key in ('optimizer', 'updates', 'task', 'model', 'eval'):
      assert stage[key].to_dict() == bench[key].to_dict()
    assert stage.rollout.num_prompts * stage.rollout.group_size == 256
    assert stage.loss.aggregate == 'token' and stage.loss.kl_coef == 0


@pytest.mark.parametrize('name', methods.METHODS)
def test_scaled_numbers_are_literal_products(name):
  mine = {key.removeprefix('reward.'): value
          for key, value in methods.METHODS[name].overrides.items()
          if key.startswith('reward.')}
  assert mine == _SCALED.get(name, {})


def test_prompts_limits_and_lone_lengths_by_the_rule():
  assert [stage['rollout.max_completion_length'] for stage in
          methods.METHODS['ThinkPrune'].stages] == [256, 192, 128]
  assert methods.length(4096, 4096) == 256 and methods.length(0, 4000) == 0
  assert methods.per_token(methods.length(5, 4000), 4000) == 5
  assert methods.deviations(3.0, 8) == 3.0


def test_flags_are_read_back_as_they_were_meant():
  for name in methods.METHODS:
    asked = methods.settings(methods.METHODS[name])
    command = runs.command(name, 0, 60, pathlib.Path('x'), ['--y'])
    assert command[-1] == '--y'
    for key, value in asked.items():
      text = next(part for part in command
                  if part.startswith(f'--config.{key}=')).partition('=')[2]
      assert value == (text if isinstance(value, str) else
                       ast.literal_eval(text))


def test_steps_that_stages_cannot_share_are_an_error():
  with pytest.raises(ValueError, match='50 steps: expected a multiple of 6'):
    methods.settings(methods.METHODS['LAPO'], 50)


def test_the_readme_has_the_table_of_the_arms():
  assert methods.table() in (_FOLDER / 'README.md').read_text()


def test_seeds_are_outermost_and_folders_differ():
  found = list(runs.runs(list(methods.METHODS), 2))
  assert [seed for _, seed in found] == [0] * 20 + [1] * 20
  assert len({runs.folder(_ROOT, *run) for run in found}) == 40


def test_unknown_arms_are_an_error():
  assert runs.chosen('') == list(methods.METHODS)
  assert runs.chosen('DLER,LAPO') == ['DLER', 'LAPO']
  with pytest.raises(ValueError, match='unknown arms dler: expected some of'):
    runs.chosen('dler')


# Stands in for the program: writes what a run leaves, or fails.
_PROGRAM = """
import os, pathlib, sys
sys.path.insert(0, {tests!r})
import folders_of_runs
place = pathlib.Path(sys.argv[1])
if 'DLER' in place.name:
  sys.exit('no such setting')
lent = place / 'stages' / '0.json'
print('lent', lent.exists(), 'cores', len(os.sched_getaffinity(0)))
folders_of_runs.write(place / 'new', seed=int(place.name[-1]))
for file in (place / 'new').iterdir():
  if not (place / file.name).exists():
    file.rename(place / file.name)
"""


@pytest.mark.skipif(not hasattr(os, 'sched_getaffinity'), reason='Linux only')
def test_runs_what_is_missing_and_reports_what_failed(tmp_path, monkeypatch):
  program = _PROGRAM.format(tests=str(_ROOT / 'tests'))
  monkeypatch.setattr(runs, 'command', lambda name, seed, steps, place, more: [
      sys.executable, '-c', program, str(place)])
  names = ['accuracy only', 'DLER', 'SAR']
  failed = runs.Runner(tmp_path, names, 2, 6, 1, [])()
  assert failed == {'DLER_0': 'no such setting', 'DLER_1': 'no such setting'}
  log = lambda name: (tmp_path / name / 'log.txt').read_text()
  # The first of a seed measures its base, the next is lent it.
  assert 'lent False' in log('accuracy_only_0') + log('accuracy_only_1')
  assert 'lent True' in log('SAR_0') and 'lent True' in log('SAR_1')
  table = (tmp_path / 'table.md').read_text()
  assert ('| 2 | **SAR** | 2 | 90.0 ± 0.0 | +10.0 ± 0.0 | +0.0 ± 0.0 | '
          '40.0 ± 0.0 |') in table

  # A second time only what failed is tried, each on a core of its own.
  cores = len(os.sched_getaffinity(0))
  with monkeypatch.context() as patch:
    patch.setattr(runs, 'command', lambda name, seed, steps, place, more: [
        sys.executable, '-c', 'import os; print(len(os.sched_getaffinity(0)))'])
    runs.Runner(tmp_path, ['DLER', 'SAR'], 2, 6, min(cores, 2), [])()
  for seed in (0, 1):
    share = log(f'DLER_{seed}').split()[-1]
    assert int(share) in (cores // min(cores, 2), -(-cores // min(cores, 2)))
    assert log(f'SAR_{seed}').count('lent') == 1


def test_the_page_and_the_pictures(tmp_path):
  for seed in (0, 1):
    for i, name in enumerate((methods.CONTROL, 'LAPO', 'SAR')):
      folders_of_runs.write(runs.folder(tmp_path, name, seed), seed=seed,
                            tokens=40.0 + i)
  arms = runs.found(tmp_path, list(methods.METHODS), 3)
  assert [(arm.name, arm.family, len(arm.runs)) for arm in arms] == [
      (methods.CONTROL, 'control', 2), ('LAPO', 'LAPO', 2),
      ('SAR', 'several rewards', 2)]
  runs.tell(tmp_path, arms)
  assert {path.name for path in tmp_path.glob('*.*')} == {
      'report.html', 'table.md', 'plane.png', 'levels.png', 'length_mean.png',
      'outcome_correct.png', 'outcome_truncated.png', 'policy_entropy.png'}
