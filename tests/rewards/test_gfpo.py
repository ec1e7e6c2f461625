# SPDX-License-Identifier: Apache-2.0
"""GFPO by hand: who is kept, and what advantages that gives."""

import numpy as np
import pytest

from lapo_jax.advantages import from_rewards
from lapo_jax.rewards import gfpo


@pytest.mark.parametrize('metric,k,expected', [
    ('length', 2, [0, 1, 0, 1]),
    ('length', 3, [1, 1, 0, 1]),
    # c/l = 1/5, 0, 1/9, 0: the right ones, then the shorter wrong one.
    ('efficiency', 1, [1, 0, 0, 0]),
    ('efficiency', 2, [1, 0, 1, 0]),
    ('efficiency', 3, [1, 1, 1, 0]),
    ('efficiency', 4, [1, 1, 1, 1]),
])
def test_kept_by_hand(metric, k, expected):
  correct, lengths = np.array([[1, 0, 1, 0]]), np.array([[5, 1, 9, 3]])
  found = gfpo.kept(correct, lengths, k=k, metric=metric)
  np.testing.assert_array_equal(found, np.array([expected], bool))
  np.testing.assert_array_equal(gfpo.reward(correct, lengths), correct)


@pytest.mark.parametrize('correct', [[1, 1, 1], [0, 0, 0]])
@pytest.mark.parametrize('metric', gfpo.METRICS)
def test_all_and_none_keep_the_shortest(correct, metric):
  found = gfpo.kept(np.array([correct]), np.array([[9, 4096, 7]]), k=2,
                    metric=metric)
  np.testing.assert_array_equal(found, [[True, False, True]])


def test_equal_lengths_keep_k():
  found = gfpo.kept(np.array([[1, 0, 1]]), np.array([[7, 7, 7]]), k=2)
  np.testing.assert_array_equal(found, [[True, True, False]])


def test_advantages_compare_the_kept_only(outcomes):
  record = outcomes([[1, 0, 1, 1], [1, 0, 1, 0]],
                    [[5, 6, 7, 99], [5, 60, 7, 90]])
  rewards, _ = gfpo.make(k=3).apply(record, ())
  advantages = from_rewards(rewards, record.lengths, eps=0.0)
  # 1, 0, 1 have mean 2/3 and sd √(1/3): 0.5774, −1.1547, 0.5774.
  np.testing.assert_allclose(
      advantages, [[0.57735, -1.154701, 0.57735, 0],
                   [0.57735, -1.154701, 0.57735, 0]], rtol=1e-5)
  rewards, _ = gfpo.make(k=2).apply(record, ())
  # The kept of the second group are equal: no advantage at all.
  np.testing.assert_array_equal(
      from_rewards(rewards, record.lengths)[1], np.zeros(4))


def test_settings_are_checked(outcomes):
  with pytest.raises(ValueError, match="'tokens'.*'length'"):
    gfpo.make(metric='tokens')
  with pytest.raises(ValueError, match='k is 1'):
    gfpo.make(k=1)
  with pytest.raises(ValueError, match='k is 8 of a group of 2'):
    gfpo.make().apply(outcomes([[1, 0]], [[1, 2]]), ())
