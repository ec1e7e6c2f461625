# SPDX-License-Identifier: Apache-2.0
"""The cosine reward by hand."""

import numpy as np
import pytest

from lapo_jax.rewards import cosine


@pytest.mark.parametrize('correct,lengths,expected', [
    # (1 + cos(πl/1000))/2 = ½ at 500, 0.853553 at 250, 0 from 1000 on.
    pytest.param([1, 0, 1, 0], [500, 500, 250, 250],
                 [0.75, -0.75, 0.9267767, -0.9267767], id='mixed'),
    pytest.param([1, 1], [1000, 2000], [0.5, 0.5], id='all, clamped'),
    pytest.param([0, 0], [1000, 5000], [-0.5, -0.5], id='none, clamped'),
    pytest.param([0, 1], [1000, 1000], [-0.5, 0.5], id='one, equal'),
])
def test_by_hand(correct, lengths, expected):
  found = cosine.reward(np.array([correct]), np.array([lengths]))
  np.testing.assert_allclose(found, [expected], rtol=1e-5)


def test_the_papers_numbers(outcomes):
  method = cosine.make(cap=100, correct_short=2.0, correct_long=1.0,
                       wrong_short=-10.0, wrong_long=0.0, exceed=-10.0)
  rewards, _ = method.apply(
      outcomes([[1, 0, 0]], [[50, 50, 100]],
               truncated=np.array([[False, False, True]])), ())
  np.testing.assert_allclose(rewards.total, [[1.5, -5, -10]], rtol=1e-5)
