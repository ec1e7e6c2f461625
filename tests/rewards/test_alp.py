# SPDX-License-Identifier: Apache-2.0
"""ALP by hand."""

import numpy as np
import pytest

from lapo_jax.rewards import alp


@pytest.mark.parametrize('correct,lengths,cost', [
    # Solved half of the time.
    pytest.param([1, 1, 0, 0], [1000, 2000, 400, 4096], [500, 1000, 200, 2048],
                 id='mixed'),
    pytest.param([1, 1], [1000, 2000], [1000, 2000], id='all'),
    pytest.param([0, 0, 0, 0], [100, 200, 400, 4096], [25, 50, 100, 1024],
                 id='none'),
    pytest.param([0, 0, 1, 0], [100, 200, 400, 400], [25, 50, 100, 100],
                 id='one'),
    pytest.param([1, 0], [300, 300], [150, 150], id='equal'),
])
def test_by_hand(correct, lengths, cost):
  correct, lengths = np.array([correct]), np.array([lengths])
  np.testing.assert_allclose(alp.cost(correct, lengths), [cost])
  np.testing.assert_allclose(alp.reward(correct, lengths, beta=0.001),
                             correct - 0.001 * np.array([cost]), rtol=1e-6,
                             atol=1e-6)


def test_the_default_is_tiny(outcomes):
  rewards, _ = alp.make().apply(outcomes([[1, 1]], [[1000, 2000]]), ())
  np.testing.assert_allclose(rewards.terms['length'], [[-1e-4, -2e-4]],
                             rtol=1e-6)
