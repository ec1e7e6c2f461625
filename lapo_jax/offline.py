# SPDX-License-Identifier: Apache-2.0
"""Weights of completions that were sampled before, by the policy as it was.

O1-Pruner, length-harmonising fine-tuning: each problem's K completions of the
reference policy tell how long and how right it is there; every completion is
weighed against that, and the weight is learned without sampling again.

  W = clip((mean l − l) / l + a·(c − mean c), low, high)
  W ← (W − mean W) / sd W        over the whole data, sd divided by n

https://arxiv.org/abs/2501.12570. W is an advantage. The released code learns
it by a clipped surrogate with one ratio a completion, exp(mean log π / π_ref):

  per_token = losses.surrogate(logprobs, ref_logprobs, W, mask, kind='gspo')
  loss = sum(losses.token_weights(mask, 'sequence') * per_token)

Choices where the paper and its code differ:
  * low = −2, high = 4 and standardising are the code's (the default); the
    paper's formula is low = −∞, high = ∞, standardise = False.
  * The code keeps two completions a problem, drawn at random, after the means
    are taken over all K = 16: `keep`.
  * a must be given in the code; 2 is ours.

Without a correct completion the length still ranks. Without spread in the
whole data every weight is 0; the code divides by 0.
"""

import functools

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Num, ScalarLike, Shaped

from lapo_jax import ops


@functools.partial(jax.jit, static_argnames=('standardise',))
def o1_pruner(
    correct: Shaped[Array, 'P G'],
    lengths: Num[Array, 'P G'],
    keep: Bool[Array, 'P G'] | None = None,
    *,
    accuracy: ScalarLike = 2.0,
    low: ScalarLike = -2.0,
    high: ScalarLike = 4.0,
    standardise: bool = True,
) -> Float[Array, 'P G']:
  """W of every completion; see the module docstring.

  Args:
    correct: grades of all completions of the reference policy.
    lengths: their tokens, at least 1.
    keep: those that are learned, None = all; the others get 0.
    accuracy: a.
    low: bound below.
    high: bound above.
    standardise: whether the kept weights of all problems get mean 0, sd 1.
  """
  chex.assert_rank(correct, 2, exception_type=ValueError)
  keep = jnp.ones(correct.shape, bool) if keep is None else keep
  chex.assert_equal_shape([correct, lengths, keep], exception_type=ValueError)
  correct, lengths = (x.astype(jnp.float32) for x in (correct, lengths))
  reference = lambda x: jnp.mean(x, axis=-1, keepdims=True)
  shorter = (reference(lengths) - lengths) / jnp.maximum(lengths, 1.0)
  weights = jnp.clip(shorter + accuracy * (correct - reference(correct)),
                     low, high)
  if standardise:
    flat, kept = weights.reshape(1, -1), keep.reshape(1, -1)
    std = ops.masked_std(flat, kept, ddof=0, keepdims=True)
    centred = weights - ops.masked_mean(flat, kept, keepdims=True)
    weights = jnp.where(std > 0, centred / jnp.where(std > 0, std, 1.0), 0.0)
  return jnp.where(keep, weights, 0.0)
