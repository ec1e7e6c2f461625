# SPDX-License-Identifier: Apache-2.0
"""Who may import whom, told by the imports alone; and importing does nothing.

The drawing is `_FLOORS`: a room imports rooms of lower floors only. A plural
folder counts as one room, its underscore files as another.
"""

import ast
import pathlib
import subprocess
import sys

import pytest

_ROOT = pathlib.Path(__file__).parent.parent
_PACKAGE = _ROOT / 'lapo_jax'
_FILES = sorted(_PACKAGE.rglob('*.py'))
_PLURALS = ('rewards', 'models', 'tasks')

_FLOORS = (
    {'lapo_jax'},
    {'hosts'},
    {'types', 'ops', 'sharding', 'plugins', 'tokenizer', 'checkpoint',
     'wording', 'page', 'keywords', 'attention', 'draws', 'slots', 'logprobs',
     'ratios', 'stacking'},
    {'rewards/_', 'models/_', 'tasks/_', 'paging', 'pools', 'grading_worker',
     'forward', 'forcing'},
    {'prefilling'},
    {'decoding'},
    {'shards'},
    {'metrics', 'grader', 'losses', 'advantages', 'sampling', 'supervised',
     'offline', 'costs', 'rewards', 'models', 'tasks'},
    {'objective'},
    {'rollout', 'grpo', 'export', 'workdir', 'protocol', 'packing',
     'trl_adapter'},
    {'evaluate', 'checks', 'layout'},
    {'programs'},
    {'cases'},
    {'build', 'scores', 'arms'},
    {'eval_folder', 'stages', 'pictures', 'groups'},
    {'curves', 'stage_picture'},
    {'comparison'},
    {'report'},
    {'train', 'benchmark', 'ahead'},
    {'main'},
    {'plan'},
)
_FLOOR_OF = {room: i for i, rooms in enumerate(_FLOORS) for room in rooms}

_PURE = {'types', 'ops', 'ratios', 'advantages', 'losses', 'offline',
         'rewards', 'rewards/_'}
_PURE_IMPORTS = {'jax', 'numpy', 'chex', 'jaxtyping', 'flax.struct',
                 'collections', 'functools', 'itertools', 'math', 'typing'}
_CONFIG_ROOMS = {'build', 'checks', 'stages', 'train', 'benchmark', 'main',
                 'cases', 'ahead', 'plan', 'programs'}


def _room(name):
  """'lapo_jax.tasks._answers' -> 'tasks/_'; the package itself is a room."""
  parts = name.split('.')[1:]
  if not parts:
    return 'lapo_jax'
  if parts[0] in _PLURALS:
    private = len(parts) > 1 and parts[1].startswith('_')
    return f'{parts[0]}/_' if private else parts[0]
  return parts[0]


def _module(file):
  parts = file.relative_to(_ROOT).with_suffix('').parts
  return '.'.join(parts[:-1] if parts[-1] == '__init__' else parts)


def _imports(file):
  """Dotted names of what a file imports, wherever in it."""
  for node in ast.walk(ast.parse(file.read_text())):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f'{file}: a relative import'
      # `from lapo_jax import ops` imports a module, `from typing import Any`
      # a name: the longer form tells both.
      yield from (f'{node.module}.{alias.name}' for alias in node.names)


def _ours(file):
  """Modules of the package that a file imports."""
  known = {_module(f) for f in _FILES}
  for name in _imports(file):
    while name.startswith('lapo_jax') and name not in known:
      name = name.rpartition('.')[0]
    if name.startswith('lapo_jax'):
      yield name


def _under(name, packages):
  return any(f'{name}.'.startswith(f'{package}.') for package in packages)


def test_every_room_is_in_the_drawing():
  assert {_room(_module(file)) for file in _FILES} == set(_FLOOR_OF)


@pytest.mark.parametrize('file', _FILES, ids=_module)
def test_no_arrow_points_upward(file):
  mine = _module(file)
  for other in _ours(file):
    inside = _room(other) == _room(mine) and _room(mine).endswith('/_')
    assert inside or _FLOOR_OF[_room(other)] < _FLOOR_OF[_room(mine)], (
        f'{mine} imports {other}')


@pytest.mark.parametrize('file', [f for f in _FILES
                                  if _room(_module(f)) in _PURE], ids=_module)
def test_arithmetic_knows_arrays_only(file):
  for name in _imports(file):
    ours = name.startswith('lapo_jax')
    assert (_room(name) in _PURE if ours else _under(name, _PURE_IMPORTS)), (
        f'{_module(file)} imports {name}')


@pytest.mark.parametrize('file', _FILES, ids=_module)
def test_config_stops_at_the_top_floor(file):
  if _room(_module(file)) not in _CONFIG_ROOMS:
    names = list(_imports(file))
    assert not [n for n in names if _under(n, {
        'ml_collections', 'absl.flags', 'absl.app', 'configs'})]


@pytest.mark.parametrize('file', [f for f in _FILES if f.parent.name in
                                  _PLURALS], ids=_module)
def test_siblings_do_not_know_one_another(file):
  mine = _module(file)
  for other in _ours(file):
    if other.startswith(mine.rpartition('.')[0] + '.'):
      assert other.rpartition('.')[2].startswith('_'), (
          f'{mine} imports its sibling {other}')


@pytest.mark.parametrize('room', ['sampling', 'grpo', 'forward', 'supervised'])
def test_a_model_is_given_not_imported(room):
  assert not [name for name in _ours(_PACKAGE / f'{room}.py')
              if _room(name).startswith('models')]


def test_the_package_does_not_know_configs_tests_or_experiments():
  for file in _FILES:
    assert not [name for name in _imports(file)
                if _under(name, {'configs', 'tests', 'experiments'})]


_IMPORT_ALL = """
import importlib, sys
modules = sys.argv[1:]
# Others' rooms may read their own files; ours come second.
import absl.app, absl.flags, chex, etils.epath, flax.linen, jax, jaxtyping
import matplotlib.figure, ml_collections.config_flags, numpy, optax
import orbax.checkpoint, safetensors.numpy, tensorboardX, tqdm
import jax.experimental.mesh_utils, jax.experimental.multihost_utils
from jax._src import xla_bridge
assert not xla_bridge.backends_are_initialized()

touched = []
def watch(event, arguments):
  if event == 'open' and not str(arguments[0]).endswith(('.py', '.pyc')):
    touched.append((event, arguments[0]))
  if event in ('socket.connect', 'subprocess.Popen', 'os.mkdir', 'os.remove',
               'os.rename', 'os.putenv'):
    touched.append((event, arguments))
sys.addaudithook(watch)
for name in modules:
  importlib.import_module(name)
assert not touched, touched
assert not xla_bridge.backends_are_initialized()
assert 'transformers' not in sys.modules  # seconds
"""


def test_importing_touches_no_device_file_or_network():
  modules = [_module(file) for file in _FILES]
  # Without -B the first of all would write bytecode.
  done = subprocess.run([sys.executable, '-B', '-c', _IMPORT_ALL, *modules],
                        cwd=_ROOT, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
