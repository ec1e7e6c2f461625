# SPDX-License-Identifier: Apache-2.0
"""Leash by hand: the penalty and its multiplier."""

import jax
import numpy as np
import pytest

from lapo_jax.rewards import leash


@pytest.mark.parametrize('correct,lengths,expected', [
    # L = 100, λ = 0.2: excess 0, 1, 5, 12; the last is cut at −1.
    pytest.param([1, 1, 0, 0], [100, 200, 600, 1300], [1, 0.8, -1, -1],
                 id='mixed'),
    pytest.param([1, 1], [10, 350], [1, 0.5], id='all'),
    pytest.param([0, 0], [10, 350], [0, -0.5], id='none'),
    pytest.param([0, 1], [200, 200], [-0.2, 0.8], id='one, equal'),
])
def test_by_hand(correct, lengths, expected):
  found = leash.reward(np.array([correct]), np.array([lengths]), 0.2,
                       target=100)
  np.testing.assert_allclose(found, [expected], rtol=1e-6, atol=1e-6)


def test_the_multiplier_by_hand():
  lengths = np.array([[100, 200], [600, 1300]])
  # Mean of 0, 1, 5, 12 is 4.5: + 0.225.
  found = leash.next_strength(0.2, lengths, target=100)
  assert float(found) == pytest.approx(0.425)
  assert float(leash.next_strength(0.9, lengths, target=100)) == 1.0
  # Mean −0.45 at 550 of 1000: − 0.0225, and never below 0.
  found = leash.next_strength(0.2, lengths, target=1000)
  assert float(found) == pytest.approx(0.1775)
  assert float(leash.next_strength(0.01, lengths, target=1000)) == 0.0


def test_it_moves_after_the_rewards(outcomes):
  method = leash.make(target=100)
  step, state = jax.jit(method.apply), method.init(5)
  record = outcomes([[1, 1]], [[200, 300]])
  rewards, state = step(record, state)
  np.testing.assert_allclose(rewards.total, [[0.8, 0.6]], rtol=1e-6)
  # Mean 1.5 · 0.05.
  assert float(state) == pytest.approx(0.275)
  rewards, _ = step(record, state)
  np.testing.assert_allclose(rewards.terms['length'], [[-0.275, -0.55]],
                             rtol=1e-5)


def test_settings_are_checked():
  with pytest.raises(ValueError, match='start 2.0, most 1.0'):
    leash.make(start=2.0)
