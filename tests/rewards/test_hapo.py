# SPDX-License-Identifier: Apache-2.0
"""HAPO by hand: the cosine, and the record over visits."""

import jax
import numpy as np
import pytest

from lapo_jax.rewards import hapo

HALF = np.sqrt(0.5)  # cos(π/4)


@pytest.mark.parametrize('correct,lengths,expected', [
    # h = 100: f = cos(π/4), 0, cos(3π/4), −1; −0.7 is the worst if correct.
    pytest.param([1, 1, 1, 1], [50, 100, 150, 300],
                 [1 + HALF, 1, 0.3, 0.3], id='all'),
    pytest.param([0, 0, 0, 0], [50, 100, 150, 4096], [0, 0, -HALF, -1],
                 id='none, one truncated'),
    pytest.param([1, 0], [50, 50], [1 + HALF, 0], id='mixed, equal'),
    pytest.param([0, 0, 1], [150, 50, 100], [-HALF, 0, 1], id='one'),
])
def test_by_hand(correct, lengths, expected):
  correct, lengths = np.array([correct]), np.array([lengths])
  np.testing.assert_allclose(
      hapo.reward(correct, lengths, np.array([100])), [expected], atol=1e-6)
  np.testing.assert_array_equal(
      hapo.reward(correct, lengths, np.array([0])), correct)


def test_settings_act():
  found = hapo.reward(np.array([[1]]), np.array([[300]]), np.array([100]),
                      weight=0.5, worst=-0.5)
  np.testing.assert_allclose(found, [[0.75]])


def test_the_record_over_visits(outcomes):
  method = hapo.make()
  step, state = jax.jit(method.apply), method.init(4)
  rewards, state = step(outcomes([[1, 1, 0]], [[200, 100, 9]], [2]), state)
  # The first visit has no history, and sets one.
  np.testing.assert_array_equal(rewards.total, [[1, 1, 0]])
  assert int(state[2]) == 100
  # Longer or wrong ones do not move it; another problem has none.
  rewards, state = step(outcomes([[1, 0, 0], [0, 0, 0]],
                                 [[150, 50, 9], [1, 2, 3]], [2, 1]), state)
  np.testing.assert_allclose(rewards.total, [[0.3, 0, 0], [0, 0, 0]],
                             atol=1e-6)
  assert int(state[2]) == 100
  _, state = step(outcomes([[1, 1, 1]], [[150, 70, 90]], [2]), state)
  np.testing.assert_array_equal(np.asarray(state) < 2**30,
                                [False, False, True, False])
  assert int(state[2]) == 70


def test_a_problem_twice_in_a_step(outcomes):
  method = hapo.make()
  for order in ([[80, 90], [70, 60]], [[70, 60], [80, 90]]):
    rewards, state = method.apply(outcomes([[1, 1], [1, 1]], order, [1, 1]),
                                  method.init(2))
    assert int(state[1]) == 60
    np.testing.assert_array_equal(rewards.total, np.ones((2, 2)))
