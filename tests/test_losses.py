# SPDX-License-Identifier: Apache-2.0
"""Values and gradients against torch; padding that holds the worst."""

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from lapo_jax import losses

B, T = 5, 7


@pytest.fixture
def batch():
  """(logprobs, old, ref, advantages, mask), ratios beyond both bounds."""
  rng = np.random.default_rng(0)
  logprobs = -rng.exponential(1.0, (B, T)).astype(np.float32)
  old = (logprobs + rng.normal(0, 0.4, (B, T))).astype(np.float32)
  ref = (logprobs + rng.normal(0, 0.6, (B, T))).astype(np.float32)
  advantages = np.array([1.5, -0.7, 0.0, 2.0, -1.0], np.float32)
  mask = np.arange(T) < np.array([7, 3, 5, 1, 0])[:, None]
  return logprobs, old, ref, advantages, mask


def surrogate_by_hand(ratio, advantage, clip_low=0.2, clip_high=0.2):
  """Value and gradient with respect to the log-probability of one token."""
  value, gradient = jax.value_and_grad(
      lambda x: losses.clipped_surrogate(
          x, jnp.zeros((1, 1)), jnp.array([advantage]), jnp.ones((1, 1), bool),
          clip_low=clip_low, clip_high=clip_high).sum())(
              jnp.log(jnp.array([[ratio]])))
  return float(value), float(gradient[0, 0])


@pytest.mark.parametrize('ratio,advantage,value,gradient', [
    (1.0, 2.0, -2.0, -2.0),  # ratio 1: the plain policy gradient
    (1.0, -2.0, 2.0, 2.0),
    (1.5, 2.0, -2.4, 0.0),  # more of a good thing: clipped at 1.2
    (1.5, -2.0, 3.0, 3.0),  # more of a bad one: never clipped
    (0.5, 2.0, -1.0, -1.0),
    (0.5, -2.0, 1.6, 0.0),  # less of a bad one: clipped at 0.8
    (1.5, 0.0, 0.0, 0.0),
])
def test_the_clip_acts_on_the_right_side(ratio, advantage, value, gradient):
  got = surrogate_by_hand(ratio, advantage)
  assert got == pytest.approx((value, gradient), abs=1e-5)
  clipped = losses.is_clipped(
      jnp.log(jnp.array([[ratio]])), jnp.zeros((1, 1)), jnp.array([advantage]),
      jnp.ones((1, 1), bool))
  assert bool(clipped[0, 0]) == (gradient == 0.0 and advantage != 0.0)


def test_the_two_bounds_are_not_swapped():
  # DAPO's 0.2 / 0.28: 1.25 lies inside, 0.75 outside.
  assert surrogate_by_hand(1.25, 1.0, 0.2, 0.28) == pytest.approx(
      (-1.25, -1.25), abs=1e-5)
  assert surrogate_by_hand(0.75, -1.0, 0.2, 0.28) == pytest.approx(
      (0.8, 0.0), abs=1e-5)
  assert surrogate_by_hand(1.5, 1.0, 0.2, 0.28)[0] == pytest.approx(
      -1.28, abs=1e-5)


def test_k3_by_hand():
  ref = jnp.array([[-1.0, -2.0, -3.0]])
  logprobs = jnp.array([[-1.0, -1.0, -5.0]])
  mask = jnp.ones((1, 3), bool)
  # e⁻¹ + 1 − 1 and e² − 2 − 1.
  np.testing.assert_allclose(losses.k3_kl(logprobs, ref, mask),
                             [[0.0, 0.3678794, 4.3890561]], rtol=1e-6)
  gradient = jax.grad(lambda x: losses.k3_kl(x, ref, mask).sum())(logprobs)
  # 1 − exp(d): a step down the gradient moves π towards the reference.
  np.testing.assert_allclose(gradient, [[0.0, 0.6321206, -6.3890561]],
                             rtol=1e-6)


def test_k3_is_never_negative_and_precise_near_zero():
  log_ratio = np.linspace(-3, 3, 2001, dtype=np.float32)[None]
  mask = np.ones((1, 2001), bool)
  assert (losses.k3_kl(np.zeros_like(log_ratio), log_ratio, mask) >= 0).all()
  small = losses.k3_kl(jnp.zeros((1, 1)), jnp.full((1, 1), 1e-2),
                       jnp.ones((1, 1), bool))
  assert float(small[0, 0]) == pytest.approx(5.0167e-5, rel=1e-3)


