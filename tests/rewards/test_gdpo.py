# SPDX-License-Identifier: Apache-2.0
"""GDPO by hand: two terms, apart and together."""

import numpy as np
import pytest

from lapo_jax.advantages import from_rewards
from lapo_jax.rewards import gdpo

CORRECT = [[1, 1, 0, 0]]
LENGTHS = [[4000, 4001, 100, 9000]]


@pytest.mark.parametrize('conditioned,expected', [
    (True, [1, 0, 0, 0]), (False, [1, 0, 1, 0])])
def test_the_length_reward(conditioned, expected):
  correct, lengths = np.array(CORRECT), np.array(LENGTHS)
  np.testing.assert_array_equal(
      gdpo.length_score(correct, lengths, conditioned=conditioned), [expected])
  np.testing.assert_allclose(
      gdpo.reward(correct, lengths, conditioned=conditioned, length_weight=0.5),
      correct + 0.5 * np.array([expected]))


@pytest.mark.parametrize('correct,expected', [
    pytest.param([1, 1], [2, 1], id='all'),
    pytest.param([0, 0], [0, 0], id='none'),
    pytest.param([0.75, 0.75], [0.75, 0.75], id='below the threshold'),
])
def test_whole_groups(correct, expected):
  found = gdpo.reward(np.array([correct], np.float32), np.array([[5, 9000]]))
  np.testing.assert_allclose(found, [expected])


def test_the_threshold_acts():
  found = gdpo.length_score(np.array([[0.75, 0.5]]), np.array([[5, 5]]),
                            threshold=0.7)
  np.testing.assert_array_equal(found, [[1, 0]])


def test_decoupled_tells_apart_what_a_sum_confuses(outcomes):
  record = outcomes(CORRECT, LENGTHS)
  rewards, _ = gdpo.make(conditioned=False).apply(record, ())
  # (1, 1), (1, 0), (0, 1), (0, 0): the two in the middle have one sum.
  np.testing.assert_array_equal(rewards.total, [[2, 1, 1, 0]])
  rewards, _ = gdpo.make().apply(record, ())
  # Correctness ±½ by sd 0.5774; length ¾ and −¼ by sd ½.
  expected = [0.866025 + 1.5, 0.866025 - 0.5, -0.866025 - 0.5, -0.866025 - 0.5]
  found = from_rewards(rewards, record.lengths, decoupled=True, eps=0.0)
  np.testing.assert_allclose(found, [expected], rtol=1e-5)


def test_weights_are_the_methods(outcomes):
  rewards, _ = gdpo.make(correct_weight=2.0, length_weight=0.5).apply(
      outcomes(CORRECT, LENGTHS), ())
  np.testing.assert_allclose(rewards.total, [[2.5, 2, 0, 0]])
