# SPDX-License-Identifier: Apache-2.0
"""Every setting of the loss acts, refuses what it must, and packs."""

import importlib
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_grpo import (
    CAPTURE,
    LENGTHS,
    B,
    L,
    T,
    distance,
    host,
    make_batch,
    make_rollout,
    make_state,
)

from lapo_jax import grpo, losses, objective, packing, plugins

# The papers' own bounds with every other knob somewhere.
SETTINGS = {
    'dapo': {'clip_high': 0.28, 'dual_clip': 3.0},
    'gspo': {'kind': 'gspo', 'clip_low': 3e-2, 'clip_high': 4e-2,
             'kl_coef': 0.1, 'kl_ratio': True, 'importance_cap': 2.0,
             'importance_level': 'sequence'},
    'cispo': {'kind': 'cispo', 'clip_low': 1.0, 'clip_high': 4.0,
              'kl_coef': 0.1, 'kl': 'k2', 'importance_cap': 1.2,
              'importance_floor': 0.8, 'importance_outside': 'mask'},
}


@pytest.fixture(scope='module')
def batch():
  """Old and reference log-probs as those of `logprobs` might have been."""
  rng = np.random.default_rng(3)
  near = jnp.asarray(rng.normal(-4.2, 0.3, (B, T)), jnp.float32)
  return make_batch().replace(old_logprobs=near, ref_logprobs=near - 0.1)


@pytest.fixture(scope='module')
def logprobs(batch):
  noise = np.random.default_rng(4).normal(0, 0.5, (B, T))
  return batch.old_logprobs + jnp.asarray(noise, jnp.float32)


def gradient(logprobs, batch, **settings):
  of = objective.make_objective_fn(**settings)
  return jax.jit(jax.grad(lambda x: jnp.sum(batch.weights * of(x, batch)[0])))(
      logprobs)


def test_the_defaults_are_grpo(logprobs, batch):
  mask = batch.rollout.action_mask
  expected = jax.grad(lambda x: jnp.sum(batch.weights * (
      losses.clipped_surrogate(x, batch.old_logprobs, batch.advantages, mask) +
      0.1 * losses.k3_kl(x, batch.ref_logprobs, mask))))(logprobs)
  np.testing.assert_allclose(gradient(logprobs, batch, kl_coef=0.1), expected,
                             rtol=1e-5, atol=1e-8)


BASE = {'dual_clip': 1.3, 'kl_coef': 0.1, 'importance_cap': 1.5,
        'importance_floor': 0.5}


@pytest.mark.parametrize('key, value', [
    ('kind', 'gspo'), ('kind', 'cispo'), ('clip_low', 0.1), ('clip_high', 0.28),
    ('dual_clip', 0.0), ('kl_coef', 0.2), ('kl', 'k1'), ('kl', 'k2'),
    ('kl_ratio', True), ('importance_cap', 1.1), ('importance_cap', 0.0),
    ('importance_floor', 0.9), ('importance_level', 'sequence'),
    ('importance_outside', 'mask')])
def test_no_knob_is_inert(logprobs, batch, key, value):
  found = gradient(logprobs, batch, **BASE)
  other = gradient(logprobs, batch, **{**BASE, key: value})
  assert np.abs(found - other).max() > 1e-4


def test_the_knobs_are_those_of_the_config():
  config = importlib.import_module('configs.default').get_config()
  knobs = inspect.signature(objective.make_objective_fn).parameters
  assert {**config.loss} == {
      **{key: knob.default for key, knob in knobs.items()},
      'aggregate': 'sequence', 'drop_truncated': False}


@pytest.mark.parametrize('name', SETTINGS)
def test_old_log_probs_may_be_the_given_ones(logprobs, batch, name):
  on_policy = batch.replace(old_logprobs=None)
  np.testing.assert_allclose(
      gradient(logprobs, on_policy, **SETTINGS[name]),
      gradient(logprobs, batch.replace(old_logprobs=logprobs),
               **SETTINGS[name]), rtol=1e-6)


