# SPDX-License-Identifier: Apache-2.0
"""DRPO: correct completions weighed by length among themselves alone.

  L = −Σ_correct w·s + τ·log mean_wrong exp(s/τ)     of a group, to be minimised
  w = softmax over the correct of (1 − l/cap)/λ
  s = mean log π of the completion's tokens

https://arxiv.org/abs/2510.04474, Decoupled Reward Policy Optimization. A long
correct completion gets a smaller share, never a push down; the likeliest wrong
ones are pushed most. A group that is all correct or all wrong gives 0 and
stays in the denominator.

L is a loss over groups, but its gradient is a sum over completions,
Σ (∂L/∂s)·∇s, with weights that are constants of the outcomes for the correct
and softmax(s/τ) for the wrong. So the method is a `reward` whose advantages
are −G·∂L/∂s, and any cut into microbatches serves. With

  advantage.baseline='none', advantage.scale='none', loss.aggregate='sequence'

and one update a batch, the update's gradient is that of mean L over groups.

Defaults: λ = 0.1, τ = 10, the released code's; cap is the generation cap.

Departures:
  * s in the weights of the wrong comes from the sampler's log-probabilities:
    it is off by what `policy/sampler_kl` shows, divided by τ.
  * From a batch's second update on, s in those weights is the first's, and
    `loss.clip_low`, `loss.clip_high` hold the policy, where the code adds
    1e3·[KL − 1e-4]₊·KL, which is 0 in the first.
  * Tokens that were forced on the policy are left out of s.
  * A grade above ½ is correct.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Num, ScalarLike, Shaped

from lapo_jax import ops, types
from lapo_jax.rewards import _arrays


@jax.jit
def reward(
    correct: Shaped[Array, 'P G'],
    lengths: Num[Array, 'P G'],
    scores: Num[Array, 'P G'],
    *,
    cap: ScalarLike = 4096,
    length_scale: ScalarLike = 0.1,
    tau: ScalarLike = 10.0,
) -> Float[Array, 'P G']:
  """−G·∂L/∂s = G·w if correct, −G·softmax(s/τ) if wrong; float32 [P, G].

  https://arxiv.org/abs/2510.04474. 0 in a group that is not mixed.

  Args:
    correct: [P, G], grades in [0, 1]; bool, int or float.
    lengths: [P, G], tokens through the stop token.
    scores: [P, G], s in nats a token.
    cap: tokens at which a correct completion weighs exp(0).
    length_scale: λ, the smaller the steeper.
    tau: τ, the smaller the more the likeliest wrong one counts.

  Raises:
    ValueError: at trace time, other shapes or dtypes; both are named.
  """
  _arrays.check('P G', correct=correct, lengths=lengths, scores=scores)
  member, mixed = _members(correct)
  wins = _share((1.0 - lengths / cap) / length_scale, member)
  losses = _share(scores / tau, ~member)
  shares = jnp.where(member, wins, -losses)
  return jnp.where(mixed, correct.shape[-1] * shares, 0.0)


@jax.jit
def loss(
    scores: Float[Array, 'P G'],
    correct: Shaped[Array, 'P G'],
    lengths: Num[Array, 'P G'],
    *,
    cap: ScalarLike = 4096,
    length_scale: ScalarLike = 0.1,
    tau: ScalarLike = 10.0,
) -> Float[Array, 'P']:
  """L = −Σ w·s + τ·log mean exp(s/τ), float32 [P]; 0 unless mixed.

  https://arxiv.org/abs/2510.04474. Differentiable in the scores.

  Args:
    scores: [P, G], s in nats a token.
    correct: [P, G], grades in [0, 1]; bool, int or float.
    lengths: [P, G], tokens through the stop token.
    cap: as in `reward`.
    length_scale: λ.
    tau: τ.

  Raises:
    ValueError: at trace time, other shapes or dtypes; both are named.
  """
  _arrays.check('P G', correct=correct, lengths=lengths, scores=scores)
  member, mixed = _members(correct)
  wins = _share((1.0 - lengths / cap) / length_scale, member)
  count = jnp.maximum(jnp.sum(~member, axis=-1), 1)
  wrong = jax.nn.logsumexp(scores / tau, axis=-1, where=~member | ~mixed)
  total = tau * (wrong - jnp.log(count)) - jnp.sum(wins * scores, axis=-1)
  return jnp.where(mixed[..., 0], total, 0.0)


def make(cap: int = 4096, length_scale: float = 0.1,
         tau: float = 10.0) -> types.Reward:
  """The plug-in.

  Args:
    cap: the generation cap, tokens.
    length_scale: λ.
    tau: τ.
  """

  def apply(outcomes, state):
    member, _ = _members(outcomes.correct)
    total = reward(outcomes.correct, outcomes.lengths,
                   outcomes.extras['mean_logprob'], cap=cap,
                   length_scale=length_scale, tau=tau)
    return types.Rewards({'correct': jnp.where(member, total, 0.0),
                          'wrong': jnp.where(member, 0.0, total)}), state

  return types.Reward(apply, measure=_measure)


def _measure(rollout: types.Rollout, logprob_fn: types.LogprobFn,
             encode: types.EncodeFn) -> dict[str, jax.Array]:
  """s of the policy that sampled; float32 [B]."""
  del logprob_fn, encode
  return {'mean_logprob': ops.masked_mean(rollout.sampler_logprobs,
                                          rollout.action_mask)}


def _members(correct: Shaped[Array, 'P G']) -> tuple[Bool[Array, 'P G'],
                                                     Bool[Array, 'P 1']]:
  """Which are correct, and which groups hold both kinds."""
  member = correct.astype(jnp.float32) > 0.5
  mixed = jnp.any(member, axis=-1, keepdims=True) & ~jnp.all(
      member, axis=-1, keepdims=True)
  return member, mixed


def _share(values: Float[Array, 'P G'],
           member: Bool[Array, 'P G']) -> Float[Array, 'P G']:
  """Softmax among the members, 0 elsewhere and where there is none."""
  best = jnp.max(jnp.where(member, values, -jnp.inf), axis=-1, keepdims=True)
  best = jnp.where(jnp.isfinite(best), best, 0.0)
  weights = jnp.where(member, jnp.exp(jnp.where(member, values - best, 0.0)),
                      0.0)
  return weights / jnp.maximum(jnp.sum(weights, axis=-1, keepdims=True), 1e-30)
