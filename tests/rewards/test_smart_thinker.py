# SPDX-License-Identifier: Apache-2.0
"""SmartThinker by hand: the best length and the penalty's strength."""

import numpy as np
import pytest

from lapo_jax.rewards import smart_thinker


@pytest.mark.parametrize('correct,lengths,best,expected', [
    # All: 250, 12500. Correct: 150, 2500. (2500·250 − 12500·150)/−10000 = 125.
    # Penalties 0, 75, 0, 0, mean 18.75; Λ = ½/56.25, so 1 − 75/112.5.
    pytest.param([1, 1, 0, 0], [100, 200, 300, 400], 125, [1, 1 / 3, 0, 0],
                 id='mixed'),
    # Correct: 250, 22500, more than all: the shortest. Λ = ½/(300 − 75).
    pytest.param([1, 0, 0, 1], [100, 200, 300, 400], 100, [1, 0, 0, 1 / 3],
                 id='wider'),
    # Both 200, 10000: the shortest. Penalties 0, 200, mean 50; Λ = ½/150.
    pytest.param([1, 0, 1, 0], [100, 100, 300, 300], 100, [1, 0, 1 / 3, 0],
                 id='alike'),
    # (2500·850 − 352500·350)/(2500 − 352500) is 121250/350.
    pytest.param([1, 1, 0, 0], [300, 400, 900, 1800], 346.42857,
                 [1, 1 / 3, 0, 0], id='between'),
    pytest.param([1, 1, 1], [100, 200, 900], 100, [1, 1, 1], id='all'),
    pytest.param([0, 0, 0], [100, 200, 4096], 4096, [0, 0, 0], id='none'),
    # One has no variance: its own length is best.
    pytest.param([0, 1, 0], [100, 200, 4096], 200, [0, 1, 0], id='one'),
    pytest.param([1, 0, 1], [300, 300, 300], 300, [1, 0, 1], id='equal'),
])
def test_by_hand(correct, lengths, best, expected):
  correct, lengths = np.array([correct]), np.array([lengths])
  np.testing.assert_allclose(
      smart_thinker.optimal_lengths(correct, lengths), [best], rtol=1e-4)
  np.testing.assert_allclose(smart_thinker.reward(correct, lengths),
                             [expected], rtol=1e-4, atol=1e-6)


def test_the_most_penalised_lands_on_the_mean():
  correct = np.array([[1, 1, 1, 0, 0]])
  found = np.asarray(smart_thinker.reward(
      correct, np.array([[100, 700, 400, 1000, 200]])))[0]
  assert found[1] == found[:3].min()
  assert found[1] == pytest.approx(found.mean(), abs=1e-4)


def test_penalties_of_a_token_among_lengths_in_ten_thousands():
  # Above 30000: all 17/4, 139/16, correct 8/3, 14/9: l* is 2384/1027.
  # Penalties 0, 697, 1724, 0 by 1027; Λ = 1027/4475.
  correct = np.array([[1, 1, 1, 0]])
  lengths = np.array([[30001, 30003, 30004, 30009]])
  np.testing.assert_allclose(
      smart_thinker.reward(correct, lengths),
      [[1, 1 - 697 / 4475, 1 - 1724 / 4475, 0]], rtol=1e-5)


def test_terms(outcomes):
  rewards, _ = smart_thinker.make().apply(
      outcomes([[1, 1, 0, 0]], [[100, 200, 300, 400]]), ())
  np.testing.assert_array_equal(rewards.terms['correct'], [[1, 1, 0, 0]])
  np.testing.assert_allclose(rewards.terms['length'], [[0, -2 / 3, 0, 0]],
                             rtol=1e-4)
