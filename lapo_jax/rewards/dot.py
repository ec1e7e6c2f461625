# SPDX-License-Identifier: Apache-2.0
"""DOT: cut the outliers of a group that is all correct, and grade them again.

  R = c
  T = int(mean l + α·sd l)                  of a group that is all correct
  l − T ≥ slack: cut to T tokens, graded again, trained on these T alone

https://arxiv.org/abs/2601.03969, by its released code. Lengths are in tokens,
the sd is the sample's. A completion that is cut before its answer is wrong
now, so the group compares again: the others gain, its first T tokens lose.

The order is cut, grade again, then whatever filters groups, then advantages:
the loop does so for a method that has `trim`.

Defaults: α = 3, slack = 32 tokens, with `rollout.group_size` 32. The largest
z-score in a group of G is (G − 1)/√G: with α = 3 nothing is ever cut up to
G = 10, and that is refused.

Departures:
  * The optimiser is the config's; the code's KL-Cov loss is the key
    `loss.kl_cov_share`.
  * What is cut does not count as truncated: its grade decides.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num, ScalarLike, Shaped

from lapo_jax import ops, types
from lapo_jax.rewards import _arrays


@jax.jit
def reward(correct: Shaped[Array, 'P G'],
           lengths: Num[Array, 'P G']) -> Float[Array, 'P G']:
  """R = c, float32 [P, G], of the grades after the cut.

  https://arxiv.org/abs/2601.03969

  Args:
    correct: [P, G], grades in [0, 1]; bool, int or float.
    lengths: [P, G], tokens through the stop token, or of what was kept.

  Raises:
    ValueError: at trace time, other shapes or dtypes; both are named.
  """
  _arrays.check('P G', correct=correct, lengths=lengths)
  return correct.astype(jnp.float32)


@jax.jit
def kept_lengths(
    correct: Shaped[Array, 'P G'],
    lengths: Num[Array, 'P G'],
    *,
    alpha: ScalarLike = 3.0,
    slack: ScalarLike = 32,
) -> Int[Array, 'P G']:
  """Tokens to keep: T where l − T ≥ slack and the group is all correct, else l.

  https://arxiv.org/abs/2601.03969

  Args:
    correct: [P, G], grades in [0, 1], right above ½; bool, int or float.
    lengths: [P, G], tokens through the stop token.
    alpha: α, how many sd beyond the mean a completion may be.
    slack: tokens beyond T that are left to it, less one.

  Raises:
    ValueError: at trace time, other shapes or dtypes; both are named.
  """
  _arrays.check('P G', correct=correct, lengths=lengths)
  everyone = jnp.ones(lengths.shape, bool)
  limit = (ops.masked_mean(lengths, everyone, keepdims=True) +
           alpha * ops.masked_std(lengths, everyone, keepdims=True))
  limit = jnp.floor(limit).astype(jnp.int32)
  solved = jnp.all(correct.astype(jnp.float32) > 0.5, axis=-1, keepdims=True)
  lengths = lengths.astype(jnp.int32)
  return jnp.where(solved & (lengths - limit >= slack), limit, lengths)


def make(alpha: float = 3.0, slack: int = 32) -> types.Reward:
  """The plug-in.

  Args:
    alpha: α, how many sd beyond the mean a completion may be.
    slack: tokens beyond T that are left to it, less one.
  """
  if slack < 1:
    raise ValueError(f'dot: slack is {slack}, expected at least 1 token.')

  def trim(outcomes):
    group_size = outcomes.lengths.shape[-1]
    most = (group_size - 1) / group_size**0.5
    if most <= alpha:
      raise ValueError(
          f'dot: in a group of {group_size} no completion is more than '
          f'{most:.2f} sd beyond the mean, and alpha is {alpha}: expected a '
          'smaller alpha or a larger rollout.group_size.')
    return kept_lengths(outcomes.correct, outcomes.lengths, alpha=alpha,
                        slack=slack)

  def apply(outcomes, state):
    return types.Rewards(
        {'correct': reward(outcomes.correct, outcomes.lengths)}), state

  return types.Reward(apply, trim=trim)
