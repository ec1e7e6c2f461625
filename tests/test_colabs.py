# SPDX-License-Identifier: Apache-2.0
"""The notebooks are whole and clean; `.ci/run` executes them."""

import ast
import importlib
import json
import pathlib
import re

import pytest

_ROOT = pathlib.Path(__file__).parent.parent
_NOTEBOOKS = sorted((_ROOT / 'colabs').glob('*.ipynb'))


@pytest.fixture(params=_NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request):
  return request.param


def cells(path, kind):
  return [''.join(cell['source']) for cell in
          json.loads(path.read_text())['cells'] if cell['cell_type'] == kind]


def tree(path):
  """Of all code; IPython's own lines are left out."""
  text = '\n'.join(cells(path, 'code'))
  return ast.parse(re.sub(r'^( *)%.*$', r'\1pass', text, flags=re.M))


def test_there_are_three():
  assert [path.stem for path in _NOTEBOOKS] == [
      '1_rewards_and_advantages', '2_sampling', '3_train_tiny']


def test_it_is_valid_and_stripped(notebook):
  nbformat = pytest.importorskip('nbformat')
  nbformat.validate(nbformat.read(notebook, as_version=4))
  found = json.loads(notebook.read_text())
  assert notebook.read_text().endswith('}\n')
  assert set(found['metadata']) == {'kernelspec', 'language_info'}
  for cell in found['cells']:
    assert not cell['metadata']
    if cell['cell_type'] == 'code':
      assert not cell['outputs'] and cell['execution_count'] is None


def test_cells_are_short(notebook):
  for text in cells(notebook, 'code'):
    assert text.strip() and len(text.splitlines()) <= 42


def test_it_installs_only_what_is_missing(notebook):
  first = cells(notebook, 'code')[0]
  guard, install = first.splitlines()[-2:]
  assert guard.startswith('if importlib.util.find_spec(\'lapo_jax\') is None')
  assert install.startswith('  %pip install')
  assert '%pip' not in ''.join(cells(notebook, 'code')[1:])


def test_badges_open_it_wherever_it_is_named(notebook):
  url = (f'https://colab.research.google.com/github/OWNER/lapo_jax/blob/main/'
         f'colabs/{notebook.name}')
  assert url in cells(notebook, 'markdown')[0]
  readme = (_ROOT / 'README.md').read_text()
  assert url in readme and f'(colabs/{notebook.name})' in readme


def test_what_it_imports_exists(notebook):
  """And what it takes from our modules, under whatever name."""
  modules, ours = {}, ('lapo_jax', 'configs')
  for node in ast.walk(tree(notebook)):
    if isinstance(node, ast.Import | ast.ImportFrom):
      folder = f'{node.module}.' if isinstance(node, ast.ImportFrom) else ''
      modules |= {alias.asname or alias.name: folder + alias.name
                  for alias in node.names}
  modules = {name: path for name, path in modules.items()
             if path.split('.')[0] in ours}
  assert modules
  loaded = {name: importlib.import_module(path)
            for name, path in modules.items()}
  for node in ast.walk(tree(notebook)):
    if (isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
        and node.value.id in loaded):
      assert hasattr(loaded[node.value.id], node.attr), ast.unparse(node)
