# SPDX-License-Identifier: Apache-2.0
"""Numbers by hand, laws of a group, and other libraries' formulas."""

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

import lapo_jax
from lapo_jax import types
from lapo_jax.advantages import (
    from_rewards,
    group_advantages,
    informative,
    refill,
)

SETTINGS = [dict(baseline=baseline, scale=scale)
            for baseline in ('mean', 'leave_one_out', 'none')
            for scale in ('group', 'batch', 'none')]


@pytest.fixture
def rewards():
  return np.random.default_rng(0).normal(0.5, 0.4, (4, 6)).astype(np.float32)


@pytest.fixture
def lengths():
  return np.random.default_rng(1).integers(1, 400, (4, 6), dtype=np.int32)


def one_group(values, **settings):
  return np.asarray(group_advantages(jnp.array([values]), **settings))[0]


def test_numbers_by_hand():
  np.testing.assert_allclose(
      one_group([1.0, 1.0, 1.0, 0.999]), [0.417, 0.417, 0.417, -1.25],
      atol=1e-3)
  np.testing.assert_allclose(
      one_group([1.0, 0.0, 0.0, 1.0], eps=0.0),
      np.array([1, -1, -1, 1]) * 0.75**0.5, rtol=1e-6)
  np.testing.assert_allclose(
      one_group([1.0, 2.0, 6.0], scale='none'), [-2.0, -1.0, 3.0])
  np.testing.assert_allclose(
      one_group([1.0, 2.0, 6.0], baseline='leave_one_out', scale='none'),
      [1 - 4.0, 2 - 3.5, 6 - 1.5])
  np.testing.assert_allclose(
      one_group([1.0, 2.0, 6.0], baseline='none', scale='none'),
      [1.0, 2.0, 6.0])


def test_batch_scale_is_the_groups_mean_and_the_batchs_sd():
  advantages = group_advantages(jnp.array([[0.0, 2.0], [4.0, 6.0]]),
                                scale='batch', eps=0.0)
  # Sample variance of 0, 2, 4, 6: (9 + 1 + 1 + 9) / 3.
  np.testing.assert_allclose(advantages, np.array([[-1, 1], [-1, 1]])
                             / (20 / 3)**0.5, rtol=1e-6)


@pytest.mark.parametrize('scale', ['group', 'batch', 'none'])
@pytest.mark.parametrize('baseline', ['mean', 'leave_one_out'])
@pytest.mark.parametrize('value', [0.0, 1.0, 0.35, -0.1, 1e6])
def test_equal_rewards_give_exactly_zero(value, baseline, scale):
  with jax.debug_nans(True):
    advantages = group_advantages(
        jnp.stack([jnp.full(8, value), jnp.arange(8.0)]), baseline=baseline,
        scale=scale)
  np.testing.assert_array_equal(advantages[0], np.zeros(8))
  assert np.abs(advantages[1]).max() > 0.0


@pytest.mark.parametrize('settings', SETTINGS)
def test_a_group_of_one_is_finite(settings):
  with jax.debug_nans(True):
    advantages = group_advantages(jnp.array([[0.7], [0.2]]), **settings)
  assert np.isfinite(advantages).all()
  if settings['baseline'] != 'none':
    np.testing.assert_array_equal(advantages, np.zeros((2, 1)))


@pytest.mark.parametrize('settings', SETTINGS)
def test_a_reward_that_is_no_number_is_not_hidden(settings):
  rewards = np.array([[0, 1, 1, 0], [1, np.nan, 0, 0]], np.float32)
  found = group_advantages(rewards, **settings)
  assert np.isnan(found[1, 1])


def test_without_a_baseline_equal_rewards_are_not_blown_up():
  np.testing.assert_array_equal(one_group([1.0, 1.0], baseline='none'),
                                [1.0, 1.0])


