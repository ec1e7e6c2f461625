# SPDX-License-Identifier: Apache-2.0
"""Advantages: rewards compared within their group, [P, G] in and out.

  A_i = (r_i − baseline) / (sd + ε)

The published estimators are points of one small space:

  estimator           baseline        scale   decoupled   whiten
  GRPO                mean            group   no          none
  Dr. GRPO            mean            none    no          none
  RLOO                leave_one_out   none    no          none
  DLER                mean            batch   no          none
  GDPO (TRL)          mean            group   yes         completions
  GDPO (verl), LEAD   mean            group   yes         tokens, eps 1e-6

Choices where papers are silent or libraries differ:
  * sd divides by n − 1 and ε = 1e-4 is added to it, as in TRL.
  * A group without spread gives exactly 0, as does a group of one; eight
    rewards of 0.35 have a float32 sd of 3e-8, which ε alone would let through.
  * Where the sd is 0 nothing is divided: with baseline 'none' a group without
    spread keeps its rewards instead of being multiplied by 1/ε.
  * scale 'batch' keeps the group's baseline and divides by the sd over all
    kept rewards of the batch.
  * TRL's RLOO may normalise over the batch: whiten 'completions'.
  * What a group has to teach is asked of its correctness, never of a shaped
    reward: a length term makes every group look informative.
"""

import functools

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Num, ScalarLike, Shaped

from lapo_jax import ops, types

BASELINES = ('mean', 'leave_one_out', 'none')
SCALES = ('group', 'batch', 'none')
WHITENINGS = ('none', 'completions', 'tokens')


@functools.partial(jax.jit, static_argnames=('baseline', 'scale'))
def group_advantages(
    rewards: Shaped[Array, 'P G'],
    keep: Bool[Array, 'P G'] | None = None,
    *,
    baseline: str = 'mean',
    scale: str = 'group',
    eps: ScalarLike = 1e-4,
) -> Float[Array, 'P G']:
  """Each reward against the others of its group.

  A_i = (r_i − b_i) / (sd + ε),  b_i = mean_j r_j | mean_{j≠i} r_j | 0

  GRPO: https://arxiv.org/abs/2402.03300, Dr. GRPO:
  https://arxiv.org/abs/2503.20783, RLOO: https://arxiv.org/abs/2402.14740

  Args:
    rewards: one number per completion.
    keep: completions that count; the others are as if absent and get 0.
    baseline: 'mean' | 'leave_one_out' | 'none'.
    scale: whose sd divides: 'group' | 'batch' | 'none'.
    eps: added to the sd.
  """
  _check_choice('baseline', baseline, BASELINES)
  _check_choice('scale', scale, SCALES)
  chex.assert_rank(rewards, 2, exception_type=ValueError)
  keep = jnp.ones(rewards.shape, bool) if keep is None else keep
  chex.assert_equal_shape([rewards, keep], exception_type=ValueError)
  rewards = jnp.where(keep, rewards.astype(jnp.float32), 0.0)
  group_std = ops.masked_std(rewards, keep, keepdims=True)

  advantages = rewards
  if baseline != 'none':
    centred = rewards - ops.masked_mean(rewards, keep, keepdims=True)
    # The float32 mean of equal numbers need not be that number. NaN stays:
    # an update refuses it, zeros would train on nothing without a word.
    advantages = jnp.where((group_std > 0) | jnp.isnan(centred), centred, 0.0)
  if baseline == 'leave_one_out':
    # r_i − mean_{j≠i} r_j = (r_i − mean_j r_j)·n/(n − 1).
    count = jnp.sum(keep, axis=-1, keepdims=True, dtype=jnp.float32)
    advantages *= count / jnp.maximum(count - 1.0, 1.0)

  if scale != 'none':
    std = group_std
    if scale == 'batch':
      std = ops.masked_std(rewards.reshape(1, -1), keep.reshape(1, -1),
                           keepdims=True)
    advantages /= jnp.where(std > 0, std + eps, 1.0)
  return jnp.where(keep, advantages, 0.0)


@functools.partial(
    jax.jit, static_argnames=('baseline', 'scale', 'decoupled', 'whiten'))
