# SPDX-License-Identifier: Apache-2.0
"""Leash: a length penalty whose strength follows the mean length.

  R = clip(c − λ·max(0, l / L − 1), −1, 1)
  λ ← clip(λ + η·mean(l / L − 1), 0, λ_max)

https://arxiv.org/abs/2512.21540, adaptive LEngth penAlty and reward SHaping.
The mean length of all completions shall not exceed L tokens; λ, one number in
the state, is the multiplier of that constraint. It grows while the policy is
too long, shrinks while it is short, and moves after the rewards of its step.
Only what exceeds L is penalised, right or wrong.

Defaults: the rule is from a summary of the paper. L = 4000, λ = 0.2 at first,
η = 0.05 and λ_max = 1 are ours.

Departures:
  * c is 1 or 0. With grades of 1 and −1 the clip would shield wrong
    completions from the penalty; here they feel it too.
  * A grade between 0 and 1 stays itself where the formula says c.

Good to know: a correct completion twice as long as L loses λ.
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
    strength: ScalarLike,
    *,
    target: ScalarLike = 4000,
) -> Float[Array, 'P G']:
  """R = clip(c − λ·max(0, l/L − 1), −1, 1), float32 [P, G].

  https://arxiv.org/abs/2512.21540

  Args:
    correct: [P, G], grades in [0, 1]; bool, int or float.
    lengths: [P, G], tokens through the stop token.
    strength: λ.
    target: L, tokens.

  Raises:
    ValueError: at trace time, other shapes or dtypes; both are named.
  """
  _arrays.check('P G', correct=correct, lengths=lengths)
  excess = jnp.maximum(lengths / target - 1.0, 0.0)
  return jnp.clip(correct.astype(jnp.float32) - strength * excess, -1.0, 1.0)


@jax.jit
def next_strength(
    strength: ScalarLike,
    lengths: Num[Array, 'P G'],
    *,
    target: ScalarLike = 4000,
    rate: ScalarLike = 0.05,
    most: ScalarLike = 1.0,
) -> Float[Array, '']:
  """λ ← clip(λ + η·mean(l/L − 1), 0, λ_max), float32 [].

  https://arxiv.org/abs/2512.21540

  Args:
    strength: λ.
    lengths: [P, G], tokens through the stop token.
    target: L, tokens.
    rate: η.
    most: λ_max.

  Raises:
    ValueError: at trace time, other shapes or dtypes; both are named.
  """
  _arrays.check('P G', lengths=lengths)
  violation = jnp.mean(lengths / target - 1.0)
  return jnp.clip(strength + rate * violation, 0.0, most)


def make(
    target: int = 4000,
    start: float = 0.2,
    rate: float = 0.05,
    most: float = 1.0,
) -> types.Reward:
  """The plug-in.

  Args:
    target: L, tokens.
    start: λ at first.
    rate: η, by which λ moves when the mean length is twice the target.
    most: the largest λ.
  """
  if target < 1 or not 0 <= start <= most:
    raise ValueError(f'leash: target {target}, start {start}, most {most}: '
                     'expected target >= 1 and 0 <= start <= most.')

  def init(num_examples):
    del num_examples
    return jnp.full((), start, jnp.float32)

  def apply(outcomes, state):
    correct = outcomes.correct.astype(jnp.float32)
    total = reward(correct, outcomes.lengths, state, target=target)
    state = next_strength(state, outcomes.lengths, target=target, rate=rate,
                          most=most)
    return types.Rewards({'correct': correct,
                          'length': total - correct}), state

  return types.Reward(apply, init)
