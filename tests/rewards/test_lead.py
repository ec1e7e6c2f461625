# SPDX-License-Identifier: Apache-2.0
"""LEAD by hand: the length reward, PSI, and the weights that follow."""

import jax
import numpy as np
import pytest

from lapo_jax.advantages import from_rewards
from lapo_jax.rewards import lead


@pytest.mark.parametrize('correct,lengths,expected', [
    # L* = 2000; 9000 is −2.5, cut at −1.
    pytest.param([1, 1, 0, 0], [1000, 3000, 2000, 9000], [0.5, 0.5, 1, -1],
                 id='mixed'),
    pytest.param([1, 1], [1000, 2000], [2 / 3, 2 / 3], id='all'),
    # L* is the cap of 8000.
    pytest.param([0, 0], [2000, 8000], [0.25, 1], id='none, one truncated'),
    # L* is not below 1000.
    pytest.param([0, 1], [1000, 200], [1, 0.2], id='one, short'),
    pytest.param([1, 0], [4000, 4000], [1, 1], id='equal'),
])
def test_length_score_by_hand(correct, lengths, expected):
  correct, lengths = np.array([correct]), np.array([lengths])
  found = lead.length_score(correct, lengths)
  np.testing.assert_allclose(found, [expected], rtol=1e-6)
  np.testing.assert_allclose(
      lead.reward(correct, lengths, correct_weight=0.25),
      0.25 * correct + 0.75 * found, rtol=1e-6)


@pytest.mark.parametrize('statistic,expected', [
    # Correct 1500, 2000, 4000; with the wrong 500: L* = 2500, 2000, 1500, 2000.
    ('mean', [0.6, 0.8, 0.4, 0.2]),
    ('median', [0.75, 1, 0, 0.25]),
    ('min', [1, 2 / 3, -2 / 3, 1 / 3]),
    ('all', [0.75, 1, 0, 0.25]),
])
def test_statistics(statistic, expected):
  found = lead.length_score(np.array([[1, 1, 1, 0]]),
                            np.array([[1500, 2000, 4000, 500]]),
                            statistic=statistic)
  np.testing.assert_allclose(found, [expected], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('shape,expected', [
    # Correct 400, 1600, 4000: L* = 2000, x = 0.8, 0.2, −1; wrong 1000, 3000,
    # 9000: x = 0.5, −0.5, −3.5.
    ('over', [0, 0, -1, 0, -0.5, -1]),
    # 400 is suspiciously short.
    ('asymmetric', [0, 0.2, 0, 0, -0.5, -1]),
])
def test_shapes(shape, expected):
  found = lead.length_score(np.array([[1, 1, 1, 0, 0, 0]]),
                            np.array([[400, 1600, 4000, 1000, 3000, 9000]]),
                            shape=shape)
  np.testing.assert_allclose(found, [expected], rtol=1e-5, atol=1e-6)


def test_instability_by_hand():
  everyone = np.ones((2, 2), bool)
  # Means ½ and 1, variances ¼ and 0: μ = ¾, σ² = 0.125 + 0.0625 + 1e-8,
  # CV = 0.4330127/0.75, Φ = ¼.
  values = np.array([[1.0, 0], [1, 1]], np.float32)
  found = lead.instability(values, everyone, low=0.0, high=1.0)
  assert float(found) == pytest.approx(0.14433757, rel=1e-5)
  squared = lead.instability(values, everyone, low=0.0, high=1.0, power=2.0)
  assert float(squared) == pytest.approx(0.14433757 / 4, rel=1e-5)


def test_instability_counts_what_the_mask_says():
  values = np.array([[0.5, 9], [7, 7]], np.float32)
  mask = np.array([[True, False], [False, False]])
  # One number: σ = √1e-8, CV = 2e-4, Φ = 1 − 1.5/2.
  found = lead.instability(values, mask, low=-1.0, high=1.0)
  assert float(found) == pytest.approx(5e-5, rel=1e-4)
  nothing = lead.instability(values, mask & False, low=-1.0, high=1.0)
  assert float(nothing) == 0.0


def test_weights_follow_by_hand(outcomes):
  method = lead.make()
  record = outcomes([[1, 0], [1, 1]], [[2000, 9000], [2000, 2000]])
  rewards, state = jax.jit(method.apply)(record, method.init(5))
  np.testing.assert_allclose(rewards.terms['length'], [[1, -1], [1, 1]])
  # PSI of correctness is 0.1443; the correct lengths are all L*: Φ is 0.
  assert float(state['correct']) == pytest.approx(0.475 + 0.05, rel=1e-5)
  assert float(state['length']) == pytest.approx(0.475, rel=1e-5)
  # What is used is the moved state, and sums to 1.
  assert float(rewards.weights['correct']) == pytest.approx(0.525, rel=1e-5)
  assert float(rewards.weights['length']) == pytest.approx(0.475, rel=1e-5)


def test_saturation_shrinks_the_state_but_not_the_used_weights(outcomes):
  method = lead.make()
  record = outcomes([[1, 1]], [[2000, 2000]])
  step, state = jax.jit(method.apply), method.init(5)
  for _ in range(20):
    rewards, state = step(record, state)
  # ½ · 0.95²⁰ is 0.179, below the floor.
  np.testing.assert_allclose([state['correct'], state['length']],
                             [0.5 * 0.95**20] * 2, rtol=1e-5)
  np.testing.assert_allclose(
      [rewards.weights['correct'], rewards.weights['length']], [0.3, 0.7],
      rtol=1e-6)


@pytest.mark.parametrize('correct', [[[1, 1]], [[0, 0]], [[1, 0]]])
def test_used_weights_sum_to_one(correct, outcomes):
  method = lead.make()
  rewards, _ = method.apply(outcomes(correct, [[1500, 4000]]), method.init(5))
  total = rewards.weights['correct'] + rewards.weights['length']
  assert float(total) == pytest.approx(1.0, abs=1e-6)
  assert float(rewards.weights['correct']) >= 0.3


def test_the_recipe_of_the_advantage(outcomes):
  method = lead.make()
  record = outcomes([[1, 1, 0, 0]], [[1000, 3000, 2000, 9000]])
  rewards, _ = method.apply(record, method.init(5))
  # r_c: ±½ by sd 0.57735; r_l = ½, ½, 1, −1 by mean ¼ and sd 0.8660.
  wc, wl = (float(rewards.weights[name]) for name in ('correct', 'length'))
  expected = (wc * np.array([1, 1, -1, -1]) * 0.8660254 +
              wl * np.array([0.25, 0.25, 0.75, -1.25]) / 0.8660254)
  found = from_rewards(rewards, record.lengths, decoupled=True, eps=1e-6)
  np.testing.assert_allclose(found, [expected], rtol=1e-4)


def test_settings_are_checked():
  with pytest.raises(ValueError, match="'max_sym'.*'symmetric'"):
    lead.make(shape='max_sym')
  with pytest.raises(ValueError, match="'mode'.*'median'"):
    lead.make(statistic='mode')
  with pytest.raises(ValueError, match='low 1000 and cap 256'):
    lead.make(cap=256)
