# SPDX-License-Identifier: Apache-2.0
"""The control rewards the grade and nothing else."""

import jax.numpy as jnp
import numpy as np
import pytest

from lapo_jax.rewards import accuracy


@pytest.mark.parametrize('dtype', [np.float32, np.int32, bool])
def test_the_grade_in_any_dtype(dtype):
  correct = np.array([[1, 0, 1], [0, 0, 0]], dtype)
  lengths = np.array([[5, 4096, 9], [1, 2, 3]], np.int32)
  reward = accuracy.reward(correct, lengths)
  assert reward.dtype == jnp.float32
  np.testing.assert_array_equal(reward, [[1, 0, 1], [0, 0, 0]])
  np.testing.assert_array_equal(accuracy.reward(correct, lengths[:, ::-1]),
                                reward)