def test_importance_weights_by_hand():
  sampler = jnp.array([[-1.0, -2.0, -3.0, -4.0, 9.0]])
  # π_old / π_sampler is 1/2, 1, 3/2, 4; the last slot is padding.
  old = sampler + jnp.log(jnp.array([[0.5, 1.0, 1.5, 4.0, 8.0]]))
  mask = jnp.array([[True] * 4 + [False]])
  for cap, expected in ((2.0, [0.5, 1.0, 1.5, 2.0, 0.0]),
                        (1.0, [0.5, 1.0, 1.0, 1.0, 0.0]),
                        (np.inf, [0.5, 1.0, 1.5, 4.0, 0.0])):
    np.testing.assert_allclose(
        losses.importance_weights(old, sampler, mask, cap=cap), [expected],
        rtol=1e-6)
  np.testing.assert_array_equal(
      losses.importance_weights(old, sampler, mask),
      losses.importance_weights(old, sampler, mask, cap=np.inf))


@pytest.mark.parametrize('cap', [1.0, 2.0, np.inf])
def test_a_sampler_that_agrees_weighs_exactly_one(batch, cap):
  _, old, _, _, mask = batch
  np.testing.assert_array_equal(
      losses.importance_weights(old, old, mask, cap=cap), mask)


def test_importance_weights_scale_the_gradient_and_have_none(batch):
  logprobs, old, sampler, advantages, mask = batch

  def loss(x, old, sampler, weighted):
    per_token = losses.clipped_surrogate(x, old, advantages, mask)
    if weighted:
      per_token *= losses.importance_weights(old, sampler, mask, cap=1.5)
    return per_token.sum()

  plain = jax.grad(loss)(logprobs, old, sampler, False)
  weighted, to_sampler = jax.grad(loss, argnums=(0, 2))(
      logprobs, old, sampler, True)
  weights = losses.importance_weights(old, sampler, mask, cap=1.5)
  np.testing.assert_allclose(weighted, weights * plain, rtol=1e-6)
  np.testing.assert_array_equal(to_sampler, 0.0)
  assert np.any(weights != mask) and np.any(plain)
  # On-policy π_old is π: its own gradient must not come in twice.
  once = jax.grad(lambda x: losses.importance_weights(x, sampler, mask).sum())
  np.testing.assert_array_equal(once(logprobs), 0.0)


def test_importance_weights_correct_for_another_sampler():
  rng = np.random.default_rng(3)
  logits = jnp.asarray(rng.normal(size=6), jnp.float32)
  policy = jax.nn.log_softmax(logits)[:, None]  # one token, each a row
  sampler = jax.nn.log_softmax(logits + rng.normal(0, 0.5, 6))[:, None]
  advantages = jnp.asarray(rng.normal(size=6), jnp.float32)
  mask = jnp.ones((6, 1), bool)

  def expected_gradient(drawn_from, **settings):
    """Over all tokens, as often as the sampler draws them."""
    def loss(x):
      per_token = losses.clipped_surrogate(
          jax.nn.log_softmax(x)[:, None], policy, advantages, mask)
      per_token *= losses.importance_weights(policy, drawn_from, mask,
                                             **settings)
      return jnp.sum(jnp.exp(drawn_from) * per_token)
    return jax.grad(loss)(logits)

  right = expected_gradient(policy)
  np.testing.assert_allclose(expected_gradient(sampler), right, atol=1e-6)
  # The cap trades variance for a bias: less is corrected.
  assert np.abs(expected_gradient(sampler, cap=1.0) - right).max() > 1e-2


