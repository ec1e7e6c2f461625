# SPDX-License-Identifier: Apache-2.0
"""HBPO by hand: rewards under budgets, both summands of the advantage."""

import numpy as np
import pytest

from lapo_jax.advantages import from_rewards
from lapo_jax.rewards import hbpo

# 4·cos(πb/8192).
F1024, F2048, F3072 = 3.6955181, 2.8284271, 1.5307337


@pytest.mark.parametrize('correct,lengths,expected', [
    # Within the budget of 2048: f₂. Beyond: f of 3072 − 1024/4096.
    pytest.param([1, 1, 1, 0], [1024, 2048, 3072, 9],
                 [F2048, F2048, F3072 - 0.25, 0], id='mixed'),
    # At the cap: 0 − ½, below a wrong one.
    pytest.param([1, 0], [4096, 4096], [-0.5, 0], id='one, equal'),
    pytest.param([0, 0], [9, 4096], [0, 0], id='none, truncated'),
    pytest.param([1, 1], [5, 9], [F2048, F2048], id='all'),
])
def test_reward_by_hand(correct, lengths, expected):
  lengths = np.array([lengths])
  found = hbpo.reward(np.array([correct]), lengths,
                      np.full(lengths.shape, 2048))
  np.testing.assert_allclose(found, [expected], rtol=1e-5, atol=1e-5)


def test_advantages_by_hand():
  rewards = np.array([[2, 4, 0, 2]], np.float32)
  budgets = np.array([[2048, 2048, 1024, 1024]])
  between, budget = hbpo.advantages(rewards, budgets)
  # Mean 2, sd √(8/3); the budgets' own means are 3 and 1.
  np.testing.assert_allclose(between, [[0, 1.224745, -1.224745, 0]], rtol=1e-5)
  np.testing.assert_allclose(
      budget, [[3 - F2048, 3 - F2048, 1 - F1024, 1 - F1024]], rtol=1e-5)


def test_a_group_without_reward_is_pushed_down(outcomes):
  record = outcomes([[0, 0], [1, 1]], [[9, 99], [9, 99]],
                    targets=[1024, 2048])
  rewards, _ = hbpo.make().apply(record, ())
  found = from_rewards(rewards, record.lengths, baseline='none', scale='none')
  # All correct within the budget is what f₂ expects: nothing to learn.
  np.testing.assert_allclose(found, [[-F1024, -F1024], [0, 0]], atol=1e-5)


def test_the_thinking_opens_with_the_budget(told):
  method = hbpo.make(budgets=(7,))
  example = told(method, prefill=' So.')
  assert example.prefill == ' So. I will answer the question within 7 tokens.'
  assert (example.target_length, example.question) == (7, 'Add.')
  drawn = {told(hbpo.make(), seed=seed).target_length for seed in range(40)}
  assert drawn == {512, 1024, 2048, 2560}


def test_settings_are_checked():
  with pytest.raises(ValueError, match=r'budgets are \(\)'):
    hbpo.make(budgets=())
