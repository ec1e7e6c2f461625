# SPDX-License-Identifier: Apache-2.0
"""What every method asks of the arrays that it is given.

It asks while JAX traces, so a mistake is told before anything is computed,
and inside of anybody's `jit`, too.
"""

from typing import Any

from jaxtyping import Array
import numpy as np

# Names of what counts tokens.
_TOKENS = ('lengths', 'target_lengths', 'budgets', 'history', 'records')
_MEANING = {'P G': 'prompts by completions', 'B T': 'completions by tokens'}


def check(axes: str, **arrays: Any) -> None:
  """Refuses arrays of other axes, of unlike shapes or of no real numbers.

  Args:
    axes: letters of `types`, 'P G' or 'B T'.
    **arrays: by the names that a message shall use; None is left out.

  Raises:
    ValueError: with the names, their shapes and what was expected.
  """
  arrays = {name: x for name, x in arrays.items() if x is not None}
  for name, x in arrays.items():
    _check_numbers(name, x)
  wanted = f'[{axes.replace(" ", ", ")}]'
  if (len({x.shape for x in arrays.values()}) > 1 or
      any(x.ndim != len(axes.split()) for x in arrays.values())):
    raise ValueError(f'{_shapes(arrays)}: expected {wanted}, {_MEANING[axes]}'
                     f'{", the same for all" if len(arrays) > 1 else ""}.')


def check_prompts(lengths: Array, **arrays: Any) -> None:
  """Refuses arrays that do not hold one number per prompt of `lengths`.

  Args:
    lengths: [P, G].
    **arrays: [P], by the names that a message shall use; None is left out.

  Raises:
    ValueError: with the names, their shapes and what was expected.
  """
  for name, x in arrays.items():
    if x is None:
      continue
    _check_numbers(name, x)
    if x.shape != lengths.shape[:1]:
      raise ValueError(f'{_shapes({name: x, "lengths": lengths})}: expected '
                       f'[P] and [P, G], one number of {name} per prompt.')


def _shapes(arrays: dict[str, Array]) -> str:
  """'correct has shape (3, 8), lengths (3, 1)'."""
  return ', '.join(f'{name}{"" if i else " has shape"} {x.shape}'
                   for i, (name, x) in enumerate(arrays.items()))


def _check_numbers(name: str, x: Any) -> None:
  """Refuses what is no array of real numbers."""
  if not hasattr(x, 'dtype'):
    raise ValueError(f'{name} is a {type(x).__name__}: expected an array, such '
                     f'as numpy.asarray({name}).')
  # By name: bfloat16 is no number to NumPy.
  kind = np.dtype(x.dtype).name
  if name == 'lengths' and kind == 'bool':
    raise ValueError('lengths is bool: expected tokens, integers or floats; '
                     'the order is (correct, lengths).')
  if not kind.startswith(('bool', 'int', 'uint', 'float', 'bfloat')):
    raise ValueError(f'{name} is {kind}: expected real numbers.')
  if name != 'correct' and kind.startswith(('uint', 'int8', 'int16')):
    raise ValueError(f'{name} is {kind}, whose differences wrap around: '
                     'expected int32 or floats.')
  if name in _TOKENS and kind in ('bfloat16', 'float16'):
    raise ValueError(f'{name} is {kind}, which rounds tokens from '
                     f'{256 if kind == "bfloat16" else 2048} on: expected '
                     'int32 or float32.')
