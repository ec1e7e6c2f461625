# SPDX-License-Identifier: Apache-2.0
"""DRPO by hand; its advantages have the gradient of its loss over groups."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lapo_jax import advantages, losses, ops, types
from lapo_jax.rewards import drpo

P, G, T = 3, 4, 6


def test_a_group_by_hand():
  correct = np.array([[1, 1, 0, 0]])
  lengths = np.array([[1000, 1000 + round(409.6 * np.log(3)), 4096, 10]])
  scores = np.array([[-9.0, -9.0, -1.0, -1.0 - 10 * np.log(4)]], np.float32)
  # 450 tokens more are a third of the weight; the likelier wrong one counts
  # four times as much.
  np.testing.assert_allclose(
      drpo.reward(correct, lengths, scores),
      4 * np.array([[0.75, 0.25, -0.8, -0.2]]), atol=1e-3)
  # τ·log mean exp(s/τ) = −1 + 10·log(5/8), and −Σ w·s = 9.
  np.testing.assert_allclose(drpo.loss(scores, correct, lengths),
                             [8 + 10 * np.log(5 / 8)], rtol=1e-5)


@pytest.mark.parametrize('grade', [0.0, 1.0])
def test_a_group_of_one_kind_gives_nothing(grade):
  correct = np.full((2, 3), grade)
  lengths, scores = np.array([[1, 2, 3]] * 2), -np.ones((2, 3), np.float32)
  with jax.debug_nans(True):
    gradient = jax.grad(
        lambda s: drpo.loss(s, correct, lengths).sum())(scores)
    found = drpo.reward(correct, lengths, scores)
  np.testing.assert_array_equal(found, np.zeros((2, 3)))
  np.testing.assert_array_equal(gradient, np.zeros((2, 3)))
  np.testing.assert_array_equal(drpo.loss(scores, correct, lengths), [0, 0])


@pytest.mark.parametrize('settings', [
    {}, {'cap': 6, 'length_scale': 0.5, 'tau': 0.3}])
def test_one_update_has_the_gradient_of_the_loss_over_groups(settings):
  rng = np.random.default_rng(0)
  logprobs = jnp.asarray(-rng.exponential(1.0, (P * G, T)), jnp.float32)
  lengths = rng.integers(1, T + 1, (P, G))
  mask = jnp.asarray(np.arange(T) < lengths.reshape(-1, 1))
  correct = np.array([[1, 0, 1, 0], [1, 1, 1, 1], [0, 0, 0, 1]], np.float32)

  def over_groups(x):
    scores = ops.to_groups(ops.masked_mean(x, mask), G)
    return drpo.loss(scores, correct, lengths, **settings).mean()

  outcomes = types.Outcomes(
      correct=jnp.asarray(correct), lengths=lengths, truncated=None,
      prompt_index=None, target_lengths=None, extras={
          'mean_logprob': ops.to_groups(ops.masked_mean(logprobs, mask), G)})
  rewards, _ = drpo.make(**settings).apply(outcomes, ())
  advantage = advantages.from_rewards(rewards, lengths, baseline='none',
                                      scale='none')

  def as_we_train(x, rows=slice(None)):
    per_token = losses.surrogate(x[rows], logprobs[rows],
                                 ops.to_batch(advantage)[rows], mask[rows])
    return (losses.token_weights(mask, 'sequence')[rows] * per_token).sum()

  expected = jax.grad(over_groups)(logprobs)
  np.testing.assert_allclose(jax.grad(as_we_train)(logprobs), expected,
                             atol=1e-6)
  # A cut that parts the groups changes nothing.
  parts = sum(jax.grad(as_we_train)(logprobs, rows)
              for rows in (slice(0, 6), slice(6, None)))
  np.testing.assert_allclose(parts, expected, atol=1e-6)
  assert np.abs(expected).max() > 1e-2


def test_longer_is_less_and_never_negative_among_the_correct():
  correct = np.array([[1, 1, 1, 0]])
  lengths = np.array([[100, 900, 4096, 5]])
  found = np.asarray(drpo.reward(correct, lengths, -np.ones((1, 4), 'f')))[0]
  assert found[0] > found[1] > found[2] > 0 > found[3]
  np.testing.assert_allclose(found.sum(), 0, atol=1e-5)
