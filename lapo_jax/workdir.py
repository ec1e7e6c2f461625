# SPDX-License-Identifier: Apache-2.0
"""A folder belongs to one run: what it was started with lies in it as JSON."""

from collections.abc import Mapping, Sequence
import json
import os
import pathlib
import re
from typing import Any

from lapo_jax import hosts, metrics

_NAMED = 5  # differences that are told one by one
_SHOWN = 60  # characters of a value that are told
# How the keys of a stage's own settings begin.
_STAGE = re.compile(r'^stages\[\d+\]\.')


def claim(folder: pathlib.Path, contents: Mapping[str, Any],
          free_keys: Sequence[str] = ()) -> None:
  """Makes the folder this run's own; process 0 looks and writes.

  Args:
    folder: made if missing.
    contents: what decides the run's numbers, JSON values by file name.
    free_keys: dotted keys, or sections, in which a run that goes on may differ.

  Raises:
    ValueError: it holds another run, named by what differs, and nothing is
      written; or it is not the same folder on every host.
  """
  hosts.from_first(lambda: _claim(folder, contents, free_keys))
  for host, there in enumerate(hosts.gather(all(
      (folder / name).exists() for name in contents))):
    if not there:
      raise ValueError(f'{folder}: host {host} does not see what host 0 has '
                       'written there: expected a --workdir on storage that '
                       'all hosts share.')


def _claim(folder: pathlib.Path, contents: Mapping[str, Any],
           free_keys: Sequence[str]) -> None:
  missing, free = [], tuple(f'{key}.' for key in free_keys)
  for name in contents:
    file = folder / name
    if not file.exists():
      missing.append(name)
      continue
    try:
      theirs = _settings(json.loads(file.read_text()))
    except (ValueError, AttributeError) as error:
      raise ValueError(f'{file}: expected what a run writes there: {error}. '
                       'Give another --workdir.') from error
    # Through JSON: a tuple comes back as a list.
    mine = _settings(json.loads(metrics.to_json(contents[name])))
    changed = [f'{key}: got {_short(mine.get(key))}, the folder\'s run has '
               f'{_short(theirs.get(key))}'
               for key in sorted({**mine, **theirs})
               if not f'{_STAGE.sub("", key)}.'.startswith(free)
               and mine.get(key) != theirs.get(key)]
    if changed:
      more = (f'; and {len(changed) - _NAMED} more'
              if len(changed) > _NAMED else '')
      raise ValueError(f'{folder} holds another run, by its {name}: '
                       f'{"; ".join(changed[:_NAMED])}{more}. Give another '
                       '--workdir, or the same config and data to go on.')
  folder.mkdir(parents=True, exist_ok=True)
  if not os.access(folder, os.W_OK):
    raise ValueError(f'{folder} cannot be written: expected a --workdir of '
                     'one\'s own.')
  for name in missing:
    metrics.replace_text(folder / name,
                         metrics.to_json(contents[name], indent=2))


def _short(value: Any) -> str:
  text = str(value)
  return text if len(text) <= _SHOWN else f'{text[:_SHOWN]} …'


def _settings(section: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
  """Values by dotted key."""
  found = {}
  for key, value in section.items():
    if isinstance(value, dict):
      found |= _settings(value, f'{prefix}{key}.')
    elif isinstance(value, list) and value and isinstance(value[0], dict):
      for i, part in enumerate(value):
        found |= _settings(part, f'{prefix}{key}[{i}].')
    else:
      found[f'{prefix}{key}'] = value
  return found
