# SPDX-License-Identifier: Apache-2.0
"""Losses per token, unreduced: [B, T], 0 on padding.

The loss of a batch is `sum(weights * per_token)` with `token_weights` of the
whole minibatch, made before it is cut: gradients of microbatches then simply
add, and nothing depends on padding or on the number of devices.

  per_token = importance_weights(…) · surrogate(…) + kl_coef · kl(…)

The published losses are points of one small space:

  loss       kind    clip_low, clip_high   aggregate   and
  GRPO       ppo     0.2, 0.2              sequence    k3
  DAPO       ppo     0.2, 0.28             token       drop_truncated
  Dr. GRPO   ppo     0.2, 0.2              constant    advantage.scale none
  RLOO       ppo     0.2, 0.2              constant    leave_one_out, scale none
  GSPO       gspo    3e-4, 4e-4            sequence
  CISPO      cispo   1.0, 4.0              token
  KL-Cov     ppo     none (1e9, 1e9)       token       kl_cov_share 0.0002

Choices where papers, or a paper and its code, differ:
  * KL-Cov's tokens are chosen by π_old and once an update, not by π in each
    microbatch, see `objective.most_covarying`.
  * CISPO clips the weight to [1 − ε_low, 1 + ε_high], as its formula and verl
    do; TRL's bound c without a lower one is ε_low = 1, ε_high = c − 1.
  * The dual clip's c and the two-sided clip's δ (INTELLECT-2, TRL's `delta`)
    are one rule where both are at least 1 + ε_high: `dual_clip`.
  * `kl` comes as it is; DeepSeek-V3.2 and TRL's default multiply it by
    `policy_ratios`, with their gradient: on-policy the same value, another
    gradient.
  * RLOO's ratio is one of the whole completion's probability, here it is one
    a token: on-policy the gradient is T times that of 'constant'. Its
    divergence inside the reward is left out.
  * A completion without a trained token leaves the denominator of 'sequence';
    TRL keeps it there, and truncated ones that it masks.

The penalty is added: the loss is minimised. Padding may hold anything, see
`ratios`; rows that pack several completions bring `segments`.
"""

import functools

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Num, ScalarLike

from lapo_jax import ratios

KINDS = ('ppo', 'gspo', 'cispo')
DIVERGENCES = ('k1', 'k2', 'k3')
AGGREGATES = ('sequence', 'token', 'constant')

policy_ratios = ratios.policy_ratios
importance_weights = ratios.importance_weights

# One per completion, or one per token where rows hold several completions.
_Advantages = Num[Array, 'B'] | Num[Array, 'B T']


@functools.partial(jax.jit, static_argnames=('kind',))
def surrogate(
    logprobs: Float[Array, 'B T'],
    old_logprobs: Float[Array, 'B T'],
    advantages: _Advantages,
    mask: Bool[Array, 'B T'],
    segments: Int[Array, 'B T'] | None = None,
    *,
    kind: str = 'ppo',
    clip_low: ScalarLike = 0.2,
    clip_high: ScalarLike = 0.2,
    dual_clip: ScalarLike = jnp.inf,
) -> Float[Array, 'B T']:
  """What stands in for −A · log π, to be minimised.

  ppo:    −min(w·A, clip(w, 1 − ε_low, 1 + ε_high)·A),  w = π / π_old
  gspo:   the same with one w for the completion, exp(mean log π / π_old)
  cispo:  −sg(clip(w, 1 − ε_low, 1 + ε_high)) · A · log π

  and where A < 0, min(w, c) instead of w: the loss of ppo and gspo is then at
  most −c·A. Of cispo the clip does that already.

  PPO: https://arxiv.org/abs/1707.06347, separate bounds (DAPO, 0.2 / 0.28):
  https://arxiv.org/abs/2503.14476, GSPO: https://arxiv.org/abs/2507.18071,
  CISPO: https://arxiv.org/abs/2506.13585, dual clip:
  https://arxiv.org/abs/1912.09729

  Args:
    logprobs: of the policy that is trained.
    old_logprobs: of the policy at the start of the step.
    advantages: one per completion, or one per token.
    mask: true on the tokens that are trained.
    segments: as in `policy_ratios`.
    kind: 'ppo' | 'gspo' | 'cispo'.
    clip_low: ε_low.
    clip_high: ε_high.
    dual_clip: c > 1; ∞ is none, 3 is usual.
  """
  ratio, advantages = _compared(logprobs, old_logprobs, advantages, mask,
                                segments, kind)
  if kind == 'cispo':
    weight = jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high)
    loss = (-jax.lax.stop_gradient(weight) * advantages *
            jnp.where(mask, logprobs, 0.0))
  else:
    ratio = jnp.where(advantages < 0, jnp.minimum(ratio, dual_clip), ratio)
    clipped = jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high)
    loss = -jnp.minimum(ratio * advantages, clipped * advantages)
  return jnp.where(mask, loss, 0.0)


@jax.jit
def clipped_surrogate(
    logprobs: Float[Array, 'B T'],
    old_logprobs: Float[Array, 'B T'],
    advantages: _Advantages,
    mask: Bool[Array, 'B T'],
    *,
    clip_low: ScalarLike = 0.2,
    clip_high: ScalarLike = 0.2,
) -> Float[Array, 'B T']:
  """PPO's pessimistic surrogate: `surrogate` of kind 'ppo'."""
  return surrogate(logprobs, old_logprobs, advantages, mask, kind='ppo',
                   clip_low=clip_low, clip_high=clip_high)


