# SPDX-License-Identifier: Apache-2.0
"""Cosine reward: right answers should be short, wrong ones keep thinking.

  R = long + ½·(short − long)·(1 + cos(π·min(l, L)/L))

https://arxiv.org/abs/2502.03373 (Demystifying Long Chain-of-Thought
Reasoning), appendix C.1. `short` is the reward at length 0, `long` at L, the
generation cap in tokens; right and wrong completions have a pair each. A
truncated completion gets `exceed`.

Defaults: open-r1's: right 1.0 to 0.5, wrong −1.0 to −0.5, and −0.5 where
truncated, since there no other rule holds. The paper's are right 2 to 1, wrong
−10 to 0, and −10 where truncated.

Departures:
  * open-r1 measures characters and does not stop at L; here tokens, and the
    reward stays what it is at L.
  * A grade above ½ is correct.

Good to know: with an `exceed` as high as `wrong_long`, rambling to the cap is
the best that can be done about a problem without a solution in sight.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num, ScalarLike, Shaped

from lapo_jax import types
from lapo_jax.rewards import _arrays


@jax.jit
def reward(
    correct: Shaped[Array, 'P G'],
    lengths: Num[Array, 'P G'],
    truncated: Shaped[Array, 'P G'] | None = None,
    *,
    cap: ScalarLike = 1000,
    correct_short: ScalarLike = 1.0,
    correct_long: ScalarLike = 0.5,
    wrong_short: ScalarLike = -1.0,
    wrong_long: ScalarLike = -0.5,
    exceed: ScalarLike = -0.5,
) -> Float[Array, 'P G']:
  """R = long + ½·(short − long)·(1 + cos(π·min(l, L)/L)), float32 [P, G].

  https://arxiv.org/abs/2502.03373, appendix C.1.

  Args:
    correct: [P, G], grades in [0, 1]; bool, int or float.
    lengths: [P, G], tokens through the stop token.
    truncated: [P, G], true where no stop token came, None = nowhere.
    cap: L, generation cap, tokens.
    correct_short: of a right answer at length 0.
    correct_long: at L tokens and beyond.
    wrong_short: of a wrong answer at length 0.
    wrong_long: at L tokens and beyond.
    exceed: R where truncated.

  Raises:
    ValueError: at trace time, other shapes or dtypes; both are named.
  """
  _arrays.check('P G', correct=correct, lengths=lengths, truncated=truncated)
  share = 0.5 * (1.0 + jnp.cos(math.pi * jnp.minimum(lengths / cap, 1.0)))
  between = lambda short, long: long + (short - long) * share
  found = jnp.where(correct.astype(jnp.float32) > 0.5,
                    between(correct_short, correct_long),
                    between(wrong_short, wrong_long))
  if truncated is None:
    return found
  return jnp.where(truncated.astype(bool), exceed, found)


def make(
    cap: int = 1000,
    correct_short: float = 1.0,
    correct_long: float = 0.5,
    wrong_short: float = -1.0,
    wrong_long: float = -0.5,
    exceed: float = -0.5,
) -> types.Reward:
  """The plug-in.

  Args:
    cap: L, generation cap, tokens.
    correct_short: reward of a right answer without any length.
    correct_long: at the cap.
    wrong_short: reward of a wrong answer without any length.
    wrong_long: at the cap.
    exceed: reward of a truncated completion.
  """

  def apply(outcomes, state):
    total = reward(outcomes.correct, outcomes.lengths, outcomes.truncated,
                   cap=cap, correct_short=correct_short,
                   correct_long=correct_long, wrong_short=wrong_short,
                   wrong_long=wrong_long, exceed=exceed)
    return types.Rewards({'total': total}), state

  return types.Reward(apply)
