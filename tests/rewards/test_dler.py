# SPDX-License-Identifier: Apache-2.0
"""DLER and DA-DLER by hand."""

import numpy as np
import pytest

from lapo_jax.advantages import from_rewards
from lapo_jax.rewards import dler


@pytest.mark.parametrize('correct,lengths,expected', [
    pytest.param([1, 1, 0, 0], [4000, 4001, 10, 4000], [1, 0, 0, 0],
                 id='mixed'),
    pytest.param([1, 1], [10, 20], [1, 1], id='all'),
    pytest.param([0, 0], [10, 20], [0, 0], id='none'),
    pytest.param([0, 1], [7, 7], [0, 1], id='one, equal'),
])
def test_by_hand(correct, lengths, expected):
  found = dler.reward(np.array([correct]), np.array([lengths]))
  np.testing.assert_array_equal(found, [expected])


def test_an_answer_beyond_the_limit():
  correct, lengths = np.array([[1, 1, 0, 0]]), np.array([[10, 4001, 9, 4000]])
  truncated = np.array([[False, False, False, True]])
  answered = np.array([[1, 1, 1, 1]])
  # Too long and cut: 0.1 each. Wrong in time: 0.
  np.testing.assert_allclose(
      dler.reward(correct, lengths, truncated, answered, overlong=0.1),
      [[1, 0.1, 0, 0.1]])
  np.testing.assert_allclose(
      dler.reward(correct, lengths, truncated, answered & False, overlong=0.1),
      [[1, 0, 0, 0]])
  np.testing.assert_allclose(
      dler.reward(correct, lengths, truncated, answered), [[1, 0, 0, 0]])


def test_easy_groups_have_the_lower_limit():
  correct = np.array([[1, 1, 1, 0], [1, 1, 0, 0]])
  lengths = np.array([[2000, 2001, 3000, 9]] * 2)
  # Three of four are over half; two are not.
  np.testing.assert_array_equal(
      dler.reward(correct, lengths, difficulty_aware=True),
      [[1, 0, 0, 0], [1, 1, 0, 0]])


def test_the_batch_scale(outcomes):
  record = outcomes([[1, 0], [1, 1]], [[10, 10], [10, 5000]],
                    boxed=np.ones((2, 2)))
  rewards, _ = dler.make().apply(record, ())
  np.testing.assert_array_equal(rewards.total, [[1, 0], [1, 0]])
  # The group's mean ½, the batch's sd √(4·¼/3).
  np.testing.assert_allclose(
      from_rewards(rewards, record.lengths, scale='batch', eps=0.0),
      [[0.866025, -0.866025]] * 2, rtol=1e-5)


def test_make_reads_whether_there_is_an_answer(outcomes):
  method = dler.make(cap=100, overlong=0.1)
  assert method.read('\\boxed{2}', None) == {'boxed': 1.0}
  assert method.read('2', None) == {'boxed': 0.0}
  rewards, _ = method.apply(
      outcomes([[0, 0]], [[100, 100]], truncated=np.ones((1, 2), bool),
               boxed=[[1, 0]]), ())
  np.testing.assert_allclose(rewards.total, [[0.1, 0]])
