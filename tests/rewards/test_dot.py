# SPDX-License-Identifier: Apache-2.0
"""DOT by hand: what is cut, and where."""

import numpy as np
import pytest

from lapo_jax.rewards import dot


def kept(correct, lengths, **settings):
  return np.asarray(dot.kept_lengths(np.array([correct]), np.array([lengths]),
                                     **settings))[0].tolist()


def test_an_outlier_of_a_solved_group_is_cut():
  # Mean 145, sample sd √(9·45² + 405²)/3 = 142.30: T = int(287.30) = 287.
  lengths = 9 * [100] + [550]
  assert kept([1] * 10, lengths, alpha=1.0) == 9 * [100] + [287]
  # One wrong answer, and nothing is.
  assert kept([0] + [1] * 9, lengths, alpha=1.0) == lengths
  assert kept([0] * 10, lengths, alpha=1.0) == lengths
  # 3 sd are more than any of ten can be away.
  assert kept([1] * 10, lengths) == lengths


def test_the_slack():
  # Mean 110, sd √(3·10² + 30²)/√3 = 20: T = 130; the last is 10 beyond.
  lengths = [100, 100, 100, 140]
  assert kept([1] * 4, lengths, alpha=1.0) == lengths
  assert kept([1] * 4, lengths, alpha=1.0, slack=11) == lengths
  assert kept([1] * 4, lengths, alpha=1.0, slack=10) == [100, 100, 100, 130]


def test_equal_lengths_stay():
  assert kept([1] * 4, [70] * 4, alpha=0.0, slack=1) == [70] * 4


def test_a_group_in_which_nothing_can_be_cut_is_refused(outcomes):
  record = outcomes([[1] * 10], [[5] * 10])
  with pytest.raises(ValueError, match='group of 10 .* 2.85 sd .* alpha is 3'):
    dot.make().trim(record)
  assert dot.make(alpha=2.0).trim(record).tolist() == [[5] * 10]
  rewards, _ = dot.make().apply(record, ())
  assert rewards.total.tolist() == [[1.0] * 10]


def test_settings_are_checked():
  with pytest.raises(ValueError, match='slack is 0'):
    dot.make(slack=0)
