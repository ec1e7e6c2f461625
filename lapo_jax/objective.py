# SPDX-License-Identifier: Apache-2.0
"""What the update minimises, per token, from the settings of `config.loss`.

  per_token = v·surrogate(ρ, A) + β·kl [·ρ] [+ κ·|log ρ| on a few tokens]

ρ is π / π_old and v what `ratios.importance_weights` gives a token; see
`losses` for which settings are which paper. Rows may be packed. The few tokens
are those of KL-Cov (arXiv:2505.22617), see `most_covarying`.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from lapo_jax import losses, ratios, types


class Covarying(NamedTuple):
  """Which tokens covary most with their advantage; float32 [] each.

  Attributes:
    advantage: the mean over an update's tokens.
    logprob: that of log π_old.
    least: (A − mean A)·(log π_old − mean log π_old) of the last one of them.
  """

  advantage: jax.Array
  logprob: jax.Array
  least: jax.Array

  def products(self, batch: types.Batch) -> Float[Array, 'B T']:
    """(A − mean A)·(log π_old − mean log π_old), −∞ on what is not trained."""
    return jnp.where(
        batch.rollout.action_mask, (_along(batch) - self.advantage) *
        (batch.old_logprobs - self.logprob), -jnp.inf)

  def among(self, batch: types.Batch) -> Bool[Array, 'B T']:
    """Whether a token is one of them; the batch has its old log-probs."""
    return batch.rollout.action_mask & (self.products(batch) >= self.least)


def most_covarying(parts: Sequence[types.Batch], share: float) -> Covarying:
  """The `share` of an update's tokens that covary most, one at least.

  https://arxiv.org/abs/2505.22617, KL-Cov. Chosen once for the whole update,
  so that its microbatches cannot matter.

  Args:
    parts: the microbatches, [B, T] each, with their old log-probs.
    share: in [0, 1], of the tokens with an action mask.

  Returns:
    What `make_objective_fn`'s function asks each token with; tokens as good as
    the last one chosen are chosen too.
  """
  masks = [part.rollout.action_mask for part in parts]
  count = sum(jnp.sum(mask, dtype=jnp.int32) for mask in masks)
  mean = lambda values: sum(
      jnp.sum(jnp.where(mask, x, 0.0))
      for mask, x in zip(masks, values, strict=True)) / jnp.maximum(count, 1)
  found = Covarying(mean([_along(part) for part in parts]),
                    mean([part.old_logprobs for part in parts]), jnp.float32(0))
  ranked = jnp.sort(jnp.concatenate(
      [found.products(part).ravel() for part in parts]))
  number = jnp.maximum((share * count).astype(jnp.int32), 1)
  return found._replace(least=ranked[ranked.size - number])


def make_objective_fn(
    *, kind: str = 'ppo', clip_low: float = 0.2, clip_high: float = 0.2,
    dual_clip: float = 0.0, kl_coef: float = 0.0, kl: str = 'k3',
    kl_ratio: bool = False, importance_cap: float = 0.0,
    importance_floor: float = 0.0, importance_level: str = 'token',
    importance_outside: str = 'truncate', kl_cov_share: float = 0.0,
    kl_cov_coef: float = 1.0) -> Callable:
  """A function `(log-probs [B, T], Batch, covarying) -> (per token, found)`.

  Args:
    kind: of `losses.surrogate`.
    clip_low: ε₋, the ratio is clipped below at 1 − ε₋.
    clip_high: ε₊, and above at 1 + ε₊.
    dual_clip: c, bounds the loss of a negative advantage; 0 = no such bound.
    kl_coef: β, weight of the divergence from the reference policy; 0 = none.
    kl: its estimate, of `losses.kl`.
    kl_ratio: whether it is multiplied by ρ, with ρ's gradient.
    importance_cap: of `ratios.importance_weights`; 0 = no such weights.
    importance_floor: likewise.
    importance_level: likewise.
    importance_outside: likewise.
    kl_cov_share: of the tokens, those that `most_covarying` finds and that pay
      for moving; 0 = none.
    kl_cov_coef: κ, what they pay: κ·|log ρ|.

  Returns:
    The function; pure, and 0 on padding. `found` holds [B, T] by the name of
    its metric: policy/clip_fraction, where a bound acts, and policy/kl, the
    divergence without ρ. The batch's old log-probs may be None: then they are
    the given ones. `covarying` is of `most_covarying` over all that the update
    sees; None, and no token pays.

  Raises:
    ValueError: an unknown word, when the function is traced.
  """
  bounds = {'kind': kind, 'clip_low': clip_low, 'clip_high': clip_high,
            'dual_clip': dual_clip or jnp.inf}
  level = 'sequence' if kind == 'gspo' else 'token'

  def objective(logprobs: jax.Array, batch: types.Batch,
                covarying: Covarying | None = None):
    rollout, mask = batch.rollout, batch.rollout.action_mask
    old_logprobs = batch.old_logprobs
    if old_logprobs is None:
      old_logprobs = jax.lax.stop_gradient(logprobs)
    segments = rollout.segments
    if segments is not None:
      segments = segments[:, rollout.prompt_tokens.shape[1]:]
    policies = (logprobs, old_logprobs)

    per_token = losses.surrogate(*policies, batch.advantages, mask, segments,
                                 **bounds)
    if importance_cap:
      # Against the policy that sampled, whatever was learned since.
      per_token = per_token * ratios.importance_weights(
          old_logprobs, rollout.sampler_logprobs, mask, segments,
          cap=importance_cap, floor=importance_floor, level=importance_level,
          outside=importance_outside)
    divergence = jnp.zeros_like(per_token)
    if kl_coef:
      divergence = losses.kl(logprobs, batch.ref_logprobs, mask, kind=kl)
      penalty = divergence
      if kl_ratio:
        penalty = penalty * ratios.policy_ratios(*policies, mask, segments,
                                                 level=level)
      per_token = per_token + kl_coef * penalty
    # Without old log-probs nothing has moved, and |log ρ| has no slope.
    if kl_cov_share and covarying is not None:
      per_token = per_token + kl_cov_coef * jnp.where(
          covarying.among(batch), jnp.abs(logprobs - old_logprobs), 0.0)
    return per_token, {
        'policy/clip_fraction': losses.is_clipped(
            *policies, batch.advantages, mask, segments, **bounds),
        'policy/kl': divergence}

  return objective


def _along(batch: types.Batch) -> Float[Array, 'B T']:
  """The advantages along the tokens."""
  shape = batch.rollout.action_mask.shape
  advantages = batch.advantages
  return jnp.broadcast_to(
      advantages if advantages.ndim == 2 else advantages[:, None], shape)
