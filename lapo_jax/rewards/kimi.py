# SPDX-License-Identifier: Apache-2.0
"""Kimi k1.5's length reward: where a completion stands in its group's range.

  λ = ½ − (l − l_min) / (l_max − l_min)
  R = c + w·λ           if correct
  R = c + w·min(0, λ)   if wrong

https://arxiv.org/abs/2501.12599. l_min and l_max, in tokens, are the shortest
and the longest completion of the group, right or wrong. In a group of one
length λ is 0.

Defaults: the paper adds the term "with a weighting parameter" that it does not
name; w = 1 is ours.

Departures:
  * The paper lets training settle without the term first. That is a stage
    with weight 0 before one with it, not a setting.
  * A grade between 0 and 1 counts as correct above ½ and stays itself where
    the formula says c.

Good to know: the longest of a correct group loses w/2, so w ≤ 2 keeps every
correct completion at or above the wrong ones.
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
    weight: ScalarLike = 1.0,
) -> Float[Array, 'P G']:
  """R = c + w·λ if correct, c + w·min(0, λ) if wrong; float32 [P, G].

  https://arxiv.org/abs/2501.12599

  Args:
    correct: [P, G], grades in [0, 1]; bool, int or float.
    lengths: [P, G], tokens through the stop token.
    weight: w.

  Raises:
    ValueError: at trace time, other shapes or dtypes; both are named.
  """
  score = length_score(correct, lengths)
  return correct.astype(jnp.float32) + weight * score


@jax.jit
def length_score(correct: Shaped[Array, 'P G'],
                 lengths: Num[Array, 'P G']) -> Float[Array, 'P G']:
  """λ = ½ − (l − l_min)/(l_max − l_min), min(0, λ) if wrong.

  https://arxiv.org/abs/2501.12599. Float32 [P, G]; 0 in a group of one length.

  Args:
    correct: [P, G], grades in [0, 1]; bool, int or float.
    lengths: [P, G], tokens through the stop token.

  Raises:
    ValueError: at trace time, other shapes or dtypes; both are named.
  """
  _arrays.check('P G', correct=correct, lengths=lengths)
  lengths = lengths.astype(jnp.float32)
  least = jnp.min(lengths, axis=-1, keepdims=True)
  width = jnp.max(lengths, axis=-1, keepdims=True) - least
  place = (lengths - least) / jnp.where(width > 0, width, 1.0)
  score = jnp.where(width > 0, 0.5 - place, 0.0)
  member = correct.astype(jnp.float32) > 0.5
  return jnp.where(member, score, jnp.minimum(score, 0.0))


def make(weight: float = 1.0) -> types.Reward:
  """The plug-in.

  Args:
    weight: w of the length term.
  """

  def apply(outcomes, state):
    score = length_score(outcomes.correct, outcomes.lengths)
    correct = outcomes.correct.astype(jnp.float32)
    return types.Rewards({'correct': correct, 'length': weight * score}), state

  return types.Reward(apply)
