# SPDX-License-Identifier: Apache-2.0
"""HAPO: be shorter than the shortest correct answer of earlier visits.

  f = cos(min(π/2·l/h, π))
  R = c + w·max(f, −0.7)   if correct
  R = c + w·min(f, 0)      if wrong
  R = c                    without a history

https://arxiv.org/abs/2505.11225, History-Aware Policy Optimization. h, in
tokens, is the least length of a correct completion of this problem in all
earlier steps; one number per problem, kept in the checkpoint. f is 1 at
length 0, 0 at h and −1 from 2h.

Defaults: w = 1 and the bound −0.7 are the released code's: a correct
completion keeps at least 0.3.

Departures:
  * h moves once a step, after the rewards.
  * The code's linear form of f and its mean history are left out.
  * A grade between 0 and 1 counts as correct above ½ and stays itself where
    the formula says c.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num, ScalarLike, Shaped

from lapo_jax import types
from lapo_jax.rewards import _arrays

# h of a problem without a correct completion yet: beyond every length.
_NONE = 2**30


@jax.jit
def reward(
    correct: Shaped[Array, 'P G'],
    lengths: Num[Array, 'P G'],
    history: Num[Array, 'P'],
    *,
    weight: ScalarLike = 1.0,
    worst: ScalarLike = -0.7,
) -> Float[Array, 'P G']:
  """R = c + w·f, f as `length_score`; float32 [P, G].

  https://arxiv.org/abs/2505.11225

  Args:
    correct: [P, G], grades in [0, 1]; bool, int or float.
    lengths: [P, G], tokens through the stop token.
    history: [P], h, tokens of the shortest correct one so far, 0 = none.
    weight: w.
    worst: least f of a correct completion.

  Raises:
    ValueError: at trace time, other shapes or dtypes; both are named.
  """
  score = length_score(correct, lengths, history, worst=worst)
  return correct.astype(jnp.float32) + weight * score


@jax.jit
def length_score(
    correct: Shaped[Array, 'P G'],
    lengths: Num[Array, 'P G'],
    history: Num[Array, 'P'],
    *,
    worst: ScalarLike = -0.7,
) -> Float[Array, 'P G']:
  """f = cos(min(π/2·l/h, π)): max(f, worst) if correct, else min(f, 0).

  https://arxiv.org/abs/2505.11225. Float32 [P, G]; 0 without a history.

  Args:
    correct: [P, G], grades in [0, 1]; bool, int or float.
    lengths: [P, G], tokens through the stop token.
    history: [P], h, tokens of the shortest correct one so far, 0 = none.
    worst: least f of a correct completion.

  Raises:
    ValueError: at trace time, other shapes or dtypes; both are named.
  """
  _arrays.check('P G', correct=correct, lengths=lengths)
  _arrays.check_prompts(lengths, history=history)
  known = (history > 0)[:, None]
  ratio = lengths / jnp.where(known, history[:, None], 1)
  score = jnp.cos(jnp.minimum(math.pi / 2 * ratio, math.pi))
  member = correct.astype(jnp.float32) > 0.5
  score = jnp.where(member, jnp.maximum(score, worst),
                    jnp.minimum(score, 0.0))
  return jnp.where(known, score, 0.0)


def make(weight: float = 1.0, worst: float = -0.7) -> types.Reward:
  """The plug-in.

  Args:
    weight: w of the length term.
    worst: least f of a correct completion.
  """

  def init(num_examples):
    return jnp.full((num_examples,), _NONE, jnp.int32)

  def apply(outcomes, state):
    history = state[outcomes.prompt_index]
    history = jnp.where(history < _NONE, history, 0)
    score = length_score(outcomes.correct, outcomes.lengths, history,
                         worst=worst)
    correct = outcomes.correct.astype(jnp.float32)
    return (types.Rewards({'correct': correct, 'length': weight * score}),
            _remember(outcomes, state))

  return types.Reward(apply, init, remember=_remember)


def _remember(outcomes: types.Outcomes,
              state: Int[Array, 'N']) -> Int[Array, 'N']:
  # A minimum: several groups of one problem may come in one step.
  return state.at[outcomes.prompt_index].min(
      _shortest_correct(outcomes.correct, outcomes.lengths))


def _shortest_correct(correct: Shaped[Array, 'P G'],
                      lengths: Num[Array, 'P G']) -> Int[Array, 'P']:
  """Tokens; `_NONE` where nothing is correct."""
  member = correct.astype(jnp.float32) > 0.5
  return jnp.min(jnp.where(member, lengths, _NONE), axis=-1).astype(jnp.int32)
