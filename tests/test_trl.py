# SPDX-License-Identifier: Apache-2.0
"""Losses and advantages are those of TRL 1.16.0, in value and gradient.

tests/goldens/trl.npz holds what TRL's own trainers made of random tensors, in
float64; where torch and trl are installed they are asked again.
"""

import pathlib
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.trl_oracle import make as oracle
from lapo_jax import advantages, losses, types

_GOLDENS = pathlib.Path(__file__).parent / 'goldens' / 'trl.npz'
_AGGREGATES = {'grpo': 'sequence', 'bnpo': 'token', 'dapo': 'token',
               'cispo': 'token', 'dr_grpo': 'constant'}


@pytest.fixture(scope='module')
def golden():
  with np.load(_GOLDENS) as stored:
    return dict(stored)


def our_advantages(data, settings):
  """Under TRL's settings, [P, G]."""
  rewards = types.Rewards({'correct': data['correct'],
                           'length': data['length']},
                          dict(zip(('correct', 'length'), data['weights'],
                                   strict=True)))
  gdpo = settings.get('multi_objective_aggregation') == 'normalize_then_sum'
  rloo = 'normalize_advantages' in settings
  whiten = gdpo or settings.get('normalize_advantages')
  return advantages.from_rewards(
      rewards, data['mask'].sum(1).reshape(oracle.P, oracle.G),
      baseline='leave_one_out' if rloo else 'mean',
      scale='none' if rloo else settings.get('scale_rewards', 'group'),
      decoupled=gdpo, whiten='completions' if whiten else 'none')


def our_loss(data, settings):
  """A function of the log-probs, under TRL's settings."""
  loss_type = settings.get('loss_type', 'grpo')
  level = settings.get('importance_sampling_level', 'token')
  low = settings.get('epsilon', 0.2)
  high = settings.get('epsilon_high', low)
  kind = 'ppo' if level == 'token' else 'gspo'
  if loss_type == 'cispo':  # one absolute bound, none below
    kind, low, high = 'cispo', 1.0, high - 1.0
  mode = settings.get('vllm_importance_sampling_mode', '')
  truncated = settings.get('mask_truncated_completions', False)
  mask, advantage = data['mask'], our_advantages(data, settings).reshape(-1)
  keep = ~data['truncated'] if truncated else None
  weights = losses.token_weights(mask, _AGGREGATES[loss_type], keep)
  if truncated and loss_type == 'grpo':
    # TRL leaves the masked completions in the denominator.
    weights = weights * keep.mean()

  def loss(logprobs):
    old = data['old']
    if settings.get('on_policy'):
      old = jax.lax.stop_gradient(logprobs)
    per_token = losses.surrogate(
        logprobs, old, advantage, mask, kind=kind, clip_low=low,
        clip_high=high, dual_clip=settings.get('delta', np.inf))
    if settings.get('use_vllm'):
      per_token *= losses.importance_weights(
          old, data['sampler'], mask, level=mode.split('_')[0],
          outside=mode.split('_')[1],
          cap=settings['vllm_importance_sampling_clip_max'],
          floor=settings.get('vllm_importance_sampling_clip_min', 0.0))
    if settings.get('beta'):
      divergence = losses.kl(logprobs, data['ref'], mask, kind='k3')
      if settings['use_bias_correction_kl']:
        divergence *= losses.policy_ratios(logprobs, old, mask, level=level)
      per_token += settings['beta'] * divergence
    return jnp.sum(weights * per_token)

  return loss


@pytest.fixture(scope='module')
def ours(golden):
  """Value and gradient of every case, compiled as one program."""
  return jax.jit(lambda x: {
      name: jax.value_and_grad(our_loss(golden, settings))(x)
      for name, settings in oracle.LOSSES.items()})(golden['logprobs'])


@pytest.mark.parametrize('name', oracle.LOSSES)
def test_losses_are_trls(golden, ours, name):
  value, gradient = ours[name]
  np.testing.assert_allclose(value, golden[f'loss/{name}/loss'], rtol=0,
                             atol=1e-6)
  np.testing.assert_allclose(gradient, golden[f'loss/{name}/gradient'],
                             rtol=0, atol=1e-6)
  assert np.abs(gradient).max() > 1e-3


@pytest.mark.parametrize('name', oracle.ADVANTAGES)
def test_advantages_are_trls(golden, name):
  found = our_advantages(golden, oracle.ADVANTAGES[name])
  np.testing.assert_allclose(found, golden[f'advantage/{name}/advantages'],
                             rtol=0, atol=1e-6)


def test_on_policy_rloo_is_constant_times_the_cap(golden):
  """The ratio of whole completions and that of tokens have one gradient."""
  advantage = our_advantages(golden, oracle.ADVANTAGES['rloo']).reshape(-1)
  weights = losses.token_weights(golden['mask'], 'constant')
  gradient = jax.grad(lambda x: jnp.sum(weights * losses.surrogate(
      x, golden['old'], advantage, golden['mask'])))(golden['old'])
  np.testing.assert_allclose(oracle.T * gradient,
                             golden['advantage/rloo/gradient'], atol=1e-6)


def test_the_cases_tell_the_variants_apart(golden):
  gradients = [golden[f'loss/{name}/gradient'] for name in oracle.LOSSES]
  for i, one in enumerate(gradients):
    for other in gradients[i + 1:]:
      assert np.abs(one - other).max() > 1e-4


def test_the_stored_numbers_are_trls(golden):
  pytest.importorskip('torch')
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')  # what others say at their import
    pytest.importorskip('trl', reason='the oracle is not installed')
    live = oracle.make()
  assert live.keys() == golden.keys()
  for name, found in live.items():
    np.testing.assert_allclose(found, golden[name], rtol=1e-9, atol=1e-12,
                               err_msg=name)
