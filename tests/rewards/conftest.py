# SPDX-License-Identifier: Apache-2.0
"""What the tests of single methods share."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lapo_jax import types


@pytest.fixture(scope='session')
def outcomes():
  """(correct, lengths, index=…, targets=…, **extras) -> Outcomes."""

  def make(correct, lengths, index=None, targets=None, truncated=None,
           **extras):
    correct = jnp.asarray(correct, jnp.float32)
    index = range(len(correct)) if index is None else index
    targets = [0] * len(correct) if targets is None else targets
    if truncated is None:
      truncated = np.zeros(correct.shape, bool)
    return types.Outcomes(
        correct=correct, lengths=jnp.asarray(lengths, jnp.int32),
        truncated=jnp.asarray(truncated),
        prompt_index=jnp.asarray(list(index), jnp.int32),
        target_lengths=jnp.asarray(targets, jnp.int32),
        extras={name: jnp.asarray(value, jnp.float32)
                for name, value in extras.items()})

  return make


@pytest.fixture(scope='session')
def told():
  """(method, state, index) -> what `instruct` makes of 'Add.'."""

  def tell(method, state=(), index=0, seed=0, prefill=''):
    return method.instruct(types.Example('Add.', '2', prefill=prefill), index,
                           jax.device_get(state), np.random.default_rng(seed))

  return tell
