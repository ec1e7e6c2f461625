# SPDX-License-Identifier: Apache-2.0
"""Training Language Models to Reason Efficiently (Arora and Zanette).

  R = c·(1 − α·sigmoid((l − μ) / (sd + ε)))

https://arxiv.org/abs/2502.04463. μ and sd, in tokens, are the mean and the
standard deviation (divided by n) of the group's correct completions. A wrong
completion gets 0, and so does one without a stop token. A correct one of mean
length gets 1 − α/2, as does a lone one and all of a group of one length.

Defaults: α = 0.1 and ε = 1e-7, the released code's.

Departures: a grade between 0 and 1 counts as correct above ½ and stays itself
where the formula says c. None else known.

Good to know: the authors train with leave-one-out advantages:
`advantage.baseline='leave_one_out'`, `advantage.scale='none'`.
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
    truncated: Bool[Array, 'P G'] | None = None,
    *,
    alpha: ScalarLike = 0.1,
    eps: ScalarLike = 1e-7,
) -> Float[Array, 'P G']:
  """R = c·(1 − α·sigmoid((l − μ)/(sd + ε))), float32 [P, G].

  https://arxiv.org/abs/2502.04463

  Args:
    correct: [P, G], grades in [0, 1]; bool, int or float.
    lengths: [P, G], tokens through the stop token.
    truncated: [P, G], true where no stop token came; R is 0 there, and they
      count for no statistic. None = nowhere.
    alpha: α, the largest share of the reward that length may cost.
    eps: ε, tokens.

  Raises:
    ValueError: at trace time, other shapes or dtypes; both are named.
  """
  _arrays.check('P G', correct=correct, lengths=lengths, truncated=truncated)
  correct = correct.astype(jnp.float32)
  if truncated is not None:
    correct = jnp.where(truncated, 0.0, correct)
  member = correct > 0.5
  mean = ops.masked_mean(lengths, member, keepdims=True)
  std = ops.masked_std(lengths, member, ddof=0, keepdims=True)
  # Where sd = 0 every correct length is the mean: 0/ε, not noise/ε.
  z = jnp.where(member & (std > 0), (lengths - mean) / (std + eps), 0.0)
  share = jnp.where(member, 1.0 - alpha * jax.nn.sigmoid(z), 1.0)
  return correct * share


def make(alpha: float = 0.1, eps: float = 1e-7) -> types.Reward:
  """The plug-in.

  Args:
    alpha: α, the largest share of the reward that length may cost.
    eps: ε, added to the standard deviation in tokens.
  """

  def apply(outcomes, state):
    total = reward(outcomes.correct, outcomes.lengths, outcomes.truncated,
                   alpha=alpha, eps=eps)
    return types.Rewards({'total': total}), state

  return types.Reward(apply)
