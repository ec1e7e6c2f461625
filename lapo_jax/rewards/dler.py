# SPDX-License-Identifier: Apache-2.0
r"""DLER: a hard limit on length, and what makes it train well.

  R = c if l ≤ L, else 0
  L = cap                                            DLER
  L = easy_cap if over half of the group is correct, else cap    DA-DLER

https://arxiv.org/abs/2510.15110, Doing Length pEnalty Right. Lengths are in
tokens. The reward is the plain truncation; the method is the optimisation
around it: the group's mean and the *batch's* sd, a higher upper clip, groups
without variance left out and drawn anew.

  --config.advantage.scale=batch --config.loss.clip_high=0.28
  --config.rollout.refill_rounds=4

DA-DLER continues a DLER run: a stage with `difficulty_aware=True`.

Defaults: 4000 and 2000 tokens are the paper's. In a config `cap` follows
`rollout.max_completion_length`.

Departures:
  * `overlong` is the released code's: a completion beyond L that holds an
    answer (`\boxed`) gets 0.1. The paper gives it 0, the default here.
  * Groups are drawn anew in `refill_rounds` rounds at most, and by their
    grades, which know the generation cap but not `easy_cap`.
  * A grade between 0 and 1 stays itself; above ½ it counts as correct.

Good to know: the paper warns that without drawing groups anew, the default,
the length collapses.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num, ScalarLike, Shaped

from lapo_jax import types
from lapo_jax.rewards import _arrays


@functools.partial(jax.jit, static_argnames=('difficulty_aware',))
def reward(
    correct: Shaped[Array, 'P G'],
    lengths: Num[Array, 'P G'],
    truncated: Shaped[Array, 'P G'] | None = None,
    answered: Shaped[Array, 'P G'] | None = None,
    *,
    cap: ScalarLike = 4000,
    difficulty_aware: bool = False,
    easy_cap: ScalarLike = 2000,
    overlong: ScalarLike = 0.0,
) -> Float[Array, 'P G']:
  """R = c if l ≤ L, else `overlong` if answered, else 0; float32 [P, G].

  https://arxiv.org/abs/2510.15110

  Args:
    correct: [P, G], grades in [0, 1]; bool, int or float.
    lengths: [P, G], tokens through the stop token.
    truncated: [P, G], generation stopped at the cap, None = nowhere; counts as
      beyond.
    answered: [P, G], the completion holds an answer, None = nowhere.
    cap: L, tokens.
    difficulty_aware: L is `easy_cap` where over half of the group is correct.
    easy_cap: tokens.
    overlong: reward of an answer beyond the limit.

  Raises:
    ValueError: at trace time, other shapes or dtypes; both are named.
  """
  _arrays.check('P G', correct=correct, lengths=lengths, truncated=truncated,
                answered=answered)
  truncated = _known(truncated, lengths)
  answered = _known(answered, lengths)
  correct = correct.astype(jnp.float32)
  limit = jnp.asarray(cap, jnp.float32)
  if difficulty_aware:
    easy = jnp.mean(correct > 0.5, axis=-1, keepdims=True) > 0.5
    limit = jnp.where(easy, easy_cap, cap)
  within = (lengths <= limit) & ~truncated
  return jnp.where(within, correct, jnp.where(answered, overlong, 0.0))


def make(
    cap: int = 4000,
    difficulty_aware: bool = False,
    easy_cap: int = 2000,
    overlong: float = 0.0,
) -> types.Reward:
  """The plug-in.

  Args:
    cap: L and generation cap, tokens.
    difficulty_aware: DA-DLER, `easy_cap` where over half of a group is
      correct.
    easy_cap: its lower limit, tokens.
    overlong: reward of an answer beyond the limit: the paper's 0, the code's
      0.1.
  """

  def apply(outcomes, state):
    total = reward(outcomes.correct, outcomes.lengths, outcomes.truncated,
                   outcomes.extras['boxed'], cap=cap,
                   difficulty_aware=difficulty_aware, easy_cap=easy_cap,
                   overlong=overlong)
    return types.Rewards({'correct': total}), state

  def read(completion_text, example):
    del example
    return {'boxed': float('\\boxed' in completion_text)}

  return types.Reward(apply, read=read)


def _known(facts: Shaped[Array, 'P G'] | None,
           lengths: Num[Array, 'P G']) -> Shaped[Array, 'P G']:
  """The facts as bool, false everywhere for None."""
  if facts is None:
    return jnp.zeros(lengths.shape, bool)
  return facts.astype(jnp.float32) > 0.5
