# SPDX-License-Identifier: Apache-2.0
"""A file is a plug-in by its name, and its mistakes are told apart."""

import json
import pathlib
import re
import sys
import textwrap

import jax
import numpy as np
import pytest
from test_main import forget
from toys import config as toy_config

from lapo_jax import main, plugins, train, types

_ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture
def write(tmp_path, monkeypatch):
  """Writes a module onto the import path."""
  monkeypatch.syspath_prepend(tmp_path)
  before = set(sys.modules)
  yield lambda name, text: (tmp_path / f'{name}.py').write_text(
      textwrap.dedent(text))
  # Another test's module of the same name is another file.
  for name in set(sys.modules) - before:
    if name.partition('.')[0].endswith('_lab'):
      del sys.modules[name]


def test_names_are_the_files():
  names = plugins.names('rewards')
  assert {'accuracy', 'lapo'} <= set(names)
  assert names == sorted(names)
  assert not any(name.startswith('_') for name in names)


def test_make_and_defaults():
  assert isinstance(plugins.make('rewards', 'lapo', alpha=0.5), types.Reward)
  assert plugins.defaults('rewards', 'accuracy') == {}
  assert plugins.defaults('rewards', 'lapo') == {
      'stage': 'discovery', 'alpha': 0.7, 'low': 0.3, 'high': 0.7,
      'slope': 100.0, 'beta': 0.8, 'sigma': 120.0, 'cap': 4096,
      'guidance': 'exact', 'statistic': 'median'}


def test_a_typo_is_answered_with_the_names():
  with pytest.raises(ValueError, match=r"'lappo'.*accuracy.*lapo"):
    plugins.make('rewards', 'lappo')
  with pytest.raises(ValueError, match=r'alhpa.*alpha'):
    plugins.make('rewards', 'lapo', alhpa=0.5)
  with pytest.raises(ValueError, match='no_such_lab.reward'):
    plugins.module('rewards', 'no_such_lab.reward')


def test_a_module_without_make_is_no_plugin():
  with pytest.raises(ValueError, match='no `make`'):
    plugins.module('rewards', 'lapo_jax.ops')


def test_a_make_that_returns_nothing(tmp_path, write):
  (tmp_path / 'empty_lab').mkdir()
  write('empty_lab/nothing', 'def make(): pass')
  with pytest.raises(ValueError, match="'empty_lab.nothing'.*returns nothing"):
    plugins.make('rewards', 'empty_lab.nothing')


def test_a_dotted_name_lives_anywhere(tmp_path, write):
  (tmp_path / 'my_lab').mkdir()
  write('my_lab/my_reward', """
      from lapo_jax import types
      def make(bonus: float = 2.0):
        return types.Reward(lambda outcomes, state: (bonus, state))
      """)
  assert plugins.defaults('rewards', 'my_lab.my_reward') == {'bonus': 2.0}
  method = plugins.make('rewards', 'my_lab.my_reward', bonus=3.0)
  assert method.apply(None, ()) == (3.0, ())


@pytest.mark.parametrize('missing', ['not_installed', 'needy'])
def test_a_missing_requirement_is_not_a_missing_plugin(tmp_path, write,
                                                       missing):
  # The second is a prefix of the plug-in's own name.
  (tmp_path / 'needy_lab').mkdir()
  write(f'needy_lab/of_{missing}', f'import {missing}\ndef make(): pass')
  with pytest.raises(ModuleNotFoundError, match=missing):
    plugins.module('rewards', f'needy_lab.of_{missing}')


@pytest.fixture
def readme_method(tmp_path, write):
  """The name of the method that the README shows, now a file."""
  shown = re.search(r'```python\n# my_lab/my_reward.py\n(.+?)```',
                    (_ROOT / 'README.md').read_text(), re.DOTALL)[1]
  (tmp_path / 'my_lab').mkdir()
  write('my_lab/my_reward', shown)
  return 'my_lab.my_reward'


def test_the_readmes_method_by_hand(readme_method):
  reward = plugins.module('rewards', readme_method).reward
  correct = np.array([[1, 0, 1, 0.25]], np.float32)
  lengths = np.array([[100, 400, 200, 50]])
  np.testing.assert_allclose(
      reward(correct, lengths, beta=0.4), [[0.9, 0, 0.8, 0.25]], rtol=1e-6)
  slope = jax.grad(lambda x: reward(correct, x).sum())(lengths * 1.0)
  assert np.isfinite(slope).all()


# What a method must keep, broken, and what is said before any compute.
_BROKEN = {
    'apply=lambda o, s: o.correct': 'expected .types.Rewards, the memory',
    "apply=lambda o, s: (types.Rewards({'x': o.correct[:, 0]}), s)":
        r'gives x the shape .8,.: expected .8, 4.',
    "apply=lambda o, s: (types.Rewards({'x': o.extras['boxd']}), s)":
        "asks for 'boxd' among the extras: there are .*'parsed'",
    "apply=lambda o, s: (types.Rewards({'x': o.correct}, {'y': 1.0}), s)":
        r"weighs .'y'.: expected terms among .'x'.",
    "apply=lambda o, s: (types.Rewards({'x': o.correct}), o.lengths)":
        'gives back a memory of shapes .*expected those of init',
    "apply=lambda o, s: (types.Rewards({'x': o.correct}), s), "
    "read=lambda text, example: {'x': 1 / 0}":
        'read of the method fails .*ZeroDivisionError',
    "apply=lambda o, s: (types.Rewards({'x': o.correct}), s), "
    'read=lambda text, example: None': 'read of the method fails .*TypeError',
}


@pytest.mark.parametrize('made, said', _BROKEN.items(), ids=_BROKEN.values())
def test_a_method_that_breaks_its_contract_is_told_before_any_compute(
    tmp_path, write, model_folder, monkeypatch, made, said):
  (tmp_path / 'my_lab').mkdir()
  write('my_lab/broken', f"""
      from lapo_jax import types
      def make():
        return types.Reward({made})
      """)
  config = toy_config.get_config('reward=my_lab.broken')
  config.model.path = model_folder
  config.lock()
  monkeypatch.chdir(_ROOT)
  with pytest.raises(ValueError, match=said):
    train.prepare(config, str(tmp_path / 'run'))
  assert not (tmp_path / 'run').exists()


def test_a_file_of_ones_own_trains(readme_method, model_folder, compile_cache,
                                   tmp_path, monkeypatch):
  for name, value in compile_cache.items():
    monkeypatch.setenv(name, value)
  monkeypatch.chdir(_ROOT)
  monkeypatch.setattr(sys, 'argv', [
      'lapo_jax', '--config=tests/toys/config.py',
      f'--workdir={tmp_path / "run"}', f'--config.model.path={model_folder}',
      f'--config.reward.name={readme_method}', '--config.reward.beta=0.25',
      '--config.total_steps=2', '--config.eval_every=9'])
  forget()
  try:
    with pytest.raises(SystemExit) as stop:
      main.run()
  finally:
    forget()
  assert stop.value.code in (0, None)
  steps = [json.loads(line) for line in
           (tmp_path / 'run' / 'metrics.jsonl').read_text().splitlines()]
  steps = [step for step in steps if 'update/loss' in step]
  assert len(steps) == 2
  for step in steps:
    # The longest right answer pays 0.25 at most, wrong ones nothing.
    assert -0.25 * step['outcome/correct'] <= step['reward/length'] < 0
    assert step['update/grad_norm'] > 0
  config = json.loads((tmp_path / 'run' / 'config.json').read_text())
  assert config['reward'] == {'name': readme_method, 'beta': 0.25}
