# SPDX-License-Identifier: Apache-2.0
"""How well each method is tested, how exact it is, and what it costs.

  JAX_PLATFORMS=cpu python experiments/length_methods/measure.py

Prints a table: the tests that name the method; the largest error of all that
it computes against plain Python in double precision (`tests/oracles.py`), over
640 groups of 8, relative above 1 and absolute below; and the median time of its
compiled `apply` with default settings on 128 groups of 8, 1,024 completions.
"""

import pathlib
import re
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from lapo_jax import plugins, types

ROOT = pathlib.Path(__file__).parent.parent.parent
GENERIC = ('test_rewards.py', 'test_properties.py', 'test_oracles.py')
P, G, T, SEEDS, CALLS = 128, 8, 4096, 40, 300


def collected():
  """pytest's name of every test that may be about a method."""
  out = subprocess.run(
      [sys.executable, '-m', 'pytest', '--collect-only', 'tests/rewards',
       *(f'tests/{name}' for name in GENERIC)],
      cwd=ROOT, capture_output=True, text=True, check=True).stdout
  return [line for line in out.splitlines() if '::' in line]


def num_tests(name, tests):
  """Those of the method's own file, and those of all methods on this one."""
  own = sum(f'rewards/test_{name}.py::' in test for test in tests)
  shared = sum('/rewards/' not in test and
               name in re.split(r'[\[\]-]', test)[1:] for test in tests)
  return own, shared


def outcomes():
  """Graded groups, with all that a method asks for besides."""
  rng = np.random.default_rng(0)
  correct = rng.integers(0, 2, (P, G)).astype(np.float32)
  extras = {'boxed': correct, 'repeated': correct / 4,
            'self_alignment': correct / 2, 'mean_logprob': -correct}
  return jax.tree.map(jnp.asarray, types.Outcomes(
      correct, rng.integers(1, T, (P, G)).astype(np.int32),
      np.zeros((P, G), bool), np.arange(P, dtype=np.int32),
      np.full(P, 1000, np.int32), extras))


def microseconds(name):
  """The median of many calls, each until its result is there."""
  method, given = plugins.make('rewards', name), outcomes()
  apply, state = jax.jit(method.apply), method.init(P)
  taken = []
  for _ in range(CALLS + 10):
    start = time.perf_counter()
    jax.block_until_ready(apply(given, state))
    taken.append(time.perf_counter() - start)
  return 1e6 * float(np.median(taken[10:]))


def main():
  tests = collected()
  sys.path.insert(0, str(ROOT / 'tests'))
  import test_oracles
  print('| method | tests: its own + of all methods | largest error | '
        f'µs per {P * G:,} completions |\n|---|---|---|---|')
  for name in plugins.names('rewards'):
    own, shared = num_tests(name, tests)
    error = test_oracles.largest_error(name, range(SEEDS))
    print(f'| {name} | {own} + {shared} | {error:.1e} | '
          f'{microseconds(name):.0f} |', flush=True)


if __name__ == '__main__':
  main()
