# SPDX-License-Identifier: Apache-2.0
"""O1-Pruner's weights by hand and beside the released code's lines."""

import jax
import jaxtyping
import numpy as np
import pytest

from lapo_jax.offline import o1_pruner


def by_the_code(correct, lengths, keep, accuracy):
  """The released construct_dataset.py, a completion at a time."""
  weights = {}
  for p in range(len(correct)):
    mean_length, mean_correct = lengths[p].mean(), correct[p].mean()
    for g in np.flatnonzero(keep[p]):
      weight = ((mean_length - lengths[p, g]) / lengths[p, g] +
                accuracy * (correct[p, g] - mean_correct))
      weights[p, g] = min(max(weight, -2), 4)
  found = np.zeros(correct.shape)
  values = list(weights.values())
  for place, weight in weights.items():
    found[place] = (weight - np.mean(values)) / np.std(values)
  return found


def test_by_hand():
  correct, lengths = np.array([[1, 0, 1, 0]]), np.array([[100, 200, 300, 200]])
  # (200 − l)/l + 2·(c − ½)
  np.testing.assert_allclose(
      o1_pruner(correct, lengths, standardise=False),
      [[1 + 1, 0 - 1, -1 / 3 + 1, 0 - 1]], rtol=1e-6)
  # A twentieth of the mean length would weigh 19 + 2·½.
  short = np.array([[10, 200, 390, 200]])
  raw = o1_pruner(correct, short, low=-np.inf, high=np.inf, standardise=False)
  np.testing.assert_allclose(raw[0, 0], 20, rtol=1e-6)
  assert float(o1_pruner(correct, short, standardise=False)[0, 0]) == 4


@pytest.mark.parametrize('accuracy', [0.0, 2.0])
def test_the_released_code(accuracy):
  rng = np.random.default_rng(0)
  correct = rng.integers(0, 2, (5, 16))
  correct[0] = 0  # unsolved: the length still ranks
  lengths = rng.integers(20, 4000, (5, 16))
  keep = np.argsort(rng.random((5, 16))) < 2
  np.testing.assert_allclose(
      o1_pruner(correct, lengths, keep, accuracy=accuracy),
      by_the_code(correct, lengths, keep, accuracy), atol=1e-5)
  np.testing.assert_allclose(
      o1_pruner(correct, lengths, accuracy=accuracy),
      by_the_code(correct, lengths, np.ones((5, 16), bool), accuracy),
      atol=1e-5)


def test_nothing_to_tell_apart_is_exactly_zero():
  with jax.debug_nans(True):
    found = o1_pruner(np.ones((2, 3)), np.full((2, 3), 7))
    none = o1_pruner(np.ones((2, 3)), np.arange(6).reshape(2, 3),
                     np.zeros((2, 3), bool))
  np.testing.assert_array_equal(found, np.zeros((2, 3)))
  np.testing.assert_array_equal(none, np.zeros((2, 3)))


@pytest.fixture
def unchecked():
  """Switches the shape checks off that only tests have."""
  jaxtyping.config.update('jaxtyping_disable', True)
  yield
  jaxtyping.config.update('jaxtyping_disable', False)


def test_wrong_shapes_are_named_without_the_type_checker(unchecked):
  with pytest.raises(ValueError, match=r'\(2, 3\), \(2, 3\), \(2, 1\)'):
    o1_pruner(np.ones((2, 3)), np.ones((2, 3)), np.ones((2, 1), bool))
