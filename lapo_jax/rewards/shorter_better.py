# SPDX-License-Identifier: Apache-2.0
"""ShorterBetter: pull each group towards its shortest correct completion.

  R = α·c − β·|l − SOL|

https://arxiv.org/abs/2504.21370. SOL, the sample optimal length in tokens, is
the least length of the group's correct completions; the mean length of the
group where none is correct.

Defaults: α = 2 and β = 1e-3 per token, the released code's.

Departures: a grade between 0 and 1 counts as correct above ½ and stays itself
where the formula says c. None else known.

Good to know:
  * Wrong completions are pulled as well: a wrong one of length SOL beats a
    correct one that is α/β = 2000 tokens longer.
  * β is per token: shorter tasks need a larger one.
  * In a group that is all correct, α cancels; divided by the group's sd, so
    does β.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num, ScalarLike, Shaped

from lapo_jax import ops, types
from lapo_jax.rewards import _arrays


@jax.jit
def reward(
    correct: Shaped[Array, 'P G'],
    lengths: Num[Array, 'P G'],
    *,
    alpha: ScalarLike = 2.0,
    beta: ScalarLike = 1e-3,
) -> Float[Array, 'P G']:
  """R = α·c − β·|l − SOL|, float32 [P, G].

  https://arxiv.org/abs/2504.21370. SOL is `optimal_lengths`.

  Args:
    correct: [P, G], grades in [0, 1]; bool, int or float.
    lengths: [P, G], tokens through the stop token.
    alpha: α, reward of a correct completion.
    beta: β, penalty per token of distance to SOL.

  Raises:
    ValueError: at trace time, other shapes or dtypes; both are named.
  """
  _arrays.check('P G', correct=correct, lengths=lengths)
  distance = jnp.abs(lengths - optimal_lengths(correct, lengths)[:, None])
  return alpha * correct.astype(jnp.float32) - beta * distance


@jax.jit
def optimal_lengths(correct: Shaped[Array, 'P G'],
                    lengths: Num[Array, 'P G']) -> Float[Array, 'P']:
  """SOL = min of l over the correct, of none the mean of all; float32 [P].

  https://arxiv.org/abs/2504.21370. In tokens.

  Args:
    correct: [P, G], grades in [0, 1]; bool, int or float.
    lengths: [P, G], tokens through the stop token.

  Raises:
    ValueError: at trace time, other shapes or dtypes; both are named.
  """
  _arrays.check('P G', correct=correct, lengths=lengths)
  lengths = lengths.astype(jnp.float32)
  member = correct.astype(jnp.float32) > 0.5
  shortest = jnp.min(jnp.where(member, lengths, jnp.inf), axis=-1)
  mean = ops.masked_mean(lengths, jnp.ones(lengths.shape, bool))
  return jnp.where(jnp.any(member, axis=-1), shortest, mean)


def make(alpha: float = 2.0, beta: float = 1e-3) -> types.Reward:
  """The plug-in.

  Args:
    alpha: reward of a correct completion.
    beta: penalty per token of distance to SOL.
  """

  def apply(outcomes, state):
    correct = alpha * outcomes.correct.astype(jnp.float32)
    total = reward(outcomes.correct, outcomes.lengths, alpha=alpha, beta=beta)
    return types.Rewards({'correct': correct,
                          'length': total - correct}), state

  return types.Reward(apply)
