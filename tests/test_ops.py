# SPDX-License-Identifier: Apache-2.0
"""Masked statistics equal those of the subset; layouts go there and back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lapo_jax import ops


@pytest.fixture
def table():
  """Values and masks of 40 rows, from an empty to a full one."""
  rng = np.random.default_rng(0)
  values = rng.normal(300.0, 80.0, (40, 9)).astype(np.float32)
  mask = rng.random((40, 9)) < np.linspace(0.0, 1.0, 40)[:, None]
  mask[0], mask[-1] = False, True
  return values, mask


def rows(function, values, mask):
  return np.array([function(v[m]) for v, m in zip(values, mask, strict=True)])


def test_masked_statistics_are_those_of_the_subset(table):
  values, mask = table
  mean = rows(lambda v: v.mean() if v.size else 0, values, mask)
  std = rows(lambda v: v.std(ddof=1) if v.size > 1 else 0, values, mask)
  population = rows(lambda v: v.std() if v.size else 0, values, mask)
  values, mask = jnp.asarray(values), jnp.asarray(mask)
  np.testing.assert_allclose(ops.masked_mean(values, mask), mean, rtol=1e-5)
  np.testing.assert_allclose(ops.masked_std(values, mask), std, rtol=1e-5)
  np.testing.assert_allclose(ops.masked_std(values, mask, ddof=0), population,
                             rtol=1e-5)


@pytest.mark.parametrize('q', [0, 0.0, 0.3, 0.5, 0.7, 1.0])
def test_masked_quantile_is_numpys_of_the_subset(table, q):
  values, mask = table
  expected = rows(lambda v: np.quantile(v, q) if v.size else 0, values, mask)
  quantile = jax.jit(ops.masked_quantile)(values, mask, q)
  np.testing.assert_allclose(quantile, expected, rtol=1e-5)


def test_quantile_of_integers_by_hand():
  lengths = jnp.array([[400, 100, 9999, 200, 300]])
  mask = jnp.array([[True, True, False, True, True]])
  # Rank 0.3 · 3 = 0.9 of (100, 200, 300, 400).
  assert float(ops.masked_quantile(lengths, mask, 0.3)[0]) == pytest.approx(190)
  assert float(ops.masked_quantile(lengths, mask, 0.5)[0]) == 250.0


@pytest.mark.parametrize('filler', [np.nan, np.inf, 1e30])
def test_masked_values_do_not_matter(filler):
  mask = jnp.array([[True, False, True, True]])
  values = jnp.array([[1.0, filler, 2.0, 6.0]])
  assert float(ops.masked_mean(values, mask)[0]) == 3.0
  assert float(ops.masked_std(values, mask)[0]) == pytest.approx(7**0.5)
  assert float(ops.masked_quantile(values, mask, 0.5)[0]) == 2.0


def test_equal_values_have_a_std_of_exactly_zero():
  values = jnp.full((1, 8), 0.35, jnp.float32)
  assert float(jnp.std(values)) > 0.0, 'the trap is gone: simplify masked_std'
  assert float(ops.masked_std(values, jnp.ones((1, 8), bool))[0]) == 0.0


def test_std_far_from_zero_does_not_cancel():
  # E[x²] − E[x]² gives 0 or worse here.
  values = 4096.0 + jnp.array([[0.0, 0.5, 1.0, 1.5]])
  std = ops.masked_std(values, jnp.ones((1, 4), bool))
  assert float(std[0]) == pytest.approx(0.6454972, rel=1e-5)


@pytest.mark.parametrize('statistic', [
    ops.masked_mean, ops.masked_std,
    lambda values, mask: ops.masked_quantile(values, mask, 0.3)])
@pytest.mark.parametrize('count', [0, 1])
def test_empty_and_single_have_finite_gradients(statistic, count):
  mask = jnp.arange(4)[None] < count
  with jax.debug_nans(True):
    gradient = jax.grad(lambda v: statistic(v, mask).sum())(jnp.ones((1, 4)))
  assert np.isfinite(gradient).all()


def test_axis_and_keepdims():
  values = jnp.arange(6.0).reshape(2, 3)
  mask = jnp.ones((2, 3), bool)
  assert float(ops.masked_mean(values, mask, axis=None)) == 2.5
  np.testing.assert_array_equal(ops.masked_mean(values, mask, axis=0),
                                [1.5, 2.5, 3.5])
  assert ops.masked_mean(values, mask, keepdims=True).shape == (2, 1)
  assert ops.masked_std(values, mask, keepdims=True).shape == (2, 1)


def test_groups_are_consecutive_rows():
  batch = jnp.arange(12).reshape(6, 2)
  groups = ops.to_groups(batch, 3)
  assert groups.shape == (2, 3, 2)
  np.testing.assert_array_equal(groups[1, 0], batch[3])
  np.testing.assert_array_equal(ops.to_batch(groups), batch)


def test_positions_ignore_left_padding():
  mask = jnp.array([[False, False, True, True], [True] * 4])
  np.testing.assert_array_equal(ops.positions_from_mask(mask),
                                [[0, 0, 0, 1], [0, 1, 2, 3]])


def test_token_logprobs():
  logits = jnp.log(jnp.array([[0.5, 0.25, 0.25], [8.0, 1.0, 1.0]]))
  logprobs = ops.token_logprobs(logits.astype(jnp.bfloat16), jnp.array([0, 1]))
  assert logprobs.dtype == jnp.float32
  np.testing.assert_allclose(logprobs, np.log([0.5, 0.1]), rtol=2e-2)


def test_positions_begin_anew_with_each_segment():
  segments = jnp.array([[0, 0, 1, 1, 1], [1, 2, 2, 3, 3], [1, 1, 2, 0, 0]])
  positions = np.asarray(ops.positions_from_segments(segments))
  np.testing.assert_array_equal(positions[segments > 0],
                                [0, 1, 2, 0, 0, 1, 0, 1, 0, 1, 0])


def test_buckets():
  assert [ops.bucket(n, 100) for n in (1, 17, 25, 70)] == [16, 24, 32, 96]
  assert [ops.bucket(n, 7, least=2) for n in (1, 3, 4, 5, 7)] == [2, 3, 4, 6, 7]
