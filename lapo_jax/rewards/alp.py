# SPDX-License-Identifier: Apache-2.0
"""ALP: length costs in proportion to how often the problem is solved.

  R = c − β·l·max(p, 1/K)

https://arxiv.org/abs/2506.05256, Adaptive Length Penalty (Just Enough
Thinking). p is the solve rate among the K completions of the group, l their
length in tokens. A group without a correct completion still pays 1/K.

Defaults: β = 1e-7 per token, from a summary of the paper, whose β stands over
a normalising constant; that is part of this β.

Departures: a grade between 0 and 1 counts as solved above ½ and stays itself
where the formula says c. None else known.

Good to know: β is tiny. In a mixed group the term is lost beside c, whose sd
divides it. Where c is constant only the order of lengths is left, and the sd is
about as large as the advantage's own ε of 1e-4, which damps it: lower
`advantage.eps` if it should count in full.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num, ScalarLike, Shaped

from lapo_jax import types
from lapo_jax.rewards import _arrays


@jax.jit
def reward(
    correct: Shaped[Array, 'P G'],
    lengths: Num[Array, 'P G'],
    *,
    beta: ScalarLike = 1e-7,
) -> Float[Array, 'P G']:
  """R = c − β·l·max(p, 1/K), right or wrong; float32 [P, G].

  https://arxiv.org/abs/2506.05256

  Args:
    correct: [P, G], grades in [0, 1]; bool, int or float.
    lengths: [P, G], tokens through the stop token.
    beta: β, penalty per token of a problem that is always solved.

  Raises:
    ValueError: at trace time, other shapes or dtypes; both are named.
  """
  penalty = beta * cost(correct, lengths)
  return correct.astype(jnp.float32) - penalty


@jax.jit
def cost(correct: Shaped[Array, 'P G'],
         lengths: Num[Array, 'P G']) -> Float[Array, 'P G']:
  """l·max(p, 1/K), tokens, float32 [P, G]; p is the solve rate of K = G.

  https://arxiv.org/abs/2506.05256

  Args:
    correct: [P, G], grades in [0, 1]; bool, int or float.
    lengths: [P, G], tokens through the stop token.

  Raises:
    ValueError: at trace time, other shapes or dtypes; both are named.
  """
  _arrays.check('P G', correct=correct, lengths=lengths)
  solved = jnp.mean(correct.astype(jnp.float32) > 0.5, axis=-1, keepdims=True)
  return lengths * jnp.maximum(solved, 1.0 / correct.shape[-1])


def make(beta: float = 1e-7) -> types.Reward:
  """The plug-in.

  Args:
    beta: penalty per token of a problem that is always solved.
  """

  def apply(outcomes, state):
    correct = outcomes.correct.astype(jnp.float32)
    penalty = -beta * cost(correct, outcomes.lengths)
    return types.Rewards({'correct': correct, 'length': penalty}), state

  return types.Reward(apply)
