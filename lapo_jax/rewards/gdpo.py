# SPDX-License-Identifier: Apache-2.0
"""GDPO: correctness and a length limit as two rewards, each on its own scale.

  r_c = c
  r_l = 1 if l ≤ L, else 0;  conditioned: 0 also where c < t
  A   = whiten(w_c·norm(r_c) + w_l·norm(r_l))

https://arxiv.org/abs/2601.05242. Summed first, (c, r_l) = (0, 1) and (1, 0)
are one number and get one advantage; normalised first, they do not. The
normalising is the advantage's, so this method is two terms, two weights and

  --config.advantage.decoupled=True --config.advantage.whiten=completions

which is TRL's (ε 1e-4); verl's is `whiten='tokens'` with `eps=1e-6`. With one
term and no whitening it is GRPO. Any other method with several terms becomes
a GDPO of its own by the same two settings.

Defaults: weights of 1 and t = 1; that the length reward is conditioned, and on
4000 tokens, is our choice.

Departures: none known.

Good to know: unconditioned, a wrong completion within L may come out above a
correct one beyond it.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num, ScalarLike, Shaped

from lapo_jax import types
from lapo_jax.rewards import _arrays


@functools.partial(jax.jit, static_argnames=('conditioned',))
def reward(
    correct: Shaped[Array, 'P G'],
    lengths: Num[Array, 'P G'],
    *,
    limit: ScalarLike = 4000,
    correct_weight: ScalarLike = 1.0,
    length_weight: ScalarLike = 1.0,
    conditioned: bool = True,
    threshold: ScalarLike = 1.0,
) -> Float[Array, 'P G']:
  """R = w_c·c + w_l·r_l, what GRPO would compare; float32 [P, G].

  https://arxiv.org/abs/2601.05242

  Args:
    correct: [P, G], grades in [0, 1]; bool, int or float.
    lengths: [P, G], tokens through the stop token.
    limit: L, tokens.
    correct_weight: w_c.
    length_weight: w_l.
    conditioned: r_l asks for c ≥ t.
    threshold: t.

  Raises:
    ValueError: at trace time, other shapes or dtypes; both are named.
  """
  score = length_score(correct, lengths, limit=limit, conditioned=conditioned,
                       threshold=threshold)
  return (correct_weight * correct.astype(jnp.float32) +
          length_weight * score)


@functools.partial(jax.jit, static_argnames=('conditioned',))
def length_score(
    correct: Shaped[Array, 'P G'],
    lengths: Num[Array, 'P G'],
    *,
    limit: ScalarLike = 4000,
    conditioned: bool = True,
    threshold: ScalarLike = 1.0,
) -> Float[Array, 'P G']:
  """r_l = 1 if l ≤ L and, conditioned, c ≥ t, else 0; float32 [P, G].

  https://arxiv.org/abs/2601.05242

  Args:
    correct: [P, G], grades in [0, 1]; bool, int or float.
    lengths: [P, G], tokens through the stop token.
    limit: L, tokens.
    conditioned: ask for c ≥ t.
    threshold: t.

  Raises:
    ValueError: at trace time, other shapes or dtypes; both are named.
  """
  _arrays.check('P G', correct=correct, lengths=lengths)
  earned = lengths <= limit
  if conditioned:
    earned &= correct.astype(jnp.float32) >= threshold
  return earned.astype(jnp.float32)


def make(
    limit: int = 4000,
    correct_weight: float = 1.0,
    length_weight: float = 1.0,
    conditioned: bool = True,
    threshold: float = 1.0,
) -> types.Reward:
  """The plug-in.

  Args:
    limit: L, tokens.
    correct_weight: w_c.
    length_weight: w_l.
    conditioned: the length reward asks for a grade of at least `threshold`.
    threshold: t.
  """

  def apply(outcomes, state):
    score = length_score(outcomes.correct, outcomes.lengths, limit=limit,
                         conditioned=conditioned, threshold=threshold)
    weights = {'correct': jnp.float32(correct_weight),
               'length': jnp.float32(length_weight)}
    correct = outcomes.correct.astype(jnp.float32)
    return types.Rewards({'correct': correct, 'length': score}, weights), state

  return types.Reward(apply)