@functools.partial(jax.jit, static_argnames=('kind',))
def is_clipped(
    logprobs: Float[Array, 'B T'],
    old_logprobs: Float[Array, 'B T'],
    advantages: _Advantages,
    mask: Bool[Array, 'B T'],
    segments: Int[Array, 'B T'] | None = None,
    *,
    kind: str = 'ppo',
    clip_low: ScalarLike = 0.2,
    clip_high: ScalarLike = 0.2,
    dual_clip: ScalarLike = jnp.inf,
) -> Bool[Array, 'B T']:
  """True where a bound of `surrogate` acts; same arguments.

  ppo, gspo: it stops the gradient, (A > 0 and w > 1 + ε_high) or (A < 0 and
  (w < 1 − ε_low or w > c)). cispo: it cuts the weight, A ≠ 0 and w outside.
  """
  ratio, advantages = _compared(logprobs, old_logprobs, advantages, mask,
                                segments, kind)
  above, below = ratio > 1.0 + clip_high, ratio < 1.0 - clip_low
  if kind == 'cispo':
    return mask & (advantages != 0) & (above | below)
  return mask & (((advantages > 0) & above) |
                 ((advantages < 0) & (below | (ratio > dual_clip))))


@functools.partial(jax.jit, static_argnames=('kind',))
def kl(
    logprobs: Float[Array, 'B T'],
    ref_logprobs: Float[Array, 'B T'],
    mask: Bool[Array, 'B T'],
    *,
    kind: str = 'k3',
) -> Float[Array, 'B T']:
  """Estimate of KL(π ‖ π_ref) from the sampled tokens.

  k1 = −d,  k2 = d²/2,  k3 = exp(d) − d − 1,  d = log π_ref − log π

  k1 and k3 are unbiased, k2 and k3 never negative. The gradient is another
  matter: on-policy, on average, that of k2, of k1 · `policy_ratios` and of
  k3 · `policy_ratios` is the divergence's; that of k1 alone is 0, that of k3
  alone the one of KL(π_ref ‖ π).

  http://joschu.net/blog/kl-approx.html
  """
  _check('kind', kind, DIVERGENCES)
  log_ratio = ratios.log_ratio(ref_logprobs, logprobs, mask)
  if kind == 'k1':
    return -log_ratio
  if kind == 'k2':
    return 0.5 * log_ratio**2
  # Near 0, exp(d) − 1 loses the d²/2 that the estimate consists of.
  return jnp.expm1(log_ratio) - log_ratio


@jax.jit
def k3_kl(
    logprobs: Float[Array, 'B T'],
    ref_logprobs: Float[Array, 'B T'],
    mask: Bool[Array, 'B T'],
) -> Float[Array, 'B T']:
  """`kl` of kind 'k3', never negative."""
  return kl(logprobs, ref_logprobs, mask, kind='k3')


@functools.partial(jax.jit, static_argnames=('how',))
def token_weights(mask: Bool[Array, 'B T'], how: str = 'sequence',
                  keep: Bool[Array, 'B'] | None = None) -> Float[Array, 'B T']:
  """Share of each token in the loss; 0 on padding.

  'sequence' (GRPO): every completion with a token counts the same,
    mask / (tokens of the row · rows with a token).
  'token' (DAPO): every token counts the same, mask / Σ mask.
  'constant' (Dr. GRPO): mask / (B·T). Here T is the mask's: weigh before
    cropping to the longest completion, or the constant is none.

  The first two sum to 1, the last to the filled share; without any token all
  are 0. A completion that is left out leaves the denominator too, but for
  'constant', which would be none.

  Args:
    mask: true on the tokens that are trained.
    how: 'sequence' | 'token' | 'constant'.
    keep: completions that count, None = all; DAPO's overlong filter leaves
      the truncated out.
  """
  _check('how', how, AGGREGATES)
  chex.assert_rank(mask, 2, exception_type=ValueError)
  if keep is not None:
    chex.assert_shape(keep, mask.shape[:1], exception_type=ValueError)
    mask = mask & keep[:, None]
  if how == 'constant':
    return mask.astype(jnp.float32) / mask.size
  # Counted in integers: float32 cannot count past 2²⁴ tokens.
  per_row = jnp.sum(mask, axis=-1, keepdims=True, dtype=jnp.int32)
  if how == 'token':
    denominator = jnp.sum(per_row)
  else:
    denominator = per_row * jnp.sum(per_row > 0, dtype=jnp.int32)
  return mask / jnp.maximum(denominator, 1).astype(jnp.float32)


def _compared(
    logprobs: Float[Array, 'B T'], old_logprobs: Float[Array, 'B T'],
    advantages: _Advantages, mask: Bool[Array, 'B T'],
    segments: Int[Array, 'B T'] | None, kind: str,
) -> tuple[Float[Array, 'B T'], Num[Array, 'B _']]:
  """The ratio of the kind, and the advantages along the tokens.

  Left to broadcasting, [B] would run along the tokens where B == T.
  """
  _check('kind', kind, KINDS)
  if advantages.ndim == 2:
    chex.assert_equal_shape([advantages, mask], exception_type=ValueError)
  else:
    chex.assert_shape(advantages, logprobs.shape[:1], exception_type=ValueError)
    advantages = advantages[:, None]
  level = 'sequence' if kind == 'gspo' else 'token'
  ratio = policy_ratios(logprobs, old_logprobs, mask, segments, level=level)
  return ratio, advantages


def _check(what: str, got: str, legal: tuple[str, ...]):
  if got not in legal:
    raise ValueError(f'{what} is {got!r}: expected one of {legal}.')
