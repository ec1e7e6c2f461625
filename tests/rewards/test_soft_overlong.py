# SPDX-License-Identifier: Apache-2.0
"""DAPO's soft overlong punishment by hand."""

import numpy as np
import pytest

from lapo_jax.rewards import soft_overlong


def test_the_ramp_by_hand():
  lengths = np.array([[1, 16384, 17408, 18432, 20480, 30000]])
  expected = np.array([[0, 0, -0.25, -0.5, -1, -1]])
  np.testing.assert_allclose(soft_overlong.punishment(lengths), expected)
  for correct in (np.ones((1, 6)), np.zeros((1, 6)), np.arange(6)[None] == 2):
    np.testing.assert_allclose(soft_overlong.reward(correct, lengths),
                               correct + expected)


def test_trl_example():
  found = soft_overlong.punishment(np.array([[90]]), cap=100, buffer=20)
  np.testing.assert_allclose(found, [[-0.5]])


def test_the_buffer_follows_the_cap(outcomes):
  method = soft_overlong.make(cap=100, weight=0.5)
  rewards, _ = method.apply(outcomes([[1, 1, 0]], [[80, 90, 100]]), ())
  np.testing.assert_allclose(rewards.total, [[1, 0.75, -0.5]], rtol=1e-6)


@pytest.mark.parametrize('share', [0.0, 1.5])
def test_settings_are_checked(share):
  with pytest.raises(ValueError, match=f'buffer_share is {share}'):
    soft_overlong.make(buffer_share=share)
