# SPDX-License-Identifier: Apache-2.0
"""Accuracy alone: the control that every length method is compared with.

  R = correct

With a hard cap on generation (a truncated completion is graded wrong) this
already shortens answers about as much as most length rewards do
(https://arxiv.org/abs/2604.24003): give it the same steps and the same cap.

Departures: none, this is the outcome reward of GRPO
(https://arxiv.org/abs/2402.03300).
"""

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num, Shaped

from lapo_jax import types


@jax.jit
def reward(correct: Shaped[Array, 'P G'],
           lengths: Num[Array, 'P G']) -> Float[Array, 'P G']:
  """R = correct; the lengths are not read."""
  chex.assert_equal_shape([correct, lengths], exception_type=ValueError)
  return correct.astype(jnp.float32)


def make() -> types.Reward:
  """The plug-in; it has no settings."""
  def apply(outcomes, state):
    correct = reward(outcomes.correct, outcomes.lengths)
    return types.Rewards({'correct': correct}), state

  return types.Reward(apply)