def test_gradients_are_those_of_torch(batch):
  torch = pytest.importorskip('torch')
  logprobs, old, ref, advantages, mask = batch
  low, high, kl_coef = 0.2, 0.28, 0.1

  def loss(x):
    per_token = losses.clipped_surrogate(x, old, advantages, mask,
                                         clip_low=low, clip_high=high)
    per_token += kl_coef * losses.k3_kl(x, ref, mask)
    return (losses.token_weights(mask, 'sequence') * per_token).sum()

  value, gradient = jax.value_and_grad(loss)(logprobs)

  # TRL's GRPO loss, as its trainer writes it.
  x = torch.tensor(logprobs, requires_grad=True)
  t_old, t_ref, t_mask = map(torch.tensor, (old, ref, mask.astype(np.float32)))
  t_advantages = torch.tensor(advantages).unsqueeze(1)
  coef_1 = torch.exp(x - t_old)
  coef_2 = torch.clamp(coef_1, 1 - low, 1 + high)
  per_token = -torch.min(coef_1 * t_advantages, coef_2 * t_advantages)
  per_token_kl = torch.exp(t_ref - x) - (t_ref - x) - 1
  per_token = per_token + kl_coef * per_token_kl
  sums = (per_token * t_mask).sum(-1) / t_mask.sum(-1).clamp(min=1.0)
  # TRL divides by all rows; a row without tokens does not count here.
  expected = sums.sum() / (t_mask.sum(-1) > 0).sum()
  expected.backward()

  assert float(value) == pytest.approx(expected.item(), rel=1e-5)
  np.testing.assert_allclose(gradient, x.grad.numpy(), rtol=1e-4, atol=1e-7)
  clipped = losses.is_clipped(logprobs, old, advantages, mask, clip_low=low,
                              clip_high=high)
  expected = (coef_1 > coef_2) & (t_advantages > 0)
  expected |= (coef_1 < coef_2) & (t_advantages < 0)
  np.testing.assert_array_equal(clipped, expected.numpy() & mask)
  assert clipped.any()


@pytest.mark.parametrize('filler', [199.0, -199.0, np.inf, -np.inf, np.nan])
@pytest.mark.parametrize('place', [0, 1])
def test_padding_may_hold_anything(batch, filler, place):
  logprobs, old, ref, advantages, mask = batch

  def loss(x, pair, advantages):
    per_token = losses.clipped_surrogate(x, pair[0], advantages, mask)
    return (per_token + losses.k3_kl(x, pair[1], mask)).sum()

  expected = jax.value_and_grad(loss)(logprobs, (old, ref), advantages)
  spoil = lambda array: np.where(mask, array, np.float32(filler))
  if place:
    old, ref = spoil(old), spoil(ref)
  else:
    logprobs = spoil(logprobs)
  with jax.debug_nans(True):
    value, gradient = jax.value_and_grad(loss)(logprobs, (old, ref), advantages)
  assert float(value) == float(expected[0])
  np.testing.assert_array_equal(gradient, expected[1])
  np.testing.assert_array_equal(gradient[~mask], 0.0)
  clipped = losses.is_clipped(logprobs, old, advantages, mask)
  assert not clipped[~mask].any()
  with jax.debug_nans(True):
    weights = losses.importance_weights(logprobs, old, mask, cap=2.0)
  np.testing.assert_array_equal(weights[~mask], 0.0)


def value_and_gradient(logprobs, advantages, old=0.0, **settings):
  """Of the sum over one row per advantage, old log-probs all alike."""
  logprobs = jnp.asarray(logprobs, jnp.float32)
  value, gradient = jax.value_and_grad(lambda x: losses.surrogate(
      x, jnp.full(x.shape, old), jnp.asarray(advantages, jnp.float32),
      jnp.ones(x.shape, bool), **settings).sum())(logprobs)
  return float(value), np.asarray(gradient)


@pytest.mark.parametrize('ratio,advantage,value,gradient', [
    (4.0, -2.0, 6.0, 0.0),  # min(4, 3)·2, and nothing to learn
    (2.0, -2.0, 4.0, 4.0),
    (0.5, -2.0, 1.6, 0.0),  # the lower bound as ever
    (4.0, 2.0, -2.4, 0.0),
])
def test_the_dual_clip_bounds_the_loss_of_bad_ones(ratio, advantage, value,
                                                   gradient):
  at = np.log([[ratio]])
  got = value_and_gradient(at, [advantage], dual_clip=3.0)
  assert got == pytest.approx((value, gradient), abs=1e-5)
  clipped = losses.is_clipped(
      jnp.asarray(at, jnp.float32), jnp.zeros((1, 1)), jnp.array([advantage]),
      jnp.ones((1, 1), bool), dual_clip=3.0)
  assert bool(clipped[0, 0]) == (gradient == 0.0)


