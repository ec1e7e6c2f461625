# SPDX-License-Identifier: Apache-2.0
"""Arora and Zanette by hand: population statistics of the correct."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lapo_jax.rewards import efficient_reasoning

# Of 100, 200, 300: mean 200, sd √(20000/3) = 81.65, z = ∓1.2247,
# sigmoid(−1.2247) = 1/(1 + 3.4033) = 0.2271.
SHORT, LONG = 1 - 0.1 * 0.2271024, 1 - 0.1 * 0.7728976


@pytest.mark.parametrize('correct,lengths,expected', [
    pytest.param([1, 0, 1, 1], [100, 50, 300, 200], [SHORT, 0, LONG, 0.95],
                 id='mixed'),
    pytest.param([1, 1, 1], [100, 300, 200], [SHORT, LONG, 0.95], id='all'),
    pytest.param([0, 0], [100, 300], [0, 0], id='none'),
    pytest.param([0, 1, 0], [100, 300, 4096], [0, 0.95, 0], id='one'),
    pytest.param([1, 1, 1], [333, 333, 333], [0.95] * 3, id='equal'),
    # A grade of ½ is no member and stays itself.
    pytest.param([1, 0.5], [333, 999], [0.95, 0.5], id='graded'),
])
def test_by_hand(correct, lengths, expected):
  correct, lengths = np.array([correct], np.float32), np.array([lengths])
  np.testing.assert_allclose(efficient_reasoning.reward(correct, lengths),
                             [expected], rtol=1e-6)


@pytest.mark.parametrize('length', [3, 17, 333])
def test_equal_lengths_where_the_compiler_knows_who_is_right(length):
  # Division by a constant count becomes a product, whose mean is off a bit.
  found = jax.jit(lambda lengths: efficient_reasoning.reward(
      jnp.ones((1, 7)), lengths))(jnp.full((1, 7), length))
  np.testing.assert_allclose(found, 0.95, rtol=1e-6)


def test_a_truncated_completion_earns_and_counts_nothing(outcomes):
  correct, lengths = [[1, 1, 1, 1]], [[100, 300, 200, 4096]]
  cut = np.array([[False, False, False, True]])
  expected = [[SHORT, LONG, 0.95, 0]]
  np.testing.assert_allclose(
      efficient_reasoning.reward(np.array(correct), np.array(lengths), cut),
      expected, rtol=1e-6)
  rewards, _ = efficient_reasoning.make().apply(
      outcomes(correct, lengths, truncated=cut), ())
  np.testing.assert_allclose(rewards.total, expected, rtol=1e-6)


def test_alpha_and_eps_act():
  correct, lengths = np.ones((1, 2)), np.array([[100, 300]])
  # sd 100: z = ∓1 alone, ∓½ with ε = 100; sigmoid(−½) = 0.3775.
  np.testing.assert_allclose(
      efficient_reasoning.reward(correct, lengths, alpha=1.0, eps=100.0),
      [[1 - 0.3775407, 1 - 0.6224593]], rtol=1e-6)
