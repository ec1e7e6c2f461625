# SPDX-License-Identifier: Apache-2.0
"""A run's newest policy as a Hugging Face folder, which transformers loads.

Weights come from the newest whole checkpoint, in the parameters' dtype;
config.json keeps the entries of the model that the run started from, and its
tokenizer's files are copied. Neither the task's data nor the optimizer is
needed.
"""

import json
import os
import pathlib
import shutil
import tempfile
from typing import Any

import jax

from lapo_jax import checkpoint, plugins, sharding, stacking
from lapo_jax.models import _folders

_COPIED = ('generation_config.json', 'tokenizer.json', 'tokenizer_config.json',
           'special_tokens_map.json', 'added_tokens.json', 'vocab.json',
           'merges.txt', 'chat_template.jinja')


def export(workdir: str | os.PathLike, out: str | os.PathLike) -> pathlib.Path:
  """Writes the folder; it appears whole or not at all.

  Args:
    workdir: the run's folder, see `train.train_and_evaluate`.
    out: a folder that is not there yet, or is empty.

  Returns:
    The folder.

  Raises:
    ValueError: no run, no checkpoint, the model it started from is gone, or
      `out` holds something.
    checkpoint.DamagedError: all checkpoints are damaged.
  """
  workdir, out = pathlib.Path(workdir), pathlib.Path(out).absolute()
  if out.exists() and not (out.is_dir() and not any(out.iterdir())):
    raise ValueError(f'{out} holds something: expected a folder that is not '
                     'there yet, or is empty.')
  settings, stacked = _settings(workdir)
  name = settings.pop('name')
  family = plugins.module('models', name)
  model = plugins.make('models', name, **settings)
  source = _folders.resolve(settings['path'])
  params = _restore(workdir / 'checkpoints', family, model, stacked)

  # Beside it, so that the rename stays within one disk; a name that is free.
  out.parent.mkdir(parents=True, exist_ok=True)
  part = pathlib.Path(tempfile.mkdtemp(prefix=f'{out.name}.', dir=out.parent))
  part.chmod(0o755)
  try:
    family.save(params, part, model, source=str(source))
    for file in _COPIED:
      if (source / file).is_file():
        shutil.copyfile(source / file, part / file)
    os.replace(part, out)
  except BaseException:
    shutil.rmtree(part, ignore_errors=True)
    raise
  return out


def _settings(workdir: pathlib.Path) -> tuple[dict[str, Any], bool]:
  """The section `model` of the run's config, and whether it scans layers."""
  file = workdir / 'config.json'
  try:
    config = json.loads(file.read_text())
    settings = dict(config['model'])
    settings['name'], settings['path']
    stacked = bool(config['updates']['scan_layers'])
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise ValueError(f'{file}: expected the config of a run with its model\'s '
                     'name and path and its updates.scan_layers: '
                     f'{error!r}. Give the --workdir of a run.') from error
  return settings, stacked


def _restore(folder: pathlib.Path, family: Any, model: Any,
             stacked: bool) -> Any:
  """The parameters of the newest checkpoint of the last stage that has one."""
  shapes = family.init_shapes(model)
  places = sharding.partition(family.PARTITION_RULES, shapes,
                              sharding.make_mesh())
  if stacked:
    shapes, places = (stacking.shapes(model, shapes),
                      stacking.places(model, places))
  like = jax.tree.map(
      lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype,
                                               sharding=place), shapes, places)
  stages = [int(path.name) for path in folder.glob('*') if path.name.isdigit()]
  found = checkpoint.restore_first(
      [(folder / str(stage), like) for stage in sorted(stages, reverse=True)],
      field='params')
  if found is None:
    raise ValueError(f'{folder}: got no checkpoint; expected a run that has '
                     'saved one, see checkpoint_every.')
  _, params, _ = found
  # On the host a layer is a view.
  return model.unstack(jax.device_get(params)) if stacked else params
