# SPDX-License-Identifier: Apache-2.0
"""Accuracy alone: the control that every length method is compared with.

  R = correct

With a hard cap on generation (a truncated completion is graded wrong) this
already shortens answers about as much as most length rewards do
(https://arxiv.org/abs/2604.24003): give it the same steps and the same cap.

Departures: none, this is the outcome reward of GRPO
(https://arxiv.org/abs/2402.03300).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num, Shaped

from lapo_jax import types
from lapo_jax.rewards import _arrays


@jax.jit
def reward(correct: Shaped[Array, 'P G'],
           lengths: Num[Array, 'P G']) -> Float[Array, 'P G']:
  """R = correct, float32 [P, G]; the lengths are not read.

  https://arxiv.org/abs/2402.03300

  Args:
    correct: [P, G], grades in [0, 1]; bool, int or float.
    lengths: [P, G], tokens through the stop token.

  Raises:
    ValueError: at trace time, other shapes or dtypes; both are named.
  """
  _arrays.check('P G', correct=correct, lengths=lengths)
  return correct.astype(jnp.float32)


def make() -> types.Reward:
  """The plug-in; it has no settings."""
  def apply(outcomes, state):
    correct = reward(outcomes.correct, outcomes.lengths)
    return types.Rewards({'correct': correct}), state

  return types.Reward(apply)