@pytest.mark.parametrize('settings', SETTINGS)
def test_dropped_is_absent(rewards, settings):
  keep = np.ones((4, 6), bool)
  keep[:, [1, 4]] = False
  expected = group_advantages(rewards[:, [0, 2, 3, 5]], **settings)
  for filler in (1e3, np.nan):
    noisy = np.where(keep, rewards, filler)
    advantages = np.asarray(group_advantages(noisy, keep, **settings))
    np.testing.assert_allclose(advantages[:, [0, 2, 3, 5]], expected,
                               rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(advantages[:, [1, 4]], 0.0)


def test_a_group_with_nothing_kept_is_zero(rewards):
  keep = jnp.ones((4, 6), bool).at[2].set(False)
  with jax.debug_nans(True):
    advantages = group_advantages(rewards, keep)
  np.testing.assert_array_equal(advantages[2], np.zeros(6))


@pytest.mark.parametrize('settings', SETTINGS)
def test_laws_of_a_group(rewards, settings):
  advantages = group_advantages(rewards, **settings)
  order = np.random.default_rng(2).permutation(6)
  np.testing.assert_allclose(group_advantages(rewards[:, order], **settings),
                             advantages[:, order], atol=1e-5)
  with jax.disable_jit():
    plain = group_advantages(jnp.asarray(rewards), **settings)
  np.testing.assert_allclose(plain, advantages, atol=1e-6)
  if settings['baseline'] != 'none':
    np.testing.assert_allclose(advantages.sum(-1), np.zeros(4), atol=1e-5)
    # One constant for all groups: one per group would change the batch's sd.
    shifted = group_advantages(rewards + 3.0, **settings)
    np.testing.assert_allclose(shifted, advantages, atol=1e-4)


def test_trl_and_verl_formulas(rewards):
  mean = rewards.mean(1, keepdims=True)
  std = rewards.std(1, ddof=1, keepdims=True)
  np.testing.assert_allclose(group_advantages(rewards),
                             (rewards - mean) / (std + 1e-4), atol=1e-5)
  np.testing.assert_allclose(group_advantages(rewards, eps=1e-6),
                             (rewards - mean) / (std + 1e-6), atol=1e-5)
  np.testing.assert_allclose(
      group_advantages(rewards, scale='batch'),
      (rewards - mean) / (rewards.std(ddof=1) + 1e-4), atol=1e-5)
  others = (rewards.sum(1, keepdims=True) - rewards) / 5
  np.testing.assert_allclose(
      group_advantages(rewards, baseline='leave_one_out', scale='none'),
      rewards - others, atol=1e-6)


def gdpo(terms, weights, eps):
  """Each term normalised in its group, weighted and summed; numpy."""
  total = 0.0
  for name, term in terms.items():
    mean = term.mean(1, keepdims=True)
    std = term.std(1, ddof=1, keepdims=True)
    total = total + weights[name] * (term - mean) / (std + eps)
  return total


@pytest.fixture
def two_terms(rewards):
  length = np.random.default_rng(3).random((4, 6), np.float32)
  terms = {'correct': (rewards > 0.5).astype(np.float32), 'length': length}
  weights = {'correct': 0.7, 'length': 0.3}
  return terms, weights


def test_decoupled_whitened_over_completions_is_trls(two_terms, lengths):
  terms, weights = two_terms
  summed = gdpo(terms, weights, 1e-4)
  expected = (summed - summed.mean()) / (summed.std(ddof=1) + 1e-4)
  advantages = from_rewards(types.Rewards(terms, weights), lengths,
                            decoupled=True, whiten='completions')
  np.testing.assert_allclose(advantages, expected, atol=1e-5)


def test_decoupled_whitened_over_tokens_is_verls(two_terms, lengths):
  terms, weights = two_terms
  summed = gdpo(terms, weights, 1e-6).reshape(-1)
  tokens = np.repeat(summed, lengths.reshape(-1))
  expected = (summed - tokens.mean()) / np.sqrt(tokens.var(ddof=1) + 1e-8)
  advantages = from_rewards(types.Rewards(terms, weights), lengths, eps=1e-6,
                            decoupled=True, whiten='tokens')
  np.testing.assert_allclose(advantages.reshape(-1), expected, atol=1e-5)


def test_decoupling_separates_a_term_that_does_not_vary(lengths):
  """An all-correct group: the length term's weight cancels only when summed."""
  length = np.random.default_rng(3).random((4, 6), np.float32)
  correct = np.ones((4, 6), np.float32)
  correct[1:, ::2] = 0.0

  def of(alpha, **settings):
    weights = {'correct': 1.0, 'length': alpha}
    rewards = types.Rewards({'correct': correct, 'length': length}, weights)
    return np.asarray(from_rewards(rewards, lengths, eps=0.0, **settings))[0]

  np.testing.assert_allclose(of(0.1), of(0.7), atol=1e-5)
  np.testing.assert_allclose(of(0.1, decoupled=True) * 7,
                             of(0.7, decoupled=True), rtol=1e-4)


@pytest.mark.parametrize('settings', SETTINGS)
@pytest.mark.parametrize('decoupled', [False, True])
def test_one_term_is_plain(rewards, lengths, settings, decoupled):
  advantages = from_rewards(types.Rewards({'only': rewards}), lengths,
                            decoupled=decoupled, **settings)
  np.testing.assert_allclose(advantages, group_advantages(rewards, **settings),
                             atol=1e-6)


@pytest.mark.parametrize('whiten', ['none', 'completions', 'tokens'])
@pytest.mark.parametrize('decoupled', [False, True])
def test_from_rewards_drops_too(two_terms, lengths, decoupled, whiten):
  terms, weights = two_terms
  keep = np.ones((4, 6), bool)
  keep[:, [0, 3]] = False
  settings = dict(decoupled=decoupled, whiten=whiten)
  advantages = from_rewards(types.Rewards(terms, weights, keep), lengths,
                            **settings)
  kept = [1, 2, 4, 5]
  expected = from_rewards(
      types.Rewards({name: term[:, kept] for name, term in terms.items()},
                    weights), lengths[:, kept], **settings)
  np.testing.assert_allclose(advantages[:, kept], expected, atol=1e-5)
  np.testing.assert_array_equal(advantages[:, [0, 3]], np.zeros((4, 2)))


@pytest.mark.parametrize('whiten', ['none', 'completions', 'tokens'])
@pytest.mark.parametrize('value', [0.0, 0.35])
def test_nothing_to_learn_is_exactly_zero(value, whiten):
  equal = jnp.full((2, 4), value)
  for lengths in (jnp.zeros((2, 4), jnp.int32), jnp.full((2, 4), 7)):
    with jax.debug_nans(True):
      advantages = from_rewards(types.Rewards({'a': equal, 'b': equal}),
                                lengths, decoupled=True, whiten=whiten)
    np.testing.assert_array_equal(advantages, np.zeros((2, 4)))


def test_a_group_that_varies_is_informative():
  correct = jnp.array([[1, 1, 1], [0, 0, 0], [0, 1, 0], [0.35] * 3, [0.3, 0.35,
                                                                    0.35]])
  np.testing.assert_array_equal(informative(correct),
                                [False, False, True, False, True])
  keep = jnp.ones((5, 3), bool).at[2, 1].set(False).at[4].set(False)
  np.testing.assert_array_equal(informative(correct, keep), [False] * 5)
  # A length term varies in every group: not what is asked.
  shaped = correct - jnp.array([[0.0, 0.1, 0.2]])
  assert informative(shaped).all()


@pytest.mark.parametrize('kept, found, expected', [
    ('1010', '0101', [0, 4 + 1, 2, 4 + 3]),  # just enough
    ('0010', '0100', [4 + 1, 1, 2, 3]),  # too few: the rest stays
    ('1011', '1111', [0, 4, 2, 3]),  # too many: the first
    ('1111', '1111', [0, 1, 2, 3]),
    ('0000', '0000', [0, 1, 2, 3]),
])
def test_a_round_fills_the_places_that_teach_nothing(kept, found, expected):
  flags = lambda text: jnp.array([digit == '1' for digit in text])
  np.testing.assert_array_equal(refill(flags(kept), flags(found)), expected)


def test_rounds_fill_the_batch_in_the_order_of_their_draw():
  rng = np.random.default_rng(5)
  taught = rng.random((6, 8)) < 0.3  # rounds of 8 groups
  groups = np.arange(48).reshape(6, 8)
  batch = groups[0]
  for number in range(1, 6):
    source = refill(jnp.asarray(taught.ravel()[batch]),
                    jnp.asarray(taught[number]))
    batch = np.concatenate([batch, groups[number]])[source]
  chosen = batch[taught.ravel()[batch]]
  first = np.flatnonzero(taught.ravel())[:8]
  assert sorted(chosen) == sorted(first) and len(set(batch)) == 8


def test_unknown_settings_name_the_legal_ones(rewards, lengths):
  with pytest.raises(ValueError, match="'median'.*'leave_one_out'"):
    group_advantages(rewards, baseline='median')
  with pytest.raises(ValueError, match="'prompt'.*'batch'"):
    group_advantages(rewards, scale='prompt')
  with pytest.raises(ValueError, match="'yes'.*'tokens'"):
    from_rewards(types.Rewards({'a': rewards}), lengths, whiten='yes')


@pytest.fixture
def unchecked():
  """Switches the shape checks off that only tests have."""
  jaxtyping.config.update('jaxtyping_disable', True)
  yield
  jaxtyping.config.update('jaxtyping_disable', False)


def test_wrong_shapes_are_named_without_the_type_checker(rewards, lengths,
                                                         unchecked):
  with pytest.raises(ValueError, match=r'\(4, 6\), \(4, 1\)'):
    group_advantages(rewards, jnp.ones((4, 1), bool))
  with pytest.raises(ValueError, match=r'rank 1 \(shape \(24,\)\)'):
    group_advantages(rewards.reshape(-1))
  with pytest.raises(ValueError, match=r'\(4, 6\), \(4, 1\)'):
    informative(rewards, jnp.ones((4, 1), bool))
  with pytest.raises(ValueError, match=r'\(4, 6\), \(4,\)'):
    from_rewards(types.Rewards({'a': rewards}), lengths[:, 0])


def test_the_facade_opens_the_same_door(rewards):
  assert lapo_jax.group_advantages is group_advantages
