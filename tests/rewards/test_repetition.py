# SPDX-License-Identifier: Apache-2.0
"""N-gram repetition by hand, and against a count with Python's sets."""

import jax.numpy as jnp
import numpy as np
import pytest

from lapo_jax import types
from lapo_jax.rewards import repetition


def test_by_hand():
  tokens = np.array([[1, 2, 3, 4, 0], [5, 5, 5, 5, 5], [1, 2, 1, 2, 0],
                     [5, 5, 0, 0, 0], [0, 0, 0, 0, 0]])
  mask = np.array([4, 5, 4, 1, 0])[:, None] > np.arange(5)[None, :]
  # Bigrams: 3 of 3; 1 of 4; (1,2) (2,1) (1,2): 2 of 3; none; none.
  np.testing.assert_allclose(repetition.repeated_share(tokens, mask, 2),
                             [0, 0.75, 1 / 3, 0, 0], rtol=1e-6)
  np.testing.assert_allclose(repetition.repeated_share(tokens, mask, 1),
                             [0, 0.8, 0.5, 0, 0], rtol=1e-6)
  np.testing.assert_array_equal(repetition.repeated_share(tokens, mask, 9),
                                np.zeros(5))


@pytest.mark.parametrize('n', [1, 3])
def test_like_a_set_of_tuples(n):
  rng = np.random.default_rng(0)
  tokens, lengths = rng.integers(0, 4, (20, 30)), rng.integers(0, 31, 20)
  expected = []
  for row, length in zip(tokens.tolist(), lengths, strict=True):
    grams = [tuple(row[i:i + n]) for i in range(length - n + 1)]
    expected.append(1 - len(set(grams)) / len(grams) if grams else 0)
  mask = np.arange(30)[None, :] < lengths[:, None]
  np.testing.assert_allclose(repetition.repeated_share(tokens, mask, n),
                             expected, rtol=1e-6, atol=1e-6)


def test_from_the_tokens_to_the_reward(outcomes):
  method = repetition.make(n=2, penalty=-2.0)
  tokens = jnp.array([[5, 5, 5, 5, 5], [1, 2, 3, 4, 0],
                      [1, 2, 1, 2, 0], [7, 8, 9, 0, 0]])
  mask = jnp.array([5, 4, 4, 3])[:, None] > jnp.arange(5)[None, :]
  zeros = jnp.zeros(tokens.shape)
  rollout = types.Rollout(tokens, mask, tokens, mask, mask, zeros)
  found = method.measure(rollout, None, None)
  assert found['repeated'].shape == (4,)
  record = outcomes([[1, 1], [0, 1]], [[5, 4], [4, 3]]).replace(
      extras={'repeated': found['repeated'].reshape(2, 2)})
  rewards, _ = method.apply(record, ())
  np.testing.assert_allclose(rewards.total, [[1 - 1.5, 1], [-2 / 3, 1]],
                             rtol=1e-6)


def test_settings_are_checked():
  with pytest.raises(ValueError, match='n 0 and penalty -1.0'):
    repetition.make(n=0)
  with pytest.raises(ValueError, match='n 3 and penalty 1.0'):
    repetition.make(penalty=1.0)
