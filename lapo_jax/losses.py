# SPDX-License-Identifier: Apache-2.0
"""Losses per token, unreduced: [B, T], 0 on padding.

The loss of a batch is `sum(weights * per_token)` with `token_weights` of the
whole minibatch, made before it is cut: gradients of microbatches then simply
add, and nothing depends on padding or on the number of devices.

  per_token = importance_weights(…) · clipped_surrogate(…) + kl_coef · k3_kl(…)

The penalty is added: the loss is minimised. Padding may hold anything. It is
replaced *before* the exponential, since a derivative through `where` alone is
0 · ∞ = NaN.
"""

import functools

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Num, ScalarLike

AGGREGATES = ('sequence', 'token', 'constant')


@jax.jit
def clipped_surrogate(
    logprobs: Float[Array, 'B T'],
    old_logprobs: Float[Array, 'B T'],
    advantages: Num[Array, 'B'],
    mask: Bool[Array, 'B T'],
    *,
    clip_low: ScalarLike = 0.2,
    clip_high: ScalarLike = 0.2,
) -> Float[Array, 'B T']:
  """PPO's pessimistic surrogate, to be minimised.

  Lₜ = −min(wₜ·A, clip(wₜ, 1 − ε_low, 1 + ε_high)·A),  wₜ = πₜ / π_oldₜ

  PPO: https://arxiv.org/abs/1707.06347, separate bounds (DAPO, 0.2 / 0.28):
  https://arxiv.org/abs/2503.14476

  Args:
    logprobs: of the policy that is trained.
    old_logprobs: of the policy at the start of the step.
    advantages: one per completion.
    mask: true on the tokens that are trained.
    clip_low: ε_low.
    clip_high: ε_high.
  """
  ratio, advantages = _ratio(logprobs, old_logprobs, advantages, mask)
  clipped = jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high)
  loss = -jnp.minimum(ratio * advantages, clipped * advantages)
  return jnp.where(mask, loss, 0.0)


@jax.jit
def is_clipped(
    logprobs: Float[Array, 'B T'],
    old_logprobs: Float[Array, 'B T'],
    advantages: Num[Array, 'B'],
    mask: Bool[Array, 'B T'],
    *,
    clip_low: ScalarLike = 0.2,
    clip_high: ScalarLike = 0.2,
) -> Bool[Array, 'B T']:
  """True where the clip stops the gradient of `clipped_surrogate`.

  (A > 0 and w > 1 + ε_high) or (A < 0 and w < 1 − ε_low); same arguments.
  """
  ratio, advantages = _ratio(logprobs, old_logprobs, advantages, mask)
  above = (advantages > 0) & (ratio > 1.0 + clip_high)
  below = (advantages < 0) & (ratio < 1.0 - clip_low)
  return mask & (above | below)


@jax.jit
def importance_weights(
    old_logprobs: Float[Array, 'B T'],
    sampler_logprobs: Float[Array, 'B T'],
    mask: Bool[Array, 'B T'],
    *,
    cap: ScalarLike = jnp.inf,
) -> Float[Array, 'B T']:
  """Truncated importance sampling: makes up for the sampler's own numerics.

  vₜ = min(π_oldₜ / π_samplerₜ, cap),   0 on padding

  π_old and π_sampler are one policy, computed by the trainer and by the
  sampler. vₜ multiplies the surrogate of a token as a constant, no gradient
  passes; the penalty `k3_kl` is added after it, unweighted, as TRL 1.16 does.

  https://fengyao.notion.site/off-policy-rl (Yao et al., 2025)

  Args:
    old_logprobs: of the policy at the start of the step, by the trainer.
    sampler_logprobs: of the same policy, as sampled.
    mask: true on the tokens that are trained.
    cap: C, bounds the variance; ∞ truncates nothing.
  """
  ratio = jnp.exp(_log_ratio(old_logprobs, sampler_logprobs, mask))
  weights = jnp.where(mask, jnp.minimum(ratio, cap), 0.0)
  return jax.lax.stop_gradient(weights)


@jax.jit
def k3_kl(
    logprobs: Float[Array, 'B T'],
    ref_logprobs: Float[Array, 'B T'],
    mask: Bool[Array, 'B T'],
) -> Float[Array, 'B T']:
  """Estimate of KL(π ‖ π_ref) from the sampled tokens, never negative.

  k3 = exp(d) − d − 1,  d = log π_ref − log π

  http://joschu.net/blog/kl-approx.html
  """
  log_ratio = _log_ratio(ref_logprobs, logprobs, mask)
  # Near 0, exp(d) − 1 loses the d²/2 that the estimate consists of.
  return jnp.expm1(log_ratio) - log_ratio


@functools.partial(jax.jit, static_argnames=('how',))
def token_weights(mask: Bool[Array, 'B T'],
                  how: str = 'sequence') -> Float[Array, 'B T']:
  """Share of each token in the loss; 0 on padding.

  'sequence' (GRPO): every completion with a token counts the same,
    mask / (tokens of the row · rows with a token).
  'token' (DAPO): every token counts the same, mask / Σ mask.
  'constant' (Dr. GRPO): mask / (B·T). Here T is the mask's: weigh before
    cropping to the longest completion, or the constant is none.

  The first two sum to 1, the last to the filled share; without any token all
  are 0. Give the mask of *trained* tokens: a completion that is left out
  leaves the denominator too.
  """
  if how not in AGGREGATES:
    raise ValueError(f'how is {how!r}: expected one of {AGGREGATES}.')
  chex.assert_rank(mask, 2, exception_type=ValueError)
  if how == 'constant':
    return mask.astype(jnp.float32) / mask.size
  # Counted in integers: float32 cannot count past 2²⁴ tokens.
  per_row = jnp.sum(mask, axis=-1, keepdims=True, dtype=jnp.int32)
  if how == 'token':
    denominator = jnp.sum(per_row)
  else:
    denominator = per_row * jnp.sum(per_row > 0, dtype=jnp.int32)
  return mask / jnp.maximum(denominator, 1).astype(jnp.float32)


def _log_ratio(logprobs: Float[Array, 'B T'], other: Float[Array, 'B T'],
               mask: Bool[Array, 'B T']) -> Float[Array, 'B T']:
  """logprobs − other, with 0 in the place of whatever padding holds."""
  chex.assert_rank(logprobs, 2, exception_type=ValueError)
  chex.assert_equal_shape([logprobs, other, mask], exception_type=ValueError)
  return jnp.where(mask, logprobs, 0.0) - jnp.where(mask, other, 0.0)


def _ratio(
    logprobs: Float[Array, 'B T'], old_logprobs: Float[Array, 'B T'],
    advantages: Num[Array, 'B'], mask: Bool[Array, 'B T'],
) -> tuple[Float[Array, 'B T'], Num[Array, 'B 1']]:
  """w = π / π_old, and the advantages along the tokens.

  Left to broadcasting, [B] would run along the tokens where B == T.
  """
  chex.assert_shape(advantages, logprobs.shape[:1], exception_type=ValueError)
  ratio = jnp.exp(_log_ratio(logprobs, old_logprobs, mask))
  return ratio, advantages[:, None]
