# SPDX-License-Identifier: Apache-2.0
"""What the update minimises, per token, from the settings of `config.loss`.

  per_token = v·surrogate(ρ, A) + β·kl [·ρ]

ρ is π / π_old and v what `ratios.importance_weights` gives a token; see
`losses` for which settings are which paper. Rows may be packed.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from lapo_jax import losses, ratios, types


def make_objective_fn(
    *, kind: str = 'ppo', clip_low: float = 0.2, clip_high: float = 0.2,
    dual_clip: float = 0.0, kl_coef: float = 0.0, kl: str = 'k3',
    kl_ratio: bool = False, importance_cap: float = 0.0,
    importance_floor: float = 0.0, importance_level: str = 'token',
    importance_outside: str = 'truncate') -> Callable:
  """A function `(log-probs [B, T], Batch) -> (per token [B, T], found)`.

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

  Returns:
    The function; pure, and 0 on padding. `found` holds [B, T] by the name of
    its metric: policy/clip_fraction, where a bound acts, and policy/kl, the
    divergence without ρ. The batch's old log-probs may be None: then they are
    the given ones.

  Raises:
    ValueError: an unknown word, when the function is traced.
  """
  bounds = {'kind': kind, 'clip_low': clip_low, 'clip_high': clip_high,
            'dual_clip': dual_clip or jnp.inf}
  level = 'sequence' if kind == 'gspo' else 'token'

  def objective(logprobs: jax.Array, batch: types.Batch):
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
    return per_token, {
        'policy/clip_fraction': losses.is_clipped(
            *policies, batch.advantages, mask, segments, **bounds),
        'policy/kl': divergence}

  return objective
