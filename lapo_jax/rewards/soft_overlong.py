# SPDX-License-Identifier: Apache-2.0
"""DAPO's soft overlong punishment: a ramp before the cap instead of a cliff.

  R = c + w·p,  p = 0                              if l ≤ L − B
                    (L − B − l) / B in [−1, 0]     if l ≤ L
                    −1                             beyond

https://arxiv.org/abs/2503.14476, equation 13. L is the generation cap and B
the buffer before it, in tokens.

Defaults: the paper's cap of 20480 with a buffer of 4096, a fifth of it. In a
config L follows `rollout.max_completion_length`, and the buffer is given as a
share of L so that it follows too. w = 1 is the paper's, for grades of 1 and
−1; for grades of 1 and 0 the same proportion is w = ½.

Departures: the grade is 1 or 0, not 1 or −1, see above.

Good to know: TRL adds no correctness, it has that as another reward; here the
terms are apart and sum.
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
    cap: ScalarLike = 20480,
    buffer: ScalarLike = 4096,
    weight: ScalarLike = 1.0,
) -> Float[Array, 'P G']:
  """R = c + w·p, float32 [P, G]; p is `punishment`.

  https://arxiv.org/abs/2503.14476, equation 13.

  Args:
    correct: [P, G], grades in [0, 1]; bool, int or float.
    lengths: [P, G], tokens through the stop token.
    cap: L, generation cap, tokens.
    buffer: B, tokens before the cap.
    weight: w.

  Raises:
    ValueError: at trace time, other shapes or dtypes; both are named.
  """
  _arrays.check('P G', correct=correct, lengths=lengths)
  penalty = punishment(lengths, cap=cap, buffer=buffer)
  return correct.astype(jnp.float32) + weight * penalty


@jax.jit
def punishment(
    lengths: Num[Array, 'P G'],
    *,
    cap: ScalarLike = 20480,
    buffer: ScalarLike = 4096,
) -> Float[Array, 'P G']:
  """p = clip((L − B − l)/B, −1, 0), float32 [P, G].

  https://arxiv.org/abs/2503.14476, equation 13.

  Args:
    lengths: [P, G], tokens through the stop token.
    cap: L, generation cap, tokens.
    buffer: B, tokens before the cap.

  Raises:
    ValueError: at trace time, other shapes or dtypes; both are named.
  """
  _arrays.check('P G', lengths=lengths)
  return jnp.clip((cap - buffer - lengths) / buffer, -1.0, 0.0)


def make(cap: int = 20480, buffer_share: float = 0.2,
         weight: float = 1.0) -> types.Reward:
  """The plug-in.

  Args:
    cap: L, generation cap, tokens.
    buffer_share: B as a share of the cap, in (0, 1].
    weight: w of the punishment.
  """
  if not 0 < buffer_share <= 1:
    raise ValueError(f'soft_overlong: buffer_share is {buffer_share}, expected '
                     'a share of the cap in (0, 1].')

  def apply(outcomes, state):
    correct = outcomes.correct.astype(jnp.float32)
    penalty = punishment(outcomes.lengths, cap=cap, buffer=buffer_share * cap)
    return types.Rewards({'correct': correct,
                          'length': weight * penalty}), state

  return types.Reward(apply)