def from_rewards(
    rewards: types.Rewards,
    lengths: Num[Array, 'P G'],
    *,
    baseline: str = 'mean',
    scale: str = 'group',
    decoupled: bool = False,
    whiten: str = 'none',
    eps: ScalarLike = 1e-4,
) -> Float[Array, 'P G']:
  """Advantages of a method's rewards, compared as a sum or term by term.

  plain:      A = group_advantages(Σ_k w_k r^k)
  decoupled:  A = Σ_k w_k group_advantages(r^k)
  whitened:   (A − mean) / sd over the batch

  GDPO: https://arxiv.org/abs/2601.05242

  Args:
    rewards: terms, weights and `keep` of the method.
    lengths: tokens of each completion; read by whiten 'tokens' only.
    baseline: as in `group_advantages`.
    scale: as in `group_advantages`.
    decoupled: normalise each term in its group before the weighted sum, so
      that a term's size no longer decides its influence.
    whiten: 'none'; 'completions' (TRL: sample sd + eps); 'tokens' (verl: each
      completion counts as often as it has tokens, √(variance + 1e-8)).
    eps: added to every sd but that of the tokens.
  """
  _check_choice('whiten', whiten, WHITENINGS)
  total = rewards.total
  chex.assert_equal_shape([total, lengths], exception_type=ValueError)
  compare = functools.partial(group_advantages, keep=rewards.keep,
                              baseline=baseline, scale=scale, eps=eps)
  if decoupled:
    terms = {name: compare(term) for name, term in rewards.terms.items()}
    advantages = rewards.replace(terms=terms).total
  else:
    advantages = compare(total)

  keep = rewards.keep
  if keep is None:
    keep = jnp.ones(advantages.shape, bool)
  if whiten == 'completions':
    # The same normalisation, with the batch as the one group.
    advantages = group_advantages(
        advantages.reshape(1, -1), keep.reshape(1, -1), eps=eps,
    ).reshape(advantages.shape)
  elif whiten == 'tokens':
    advantages = _whiten_tokens(advantages, lengths, keep)
  return advantages


@jax.jit
def informative(
    correct: Shaped[Array, 'P G'],
    keep: Bool[Array, 'P G'] | None = None,
) -> Bool[Array, 'P']:
  """Groups whose correctness varies; DAPO's dynamic sampling draws others.

  max_i c_i > min_i c_i,  over the kept completions

  https://arxiv.org/abs/2503.14476

  Args:
    correct: the task's grades, unshaped.
    keep: completions that count, None = all.
  """
  chex.assert_rank(correct, 2, exception_type=ValueError)
  keep = jnp.ones(correct.shape, bool) if keep is None else keep
  chex.assert_equal_shape([correct, keep], exception_type=ValueError)
  correct = correct.astype(jnp.float32)
  return (jnp.max(jnp.where(keep, correct, -jnp.inf), axis=-1) >
          jnp.min(jnp.where(keep, correct, jnp.inf), axis=-1))


@jax.jit
def refill(kept: Bool[Array, 'P'], found: Bool[Array, 'P']) -> Int[Array, 'P']:
  """Which group each place of the batch takes after another round of P.

  Place p keeps its own, p, if that is informative; the others take the
  informative ones of the round, P + q, in their order, while there are any.

  Args:
    kept: `informative` of the batch so far.
    found: `informative` of the round.

  Returns:
    Indices into the 2·P groups of both.
  """
  chex.assert_equal_shape([kept, found], exception_type=ValueError)
  turn = jnp.cumsum(~kept, dtype=jnp.int32) - 1
  order = jnp.argsort(~found, stable=True).astype(jnp.int32)
  own = jnp.arange(kept.shape[0], dtype=jnp.int32)
  takes = ~kept & (turn < jnp.sum(found, dtype=jnp.int32))
  return jnp.where(takes, kept.shape[0] + order[turn], own)


def _whiten_tokens(advantages: Float[Array, 'P G'],
                   lengths: Num[Array, 'P G'],
                   keep: Bool[Array, 'P G']) -> Float[Array, 'P G']:
  """Whitens as if each completion's advantage stood on all of its tokens.

  mean = Σ l·A / Σ l,  variance = Σ l·(A − mean)² / (Σ l − 1)
  """
  counts = jnp.where(keep, lengths, 0).astype(jnp.float32)
  total = jnp.sum(counts)
  mean = jnp.sum(counts * advantages) / jnp.maximum(total, 1.0)
  centred = advantages - mean
  variance = jnp.sum(counts * centred**2) / jnp.maximum(total - 1.0, 1.0)
  return jnp.where(keep, centred / jnp.sqrt(variance + 1e-8), 0.0)


def _check_choice(what: str, got: str, legal: tuple[str, ...]):
  if got not in legal:
    raise ValueError(f'{what} is {got!r}: expected one of {legal}.')
