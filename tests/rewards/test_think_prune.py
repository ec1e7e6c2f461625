# SPDX-License-Identifier: Apache-2.0
"""ThinkPrune: a limit, in the reward and in the prompt."""

import numpy as np

from lapo_jax.rewards import think_prune


def test_by_hand():
  correct = np.array([[1, 1, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1]])
  lengths = np.array([[4000, 4001, 10, 5], [1, 2, 3, 4000], [9, 9, 9, 9]])
  np.testing.assert_array_equal(
      think_prune.reward(correct, lengths),
      [[1, 0, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1]])
  np.testing.assert_array_equal(
      think_prune.reward(correct, lengths, cap=5)[0], [0, 0, 0, 1])


def test_the_prompt_states_the_limit(told):
  example = told(think_prune.make(cap=3000))
  assert example.question == ('Add. The output of the assistant should be '
                              'within 3000 tokens.')
  assert example.target_length == 3000


def test_make_has_the_limit(outcomes):
  rewards, _ = think_prune.make(cap=10).apply(
      outcomes([[1, 1]], [[10, 11]]), ())
  np.testing.assert_array_equal(rewards.total, [[1, 0]])