def test_gspo_by_hand():
  # Ratios 1.2 and 0.8: the completion's is their geometric mean √0.96.
  at, mean = np.log([[1.2, 0.8]]), 0.96**0.5
  value, gradient = value_and_gradient(at, [2.0], kind='gspo')
  assert value == pytest.approx(-2 * 2 * mean, rel=1e-6)
  # Through every token alike, ∂s/∂d = s/2 on each of two slots.
  np.testing.assert_allclose(gradient, [[-2 * mean] * 2], rtol=1e-6)
  # Outside 1 − 0.01 no token learns, wherever its own ratio lies.
  value, gradient = value_and_gradient(at, [-2.0], kind='gspo', clip_low=0.01)
  assert value == pytest.approx(2 * 2 * 0.99, rel=1e-6)
  np.testing.assert_array_equal(gradient, [[0.0, 0.0]])
  clipped = losses.is_clipped(jnp.asarray(at, jnp.float32), jnp.zeros((1, 2)),
                              jnp.array([-2.0]), jnp.ones((1, 2), bool),
                              kind='gspo', clip_low=0.01)
  np.testing.assert_array_equal(clipped, [[True, True]])


@pytest.mark.parametrize('low,high,weights', [
    (0.2, 0.28, [0.8, 1.0, 1.28]),  # the formula
    (1.0, 4.0, [0.5, 1.0, 5.0]),  # TRL's one bound of 5
])
def test_cispo_by_hand(low, high, weights):
  # The weight is a constant: every token learns, whatever its ratio.
  at = np.log([[0.5, 1.0, 6.0]])
  value, gradient = value_and_gradient(at, [-2.0], kind='cispo', clip_low=low,
                                       clip_high=high)
  np.testing.assert_allclose(gradient, 2 * np.array([weights]), rtol=1e-6)
  assert value == pytest.approx(2 * np.sum(weights * at[0]), rel=1e-6)
  clipped = losses.is_clipped(
      jnp.asarray(at, jnp.float32), jnp.zeros((1, 3)), jnp.array([-2.0]),
      jnp.ones((1, 3), bool), kind='cispo', clip_low=low, clip_high=high)
  np.testing.assert_array_equal(clipped, [[low == 0.2, False, True]])


