# SPDX-License-Identifier: Apache-2.0
"""Kimi k1.5's length reward by hand."""

import numpy as np
import pytest

from lapo_jax.rewards import kimi


@pytest.mark.parametrize('correct,lengths,expected', [
    # λ = ½, ¼, 0, −½ over 100 to 500; the wrong one at ¼ gets none.
    pytest.param([1, 0, 1, 0], [100, 200, 300, 500], [1.5, 0, 1, -0.5],
                 id='mixed'),
    pytest.param([1, 1, 1], [100, 150, 200], [1.5, 1, 0.5], id='all'),
    pytest.param([0, 0, 0], [100, 150, 200], [0, 0, -0.5], id='none'),
    # The wrong ones count for the range: (300 − 100)/400 is ½.
    pytest.param([0, 1, 0], [100, 300, 500], [0, 1, -0.5], id='one'),
    pytest.param([1, 0], [300, 300], [1, 0], id='equal'),
    pytest.param([1, 0], [96, 4096], [1.5, -0.5], id='truncated'),
])
def test_by_hand(correct, lengths, expected):
  correct, lengths = np.array([correct]), np.array([lengths])
  np.testing.assert_allclose(kimi.reward(correct, lengths), [expected],
                             atol=1e-6)


def test_weight(outcomes):
  rewards, _ = kimi.make(0.4).apply(outcomes([[1, 0]], [[100, 200]]), ())
  np.testing.assert_allclose(rewards.terms['length'], [[0.2, -0.2]], rtol=1e-6)
  np.testing.assert_array_equal(rewards.terms['correct'], [[1, 0]])
