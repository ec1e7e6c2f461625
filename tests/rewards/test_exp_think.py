# SPDX-License-Identifier: Apache-2.0
"""ExpThink by hand: the record, and who is too far from it."""

import jax
import numpy as np
import pytest

from lapo_jax.rewards import exp_think


@pytest.mark.parametrize('correct,lengths,expected', [
    # The shortest correct is 100: up to 130.
    pytest.param([1, 1, 1, 0], [100, 130, 131, 50], [1, 1, 0, 0], id='mixed'),
    pytest.param([1, 1, 1], [200, 100, 90], [0, 1, 1], id='all'),
    pytest.param([0, 0], [10, 4096], [0, 0], id='none'),
    pytest.param([0, 1], [10, 4000], [0, 1], id='one'),
    pytest.param([1, 1, 0], [70, 70, 70], [1, 1, 0], id='equal'),
    # A grade below ½ is no correct completion; it stays itself.
    pytest.param([1, 0.25], [100, 900], [1, 0.25], id='graded'),
])
def test_by_hand(correct, lengths, expected):
  correct, lengths = np.array([correct], np.float32), np.array([lengths])
  np.testing.assert_allclose(exp_think.reward(correct, lengths), [expected])


def test_an_older_record_counts():
  correct, lengths = np.ones((1, 3)), np.array([[60, 65, 66]])
  np.testing.assert_array_equal(
      exp_think.reward(correct, lengths, np.array([50])), [[1, 1, 0]])


def test_the_cut_is_the_whole_number_of_the_code():
  records = np.arange(1, 16000)
  for slack in (0.1, 0.3):
    exact = records * round(10 + 10 * slack) // 10
    lengths = np.stack([records, exact, exact + 1], axis=1)
    found = exp_think.reward(np.ones_like(lengths), lengths, slack=slack)
    np.testing.assert_array_equal(found[:, 1], np.ones(len(records)))
    np.testing.assert_array_equal(found[:, 2], np.zeros(len(records)))


def test_the_record_over_visits(outcomes):
  method = exp_think.make()
  step, state = jax.jit(method.apply), method.init(3)
  rewards, state = step(outcomes([[1, 1]], [[200, 100]], [2]), state)
  np.testing.assert_array_equal(rewards.total, [[0, 1]])
  assert int(state[2]) == 100
  rewards, state = step(outcomes([[1, 1]], [[120, 140]], [2]), state)
  np.testing.assert_array_equal(rewards.total, [[1, 0]])
  assert int(state[2]) == 100
  _, state = step(outcomes([[0, 0]], [[1, 2]], [1]), state)
  np.testing.assert_array_equal(np.asarray(state) < 2**30,
                                [False, False, True])


def test_a_problem_twice_in_a_step_shares_its_record(outcomes):
  method = exp_think.make()
  rewards, state = method.apply(
      outcomes([[1, 1], [1, 0]], [[200, 131], [100, 5]], [1, 1]),
      method.init(2))
  np.testing.assert_array_equal(rewards.total, [[0, 0], [1, 0]])
  assert int(state[1]) == 100
