# SPDX-License-Identifier: Apache-2.0
"""DDCA by hand, and as the loop would use it."""

import numpy as np
import pytest

from lapo_jax.advantages import from_rewards
from lapo_jax.rewards import ddca

# sigmoid(1) − ½.
Q = 0.2310586


@pytest.mark.parametrize('correct,lengths,accuracy,length', [
    # c has mean ½, sd ½. Correct 100, 300: z = ∓1, times ρ = ½.
    pytest.param([1, 1, 0, 0], [100, 300, 1, 4096], [1, 1, -1, -1],
                 [Q / 2, -Q / 2, 0, 0], id='mixed'),
    pytest.param([1, 1], [100, 300], [0, 0], [Q, -Q], id='all'),
    pytest.param([0, 0], [100, 4096], [0, 0], [0, 0], id='none'),
    # Mean ¼, sd √3/4.
    pytest.param([0, 1, 0, 0], [1, 2, 3, 4],
                 [-0.5773503, 1.7320508, -0.5773503, -0.5773503],
                 [0, 0, 0, 0], id='one'),
    pytest.param([1, 1, 0, 0], [35, 35, 35, 35], [1, 1, -1, -1], [0] * 4,
                 id='equal'),
])
def test_by_hand(correct, lengths, accuracy, length):
  correct, lengths = np.array([correct]), np.array([lengths])
  np.testing.assert_allclose(ddca.accuracy_advantages(correct), [accuracy],
                             rtol=1e-6)
  np.testing.assert_allclose(ddca.length_advantages(correct, lengths),
                             [length], rtol=1e-5, atol=1e-7)
  np.testing.assert_allclose(
      ddca.reward(correct, lengths),
      np.array([accuracy]) + 0.2 * np.array([length]), rtol=1e-5)


def test_the_terms_are_the_advantage(outcomes):
  record = outcomes([[1, 1, 0, 0]], [[100, 300, 1, 4096]])
  rewards, _ = ddca.make().apply(record, ())
  found = from_rewards(rewards, record.lengths, baseline='none', scale='none')
  np.testing.assert_allclose(
      found, ddca.reward(record.correct, record.lengths), rtol=1e-6)