@pytest.mark.parametrize('muted', [False, True])
@pytest.mark.parametrize('name', ['gspo', 'cispo'])
def test_packed_rows_have_the_same_sums(logprobs, batch, name, muted):
  if muted:  # an advantage a token
    trained = np.random.default_rng(8).random((B, T)) < 0.6
    batch = batch.replace(advantages=jnp.where(
        trained, batch.advantages[:, None], 0.0))
  lengths = (np.asarray(batch.rollout.prompt_mask).sum(-1) +
             np.asarray(batch.rollout.completion_mask).sum(-1))
  plan = packing.plan(lengths, most_slots=L + T, microbatch_size=1)
  pack = packing.make_pack_fn()
  packed = pack(batch, plan)
  # The log-probs travel in the place of others.
  packed_logprobs = pack(batch.replace(old_logprobs=logprobs),
                         plan).old_logprobs
  assert packed.weights.shape[0] < B
  of = objective.make_objective_fn(**SETTINGS[name])

  @jax.jit
  def sums(x, batch):
    per_token, found = of(x, batch)
    return jax.tree.map(lambda y: jnp.sum(batch.weights * y),
                        (per_token, found))

  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5),
               sums(packed_logprobs, packed), sums(logprobs, batch))
  np.testing.assert_allclose(
      np.linalg.norm(gradient(packed_logprobs, packed, **SETTINGS[name])),
      np.linalg.norm(gradient(logprobs, batch, **SETTINGS[name])), rtol=1e-5)


def covarying_by_hand(parts, share):
  """The trained tokens of all parts by covariance, the share of the most."""
  rows = [(float(advantage), float(old), where)
          for i, part in enumerate(parts)
          for b, t in zip(*np.nonzero(np.asarray(part.rollout.action_mask)),
                          strict=True)
          for advantage, old, where in [(part.advantages[b],
                                         part.old_logprobs[b, t], (i, b, t))]]
  means = np.mean([row[:2] for row in rows], axis=0)
  rows.sort(key=lambda row: -(row[0] - means[0]) * (row[1] - means[1]))
  return {where for _, _, where in rows[:max(1, int(share * len(rows)))]}


@pytest.mark.parametrize('share', [1e-6, 0.1, 1.0])
def test_tokens_that_covary_most_pay_for_moving(logprobs, batch, share):
  parts = (batch, batch.replace(old_logprobs=batch.old_logprobs * 1.1))
  found = objective.most_covarying(parts, share)
  wanted = covarying_by_hand(parts, share)
  assert {(i, b, t) for i, part in enumerate(parts) for b, t in zip(
      *np.nonzero(np.asarray(found.among(part))), strict=True)} == wanted
  plain = objective.make_objective_fn()
  paying = objective.make_objective_fn(kl_cov_share=share, kl_cov_coef=3.0)
  penalty = paying(logprobs, batch, found)[0] - plain(logprobs, batch)[0]
  there = np.asarray(found.among(batch))
  np.testing.assert_allclose(penalty, np.where(
      there, 3 * np.abs(logprobs - batch.old_logprobs), 0), atol=1e-5)


def test_microbatches_do_not_matter_to_what_covaries(batch, tiny_model,
                                                     make_params):
  params = jax.tree.map(jnp.asarray, make_params(tiny_model))

  def gradient_of(batch, size, **settings):
    update = grpo.make_update_fn(tiny_model, CAPTURE, temperature=1.0,
                                 microbatch_size=size, **settings)
    return host(update(make_state(params), batch)[0].opt_state)

  settings = {'kl_cov_share': 0.1, 'kl_cov_coef': 5.0}
  whole = gradient_of(batch, B, **settings)
  assert distance(gradient_of(batch, 2, **settings), whole) < 1e-5
  parts = grpo.make_split_fn()(batch, 8, 5)
  assert distance(gradient_of(parts, 8, **settings), whole) < 1e-5
  assert distance(gradient_of(batch, B), whole) > 1e-2
  # On-policy nothing has moved.
  on_policy = batch.replace(old_logprobs=None)
  assert distance(gradient_of(on_policy, B, **settings),
                  gradient_of(on_policy, B)) == 0


def test_what_is_dropped_leaves_the_loss():
  rollout, advantages = make_rollout(), jnp.ones((2, B // 2))
  dropped = np.arange(B).reshape(2, B // 2) % 3 == 0
  make = lambda *args: grpo.make_batch_fn('token')(rollout, advantages, T,
                                                   None, *args)
  found = make(dropped)
  counted = ~dropped.reshape(B) & (np.asarray(LENGTHS) > 0)
  np.testing.assert_array_equal((np.asarray(found.weights) > 0).any(1), counted)
  np.testing.assert_allclose(found.weights.sum(), 1.0, rtol=1e-6)
  np.testing.assert_array_equal(make().weights,
                                make(np.zeros_like(dropped)).weights)


def test_drpo_finds_the_cap_of_sampling():
  config = importlib.import_module('configs.default').get_config('drpo')
  config.rollout.max_completion_length = 77
  assert config.reward.cap == 77
  assert plugins.defaults('rewards', 'drpo')['length_scale'] == 0.1
