# SPDX-License-Identifier: Apache-2.0
"""QLPO by hand: who is kept of which half."""

import numpy as np
import pytest

from lapo_jax.advantages import from_rewards
from lapo_jax.rewards import qlpo


def kept(correct, lengths, **settings):
  return np.asarray(qlpo.kept(np.array([correct]), np.array([lengths]),
                              **settings))[0].astype(int).tolist()


def test_short_right_and_long_wrong_by_hand():
  correct = [1] * 8 + [0] * 8
  lengths = [*range(10, 90, 10), *range(10, 90, 10)]
  # M = 8: N₊ = N₋ = 4, ⌈4/(4/3)⌉ = 3 of the preferred half, 1 of the other.
  found = kept(correct, lengths)
  assert sum(found[:4]) == 3 and sum(found[4:8]) == 1
  assert sum(found[8:12]) == 1 and sum(found[12:]) == 3


def test_a_of_one_takes_as_many_of_both_halves():
  found = kept([1] * 8 + [0] * 8, [*range(16)], a=1.0)
  assert [sum(found[i:i + 4]) for i in range(0, 16, 4)] == [2, 2, 2, 2]


@pytest.mark.parametrize('correct, expected', [
    # All of one class: ⌈4/(4/3)⌉ = 3 of four, 1 of the other four.
    ([1] * 8, [1, 1, 1, 0, 1, 0, 0, 0]),
    ([0] * 8, [0, 0, 0, 1, 0, 1, 1, 1]),
    # One right of eight: N₊ = round(½) = 1; N₋ = 3, all of the longer half.
    ([1] + 7 * [0], [1, 0, 0, 0, 0, 1, 1, 1]),
])
def test_degenerate_groups(correct, expected):
  assert kept(correct, [*range(8)], m=4) == expected


@pytest.mark.parametrize('seed', range(4))
def test_m_are_kept_whatever_the_group(seed):
  rng = np.random.default_rng(seed)
  correct = rng.random((64, 16)) < rng.random((64, 1))
  lengths = rng.integers(1, 500, (64, 16))
  for m, a in (8, 1 / 3), (8, 1.0), (5, 0.0), (16, 0.5), (2, 0.2):
    found = np.asarray(qlpo.kept(correct, lengths, m=m, a=a))
    assert np.all(found.sum(-1) == m)
    share = np.floor(m * correct.sum(-1) / 16 + 0.5)
    np.testing.assert_array_equal((found & correct).sum(-1), share)


def test_the_kept_alone_are_compared(outcomes):
  record = outcomes([[1, 1, 0, 0]], [[1, 2, 3, 4]])
  rewards, _ = qlpo.make(m=2).apply(record, ())
  # One of each: the shorter right and the longer wrong one, sd √½.
  np.testing.assert_allclose(
      from_rewards(rewards, record.lengths, eps=0.0),
      [[0.707107, 0, 0, -0.707107]], rtol=1e-5)


def test_settings_are_checked(outcomes):
  with pytest.raises(ValueError, match='m is 1'):
    qlpo.make(m=1)
  with pytest.raises(ValueError, match='m is 8 of a group of 2'):
    qlpo.make().apply(outcomes([[1, 0]], [[1, 2]]), ())