@pytest.mark.parametrize('kind', losses.KINDS)
def test_on_policy_every_kind_is_the_plain_policy_gradient(batch, kind):
  logprobs, _, _, advantages, mask = batch
  weights = losses.token_weights(mask, 'sequence')
  gradient = jax.grad(lambda x: (weights * losses.surrogate(
      x, logprobs, advantages, mask, kind=kind)).sum())(logprobs)
  np.testing.assert_allclose(gradient, -advantages[:, None] * weights,
                             rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize('kind', losses.KINDS)
def test_advantages_may_come_per_token(batch, kind):
  logprobs, old, _, advantages, mask = batch
  spread = np.broadcast_to(advantages[:, None], mask.shape)
  np.testing.assert_array_equal(
      losses.surrogate(logprobs, old, spread, mask, kind=kind),
      losses.surrogate(logprobs, old, advantages, mask, kind=kind))


def packed(batch):
  """The rows of 7, 3 and 5 tokens in one row of 18, and where they lie."""
  places = [(0, 0, 7), (1, 8, 3), (2, 11, 5)]
  segments = np.zeros((1, 18), np.int32)
  for row, start, count in places:
    segments[0, start:start + count] = row + 1

  def pack(array):
    found = np.full((1, 18), 99.0, np.float32)
    for row, start, count in places:
      found[0, start:start + count] = array[row, :count]
    return found

  def unpack(array):
    rows = np.zeros((3, T), np.float32)
    for row, start, count in places:
      rows[row, :count] = np.asarray(array)[0, start:start + count]
    return rows

  return pack, unpack, segments


@pytest.mark.parametrize('kind', losses.KINDS)
def test_packed_rows_give_the_same(batch, kind):
  logprobs, old, sampler, advantages, mask = batch
  pack, unpack, segments = packed(batch)

  def loss(x, old, sampler, advantages, mask, segments=None):
    per_token = losses.surrogate(x, old, advantages, mask, segments, kind=kind)
    per_token *= losses.importance_weights(old, sampler, mask, segments,
                                           level='sequence', cap=2.0)
    per_token += losses.policy_ratios(
        x, old, mask, segments, level='sequence') * losses.kl(x, sampler, mask)
    return per_token.sum(), per_token

  expected = jax.grad(loss, has_aux=True)(
      *(x[:3] for x in (logprobs, old, sampler, advantages, mask)))
  spread = pack(np.broadcast_to(advantages[:, None], (B, T)))
  found = jax.grad(loss, has_aux=True)(
      *map(pack, (logprobs, old, sampler)), spread, segments > 0, segments)
  for ours, theirs in zip(found, expected, strict=True):
    np.testing.assert_allclose(unpack(ours), theirs, rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(np.asarray(ours)[segments == 0], 0.0)


def test_importance_weights_of_a_band_and_of_a_completion():
  sampler = jnp.zeros((1, 4))
  old = jnp.log(jnp.array([[0.5, 1.0, 1.5, 4.0]]))
  mask = jnp.array([[True, True, True, True]])
  band = {'floor': 0.8, 'cap': 2.0}
  np.testing.assert_allclose(
      losses.importance_weights(old, sampler, mask, **band),
      [[0.8, 1.0, 1.5, 2.0]], rtol=1e-6)
  np.testing.assert_allclose(
      losses.importance_weights(old, sampler, mask, outside='mask', **band),
      [[0.0, 1.0, 1.5, 0.0]], rtol=1e-6)
  # The product is 3, on each token.
  whole = dict(level='sequence')
  np.testing.assert_allclose(
      losses.importance_weights(old, sampler, mask, **whole), [[3.0] * 4],
      rtol=1e-6)
  np.testing.assert_allclose(
      losses.importance_weights(old, sampler, mask, **whole, **band),
      [[2.0] * 4], rtol=1e-6)
  np.testing.assert_array_equal(
      losses.importance_weights(old, sampler, mask, outside='mask', **whole,
                                **band), [[0.0] * 4])


def test_divergences_by_hand():
  ref, logprobs = jnp.array([[-2.0, -5.0]]), jnp.array([[-1.0, -7.0]])
  mask = jnp.ones((1, 2), bool)
  for kind, value, slope in (
      ('k1', [1.0, -2.0], [1.0, 1.0]),
      ('k2', [0.5, 2.0], [1.0, -2.0]),
      ('k3', [0.3678794, 4.3890561], [0.6321206, -6.3890561])):
    found, gradient = losses.kl(logprobs, ref, mask, kind=kind), jax.grad(
        lambda x, kind=kind: losses.kl(x, ref, mask, kind=kind).sum())(logprobs)
    np.testing.assert_allclose(found, [value], rtol=1e-6)
    np.testing.assert_allclose(gradient, [slope], rtol=1e-6)


def test_which_divergence_has_whose_gradient():
  rng = np.random.default_rng(4)
  logits, ref = (jnp.asarray(rng.normal(size=6), jnp.float32) for _ in 'ab')
  mask = jnp.ones((6, 1), bool)
  column = lambda x: jax.nn.log_softmax(x)[:, None]
  policy, ref = column(logits), column(ref)

  def expected(kind, weighted):
    """The gradient of the estimate over all tokens, as often as drawn."""
    def loss(x):
      estimate = losses.kl(column(x), ref, mask, kind=kind)
      if weighted:
        estimate *= losses.policy_ratios(column(x), policy, mask)
      return jnp.sum(jnp.exp(policy) * estimate)
    return jax.grad(loss)(logits)

  reverse = jax.grad(lambda x: jnp.sum(
      jnp.exp(column(x)) * (column(x) - ref)))(logits)
  forward = jax.grad(lambda x: -jnp.sum(jnp.exp(ref) * column(x)))(logits)
  for kind, weighted in (('k2', False), ('k1', True), ('k3', True)):
    np.testing.assert_allclose(expected(kind, weighted), reverse, atol=1e-6)
  np.testing.assert_allclose(expected('k1', False), 0.0, atol=1e-6)
  np.testing.assert_allclose(expected('k3', False), forward, atol=1e-6)
  assert np.abs(expected('k2', True) - reverse).max() > 1e-2


@pytest.mark.parametrize('kind', losses.KINDS)
@pytest.mark.parametrize('filler', [199.0, np.nan])
def test_padding_may_hold_anything_of_every_kind(batch, kind, filler):
  logprobs, old, ref, advantages, mask = batch

  def loss(x, old, ref):
    per_token = losses.surrogate(x, old, advantages, mask, kind=kind,
                                 dual_clip=3.0)
    per_token *= losses.importance_weights(old, ref, mask, level='sequence')
    weight = losses.policy_ratios(x, old, mask, level='sequence')
    for divergence in losses.DIVERGENCES:
      per_token += weight * losses.kl(x, ref, mask, kind=divergence)
    return per_token.sum()

  expected = jax.value_and_grad(loss)(logprobs, old, ref)
  spoilt = [np.where(mask, x, np.float32(filler))
            for x in (logprobs, old, ref)]
  with jax.debug_nans(True):
    value, gradient = jax.value_and_grad(loss)(*spoilt)
  assert float(value) == float(expected[0])
  np.testing.assert_array_equal(gradient, expected[1])


@pytest.mark.parametrize('how', losses.AGGREGATES)
def test_the_overlong_leave_numerator_and_denominator(batch, how):
  mask = batch[-1]
  keep = np.array([True, False, True, True, True])
  weights = losses.token_weights(mask, how, keep)
  np.testing.assert_array_equal(weights[1], np.zeros(T))
  absent = losses.token_weights(mask[keep], how)
  # The constant is one of the slots, whoever fills them.
  scale = 4 / 5 if how == 'constant' else 1.0
  np.testing.assert_allclose(weights[keep], scale * absent, rtol=1e-6)
  np.testing.assert_array_equal(
      losses.token_weights(mask, how, np.zeros(B, bool)), np.zeros((B, T)))


def test_square_batches_broadcast_along_tokens():
  advantages = jnp.array([1.0, -2.0, 3.0])
  per_token = losses.clipped_surrogate(
      jnp.zeros((3, 3)), jnp.zeros((3, 3)), advantages, jnp.ones((3, 3), bool))
  np.testing.assert_array_equal(per_token, [[-1] * 3, [2] * 3, [-3] * 3])
  clipped = losses.is_clipped(
      jnp.full((3, 3), 1.0), jnp.zeros((3, 3)), advantages,
      jnp.ones((3, 3), bool))
  np.testing.assert_array_equal(clipped, [[True] * 3, [False] * 3, [True] * 3])


def test_weights_by_hand():
  mask = jnp.array([[True, True, True, False], [True, False, False, False],
                    [False] * 4])
  np.testing.assert_allclose(
      losses.token_weights(mask, 'sequence'),
      [[1 / 6, 1 / 6, 1 / 6, 0], [1 / 2, 0, 0, 0], [0] * 4])
  np.testing.assert_allclose(
      losses.token_weights(mask, 'token'),
      [[1 / 4, 1 / 4, 1 / 4, 0], [1 / 4, 0, 0, 0], [0] * 4])
  np.testing.assert_allclose(
      losses.token_weights(mask, 'constant'),
      [[1 / 12, 1 / 12, 1 / 12, 0], [1 / 12, 0, 0, 0], [0] * 4])


@pytest.mark.parametrize('how', losses.AGGREGATES)
def test_laws_of_weights(batch, how):
  mask = batch[-1]
  weights = losses.token_weights(mask, how)
  assert weights.dtype == jnp.float32
  np.testing.assert_array_equal(weights[~mask], 0.0)
  share = mask.mean() if how == 'constant' else 1.0
  assert float(weights.sum()) == pytest.approx(share, rel=1e-6)
  with jax.debug_nans(True):
    empty = losses.token_weights(jnp.zeros((B, T), bool), how)
  np.testing.assert_array_equal(empty, np.zeros((B, T)))
  with jax.disable_jit():
    plain = losses.token_weights(jnp.asarray(mask), how)
  np.testing.assert_allclose(plain, weights)


def padded(array, value):
  return np.pad(array, ((0, 2), (0, 3)), constant_values=value)


@pytest.mark.parametrize('how', ['sequence', 'token'])
def test_more_padding_changes_nothing(batch, how):
  def loss(x, old, ref, advantages, mask):
    per_token = losses.clipped_surrogate(x, old, advantages, mask)
    per_token += losses.k3_kl(x, ref, mask)
    return (losses.token_weights(mask, how) * per_token).sum()

  logprobs, old, ref, advantages, mask = batch
  wider = (padded(logprobs, 99.0), padded(old, -99.0), padded(ref, 99.0),
           np.pad(advantages, (0, 2)), padded(mask, False))
  value, gradient = jax.value_and_grad(loss)(*batch)
  wide_value, wide_gradient = jax.value_and_grad(loss)(*wider)
  assert float(wide_value) == pytest.approx(float(value), rel=1e-6)
  np.testing.assert_allclose(wide_gradient, padded(gradient, 0.0), rtol=1e-5)


@pytest.mark.parametrize('how', losses.AGGREGATES)
def test_microbatch_gradients_add(batch, how):
  logprobs, old, _, advantages, mask = batch
  weights = losses.token_weights(mask, how)

  def gradient(rows):
    loss = lambda x: (weights[rows] * losses.clipped_surrogate(
        x, old[rows], advantages[rows], mask[rows])).sum()
    return jax.grad(loss)(logprobs[rows])

  whole = gradient(slice(None))
  parts = [gradient(slice(i, i + 1)) for i in range(B)]
  np.testing.assert_allclose(np.concatenate(parts), whole, rtol=1e-6)


@pytest.fixture
def unchecked():
  """Switches the shape checks off that only tests have."""
  jaxtyping.config.update('jaxtyping_disable', True)
  yield
  jaxtyping.config.update('jaxtyping_disable', False)


def test_unknown_aggregates_name_the_legal_ones():
  with pytest.raises(ValueError, match="'mean'.*'sequence'"):
    losses.token_weights(jnp.ones((2, 3), bool), 'mean')


def test_unknown_words_name_the_legal_ones():
  ones, mask = jnp.ones((2, 3)), jnp.ones((2, 3), bool)
  for call, match in (
      (lambda: losses.surrogate(ones, ones, jnp.ones(2), mask, kind='grpo'),
       "kind is 'grpo'.*'gspo'"),
      (lambda: losses.kl(ones, ones, mask, kind='k4'), "kind is 'k4'.*'k1'"),
      (lambda: losses.policy_ratios(ones, ones, mask, level='row'),
       "level is 'row'.*'sequence'"),
      (lambda: losses.importance_weights(ones, ones, mask, level='row'),
       "level is 'row'.*'sequence'"),
      (lambda: losses.importance_weights(ones, ones, mask, outside='drop'),
       "outside is 'drop'.*'truncate'")):
    with pytest.raises(ValueError, match=match):
      call()


def test_wrong_shapes_are_named_without_the_type_checker(unchecked):
  ones, mask = jnp.ones((2, 3)), jnp.ones((2, 3), bool)
  with pytest.raises(ValueError, match=r'shape \(3,\) but expected \(2'):
    losses.token_weights(mask, keep=jnp.ones(3, bool))
  with pytest.raises(ValueError, match=r'\(2, 4\), \(2, 3\)'):
    losses.surrogate(ones, ones, jnp.ones((2, 4)), mask)
  with pytest.raises(ValueError, match=r'\(2, 3\), \(2, 4\)'):
    losses.policy_ratios(ones, ones, mask, jnp.ones((2, 4), jnp.int32),
                         level='sequence')
  with pytest.raises(ValueError, match=r'shape \(3,\) but expected \(2'):
    losses.clipped_surrogate(ones, ones, jnp.ones(3), mask)
  with pytest.raises(ValueError, match=r'\(2, 1\), \(2, 3\)'):
    losses.k3_kl(ones, jnp.ones((2, 1)), mask)
  with pytest.raises(ValueError, match=r'\(2, 1\), \(2, 3\)'):
    losses.importance_weights(ones, jnp.ones((2, 1)), mask)
  with pytest.raises(ValueError, match=r'rank 1 \(shape \(6,\)\)'):
    losses.token_weights(mask.reshape(-1))
