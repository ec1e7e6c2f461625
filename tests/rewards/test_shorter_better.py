# SPDX-License-Identifier: Apache-2.0
"""ShorterBetter by hand."""

import numpy as np
import pytest

from lapo_jax.rewards import shorter_better


@pytest.mark.parametrize('correct,lengths,sol,expected', [
    # SOL is 300: the wrong one of 100 tokens is 200 off, the cut one 3796.
    pytest.param([0, 1, 1, 0], [100, 300, 500, 4096], 300,
                 [-0.2, 2, 1.8, -3.796], id='mixed'),
    pytest.param([1, 1, 1], [700, 200, 300], 200, [1.5, 2, 1.9], id='all'),
    # SOL is the mean, (100 + 200 + 600)/3.
    pytest.param([0, 0, 0], [100, 200, 600], 300, [-0.2, -0.1, -0.3],
                 id='none'),
    pytest.param([0, 1], [90, 4000], 4000, [-3.91, 2], id='one'),
    pytest.param([1, 0, 1], [300, 300, 300], 300, [2, 0, 2], id='equal'),
    # Above ½ counts as correct and earns 2 · 0.75; at ½ it does not count.
    pytest.param([0.75, 0.5], [80, 60], 80, [1.5, 0.98], id='graded'),
])
def test_by_hand(correct, lengths, sol, expected):
  correct, lengths = np.array([correct], np.float32), np.array([lengths])
  np.testing.assert_allclose(
      shorter_better.optimal_lengths(correct, lengths), [sol])
  np.testing.assert_allclose(shorter_better.reward(correct, lengths),
                             [expected], rtol=1e-5)


def test_settings_act(outcomes):
  record = outcomes([[1, 0]], [[100, 150]])
  rewards, _ = shorter_better.make(alpha=1.0, beta=0.01).apply(record, ())
  np.testing.assert_allclose(rewards.terms['correct'], [[1, 0]])
  np.testing.assert_allclose(rewards.terms['length'], [[0, -0.5]], rtol=1e-6)
