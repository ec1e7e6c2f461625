# SPDX-License-Identifier: Apache-2.0
"""Plug-ins by file name: `rewards/lapo.py` is `make('rewards', 'lapo')`.

A dotted name is imported as it stands, so a plug-in may live outside the
package. Hyperparameters are written once, in the signature of the file's
`make`; `defaults` reads them into the config.
"""

import importlib
import inspect
import pkgutil
import types as python_types
from typing import Any

_PACKAGE = __name__.rpartition('.')[0]


def names(kind: str) -> list[str]:
  """The plug-ins of a plural folder ('rewards', 'models', 'tasks')."""
  folder = importlib.import_module(f'{_PACKAGE}.{kind}')
  return sorted(m.name for m in pkgutil.iter_modules(folder.__path__)
                if not m.name.startswith('_'))


def module(kind: str, name: str) -> python_types.ModuleType:
  """The module of a plug-in.

  Raises:
    ValueError: no such plug-in; the message lists the known ones.
  """
  path = name if '.' in name else f'{_PACKAGE}.{kind}.{name}'
  try:
    found = importlib.import_module(path)
  except ModuleNotFoundError as error:
    # A plug-in that exists but misses a package of its own is another fault.
    if error.name and not f'{path}.'.startswith(f'{error.name}.'):
      raise
    raise ValueError(
        f'unknown name {name!r} in {kind}: expected one of {names(kind)} or '
        'the dotted path of an importable module.') from error
  if name.startswith('_') or not hasattr(found, 'make'):
    raise ValueError(f'{path} is not a plug-in of {kind}: it has no `make`; '
                     f'expected one of {names(kind)}.')
  return found


def make(kind: str, name: str, **kwargs) -> Any:
  """Calls the plug-in's `make`.

  Raises:
    ValueError: unknown plug-in, an argument that its `make` lacks, or nothing
      is made.
  """
  make_fn = module(kind, name).make
  known = inspect.signature(make_fn).parameters
  unknown = sorted(set(kwargs) - set(known))
  if unknown:
    raise ValueError(f'{kind} {name!r} has no setting {unknown}: expected '
                     f'some of {sorted(known)}.')
  made = make_fn(**kwargs)
  if made is None:
    raise ValueError(f'{kind} {name!r}: its `make` returns nothing.')
  return made


def defaults(kind: str, name: str) -> dict[str, Any]:
  """The arguments of the plug-in's `make` with their default values."""
  parameters = inspect.signature(module(kind, name).make).parameters
  return {key: parameter.default for key, parameter in parameters.items()
          if parameter.default is not inspect.Parameter.empty}
