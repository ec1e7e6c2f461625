# SPDX-License-Identifier: Apache-2.0
"""e1 by hand: the effort in the reward and in the prompt agree."""

import numpy as np
import pytest

from lapo_jax.rewards import e1


@pytest.mark.parametrize('correct,effort,expected', [
    # T = 250.
    pytest.param([1, 1, 1, 1], 1.0, [1, 1, 0, 0], id='all'),
    pytest.param([0, 1, 1, 1], 1.5, [0, 1, 1, 0], id='mixed'),
    pytest.param([1, 0, 0, 0], 0.5, [1, 0, 0, 0], id='one'),
    pytest.param([0, 0, 0, 0], 1.5, [0, 0, 0, 0], id='none'),
    pytest.param([1, 1, 1, 1], 0.4, [0, 0, 0, 0], id='not below'),
])
def test_by_hand(correct, effort, expected):
  found = e1.reward(np.array([correct]), np.array([[100, 200, 300, 400]]),
                    np.array([effort], np.float32))
  np.testing.assert_array_equal(found, [expected])


@pytest.mark.parametrize('size,length', [(3, 300), (7, 3), (13, 11), (30, 7)])
def test_equal_lengths(size, length):
  correct, lengths = np.ones((2, size)), np.full((2, size), length)
  found = e1.reward(correct, lengths, np.array([1.0, 1.5], np.float32))
  np.testing.assert_array_equal(found, [[0] * size, [1] * size])


def test_prompt_and_reward_agree_and_take_turns(outcomes, told):
  method = e1.make(efforts=(0.5, 2.0))
  record = outcomes([[1, 1, 1]] * 2, [[100, 200, 600]] * 2, [3, 4])
  state = method.init(9)
  half, double = [[1, 0, 0]], [[1, 1, 0]]  # under 150 and under 600 tokens
  for expected, percents in (([*double, *half], [200, 50]),
                             ([*half, *double], [50, 200])):
    for index, percent in zip([3, 4], percents, strict=True):
      assert told(method, state, index).question == (
          f'Add. Use {percent}% of the usual reasoning effort.')
    rewards, state = method.apply(record, state)
    np.testing.assert_array_equal(rewards.total, expected)
  np.testing.assert_array_equal(state, [0, 0, 0, 2, 2, 0, 0, 0, 0])
  # Another problem's turn is its own.
  assert '50%' in told(method, state, 0).question


def test_settings_are_checked():
  with pytest.raises(ValueError, match=r'efforts are \(0.5, 0.0\)'):
    e1.make(efforts=(0.5, 0.0))
