# SPDX-License-Identifier: Apache-2.0
"""Ratios of two policies on the sampled tokens: [B, T], given log-probs.

Padding may hold anything. It is replaced *before* the exponential, since a
derivative through `where` alone is 0 · ∞ = NaN. Rows that pack several
completions bring `segments`.
"""

import functools

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, ScalarLike

LEVELS = ('token', 'sequence')
OUTSIDE = ('truncate', 'mask')


@functools.partial(jax.jit, static_argnames=('level',))
def policy_ratios(
    logprobs: Float[Array, 'B T'],
    old_logprobs: Float[Array, 'B T'],
    mask: Bool[Array, 'B T'],
    segments: Int[Array, 'B T'] | None = None,
    *,
    level: str = 'token',
) -> Float[Array, 'B T']:
  """π / π_old, with its gradient.

  token:     w = exp(d),  d = log π − log π_old;  1 on padding
  sequence:  w = exp(mean of d over the completion), on each of its slots

  Args:
    logprobs: of the policy that is trained.
    old_logprobs: of the policy at the start of the step.
    mask: true on the tokens that are trained.
    segments: which completion of its row a token belongs to, 1 … T; 0 … T on
      padding. None = a row is one completion.
    level: 'token' | 'sequence'.
  """
  _check('level', level, LEVELS)
  ratio = log_ratio(logprobs, old_logprobs, mask)
  if level == 'sequence':
    count = _of_completion(mask.astype(jnp.float32), segments)
    ratio = _of_completion(ratio, segments) / jnp.maximum(count, 1.0)
  return jnp.exp(ratio)


@functools.partial(jax.jit, static_argnames=('level', 'outside'))
def importance_weights(
    old_logprobs: Float[Array, 'B T'],
    sampler_logprobs: Float[Array, 'B T'],
    mask: Bool[Array, 'B T'],
    segments: Int[Array, 'B T'] | None = None,
    *,
    cap: ScalarLike = jnp.inf,
    floor: ScalarLike = 0.0,
    level: str = 'token',
    outside: str = 'truncate',
) -> Float[Array, 'B T']:
  """Importance sampling: makes up for the sampler's own numerics.

  token:     v = π_old / π_sampler of the token
  sequence:  v = Π π_old / π_sampler of the completion, on each of its tokens
  truncate:  min(max(v, floor), cap);  mask: v if floor ≤ v ≤ cap, else 0

  and 0 on padding. π_old and π_sampler are one policy, computed by the trainer
  and by the sampler. v multiplies the surrogate of a token as a constant, no
  gradient passes; the divergence is added after it, unweighted, as TRL 1.16
  does.

  https://fengyao.notion.site/off-policy-rl (Yao et al., 2025)

  Args:
    old_logprobs: of the policy at the start of the step, by the trainer.
    sampler_logprobs: of the same policy, as sampled.
    mask: true on the tokens that are trained.
    segments: as in `policy_ratios`.
    cap: C, bounds the variance; ∞ truncates nothing.
    floor: the bound below.
    level: 'token' | 'sequence'.
    outside: what becomes of v out of bounds: 'truncate' | 'mask'.
  """
  _check('level', level, LEVELS)
  _check('outside', outside, OUTSIDE)
  ratio = log_ratio(old_logprobs, sampler_logprobs, mask)
  if level == 'sequence':
    ratio = _of_completion(ratio, segments)
  ratio = jnp.exp(ratio)
  if outside == 'mask':
    weights = jnp.where((ratio >= floor) & (ratio <= cap), ratio, 0.0)
  else:
    weights = jnp.clip(ratio, floor, cap)
  return jax.lax.stop_gradient(jnp.where(mask, weights, 0.0))


def log_ratio(logprobs: Float[Array, 'B T'], other: Float[Array, 'B T'],
              mask: Bool[Array, 'B T']) -> Float[Array, 'B T']:
  """logprobs − other, with 0 in the place of whatever padding holds."""
  chex.assert_rank(logprobs, 2, exception_type=ValueError)
  chex.assert_equal_shape([logprobs, other, mask], exception_type=ValueError)
  return jnp.where(mask, logprobs, 0.0) - jnp.where(mask, other, 0.0)


def _of_completion(
    values: Float[Array, 'B T'], segments: Int[Array, 'B T'] | None,
) -> Float[Array, 'B T']:
  """The sum over its completion, on each slot; values are 0 on padding."""
  if segments is None:
    total = jnp.sum(values, axis=-1, keepdims=True)
    return jnp.broadcast_to(total, values.shape)
  chex.assert_equal_shape([values, segments], exception_type=ValueError)
  total = functools.partial(jax.ops.segment_sum,
                            num_segments=values.shape[1] + 1)
  return jax.vmap(lambda row, of: total(row, of)[of])(values, segments)


def _check(what: str, got: str, legal: tuple[str, ...]):
  if got not in legal:
    raise ValueError(f'{what} is {got!r}: expected one of {legal}.')
