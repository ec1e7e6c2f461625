# SPDX-License-Identifier: Apache-2.0
"""A file is a plug-in by its name, and its mistakes are told apart."""

import textwrap

import pytest

from lapo_jax import plugins, types


@pytest.fixture
def write(tmp_path, monkeypatch):
  """Writes a module onto the import path."""
  monkeypatch.syspath_prepend(tmp_path)
  return lambda name, text: (tmp_path / f'{name}.py').write_text(
      textwrap.dedent(text))


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
