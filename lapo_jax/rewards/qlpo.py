# SPDX-License-Identifier: Apache-2.0
"""QLPO: sample K, learn from M that over-represent short correct and long
wrong completions.

  R = c
  N₊ = round(M · correct / K),  N₋ = M − N₊         of each group
  kept of the correct: ⌈N₊/(1 + a)⌉ of the shorter half, others of the longer
  kept of the wrong:   ⌈N₋/(1 + a)⌉ of the longer half, others of the shorter

https://arxiv.org/abs/2607.21793, by a summary of the paper. Lengths are in
tokens. The reward says nothing of length: which completions are compared does.
a = 1 takes as many of both halves, which is plain GRPO on M of the K.
Advantages compare the kept with one another; the others have advantage 0.

Defaults: M = 8, a = 1/3, with `rollout.group_size` K = 16.

Departures:
  * Within a half those at even distances in length are kept, from its end on,
    where the paper draws at random: so their order decides nothing.
  * An odd class has the larger half where more is kept. A half that has too
    few gives all, and the other half gives what is missing.
  * In the loss the others weigh what they would, at advantage 0: it is that
    of plain GRPO on the M, times the share of the weight that the M have. A
    divergence from the reference policy holds all K.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Num, ScalarLike, Shaped

from lapo_jax import types
from lapo_jax.rewards import _arrays


@jax.jit
def reward(correct: Shaped[Array, 'P G'],
           lengths: Num[Array, 'P G']) -> Float[Array, 'P G']:
  """R = c, float32 [P, G]; it is `kept` that reads the lengths.

  https://arxiv.org/abs/2607.21793

  Args:
    correct: [P, G], grades in [0, 1]; bool, int or float.
    lengths: [P, G], tokens through the stop token.

  Raises:
    ValueError: at trace time, other shapes or dtypes; both are named.
  """
  _arrays.check('P G', correct=correct, lengths=lengths)
  return correct.astype(jnp.float32)


@jax.jit
def kept(
    correct: Shaped[Array, 'P G'],
    lengths: Num[Array, 'P G'],
    *,
    m: ScalarLike = 8,
    a: ScalarLike = 1 / 3,
) -> Bool[Array, 'P G']:
  """The completions to learn from, bool [P, G]; see the module.

  https://arxiv.org/abs/2607.21793

  Args:
    correct: [P, G], grades in [0, 1], right above ½; bool, int or float.
    lengths: [P, G], tokens through the stop token.
    m: M, completions to keep of each group.
    a: how much rarer the other half is; 1 = as frequent.

  Raises:
    ValueError: at trace time, other shapes or dtypes; both are named.
  """
  _arrays.check('P G', correct=correct, lengths=lengths)
  right = correct.astype(jnp.float32) > 0.5
  group_size = correct.shape[-1]
  count = jnp.sum(right, axis=-1, keepdims=True, dtype=jnp.int32)
  wanted = (2 * m * count + group_size) // (2 * group_size)
  # The preferred end of each class comes first: short right, long wrong.
  return (_preferred(right, lengths, wanted, a) |
          _preferred(~right, -lengths, m - wanted, a))


def make(m: int = 8, a: float = 1 / 3) -> types.Reward:
  """The plug-in.

  Args:
    m: M, completions to keep of each group.
    a: how much rarer long correct and short wrong ones are; 1 = as frequent.
  """
  if m < 2 or not 0 <= a <= 1:
    raise ValueError(f'qlpo: m is {m} and a {a}, expected m of at least 2 and '
                     'a in [0, 1].')

  def apply(outcomes, state):
    group_size = outcomes.lengths.shape[-1]
    if m > group_size:
      raise ValueError(f'qlpo: m is {m} of a group of {group_size}: expected '
                       'fewer, or a larger rollout.group_size.')
    correct = reward(outcomes.correct, outcomes.lengths)
    keep = kept(outcomes.correct, outcomes.lengths, m=m, a=a)
    return types.Rewards({'correct': correct}, keep=keep), state

  return types.Reward(apply)


def _preferred(members: Bool[Array, 'P G'], order: Num[Array, 'P G'],
               wanted: Int[Array, 'P 1'],
               a: ScalarLike) -> Bool[Array, 'P G']:
  """`wanted` of the members, most of them from the half that `order` begins."""
  size = jnp.sum(members, axis=-1, keepdims=True, dtype=jnp.int32)
  key = jnp.where(members, order.astype(jnp.float32), jnp.inf)
  rank = jnp.argsort(jnp.argsort(key, axis=-1, stable=True), axis=-1)
  half = (size + 1) // 2
  # Less a rounding error: ⌈3/(1 + ½)⌉ is 2.
  most = jnp.ceil(wanted / (1.0 + a) - 1e-4).astype(jnp.int32)
  most = jnp.minimum(most, half)
  rest = jnp.minimum(wanted - most, size - half)
  most = wanted - rest

  def spread(rank, count, size):
    """Every rank at which ⌈rank · count / size⌉ grows."""
    size = jnp.maximum(size, 1)
    up = lambda rank: -(-rank * count // size)
    return up(rank + 1) > up(rank)

  first = rank < half
  return members & jnp.where(first, spread(rank, most, half),
                             spread(rank - half, rest, size - half))
