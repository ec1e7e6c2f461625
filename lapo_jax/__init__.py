# SPDX-License-Identifier: Apache-2.0
"""lapo_jax: length-adaptive reinforcement learning for reasoning in JAX."""

import importlib

__version__ = '0.1.0'

# The names a notebook wants at hand, and the room each lives in. Looked up
# when first used: grading workers import the package without needing JAX.
_DOORS = {
    'group_advantages': 'advantages',
    'clipped_surrogate': 'losses',
    'k3_kl': 'losses',
    'token_weights': 'losses',
}

__all__ = sorted(_DOORS)


def __getattr__(name):
  if name in _DOORS:
    return getattr(importlib.import_module(f'{__name__}.{_DOORS[name]}'), name)
  raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


def __dir__():
  return sorted([*globals(), *_DOORS])
