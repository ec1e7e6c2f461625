# SPDX-License-Identifier: Apache-2.0
"""GFPO: sample many, learn from the k most concise of each group.

  R = c,  kept: the k shortest           metric 'length'
          kept: the k largest c / l      metric 'efficiency'

https://arxiv.org/abs/2508.09726, Group Filtered Policy Optimization. Lengths
are in tokens. Advantages compare the kept completions with one another, mean
and sd over those alone; the others get 0, as if they were absent. Kept
completions of one reward have no advantage.

Defaults: k = 8, with 16 or 24 completions a prompt; both from a summary of the
paper. k = `rollout.group_size` is plain GRPO, a larger k an error.

Departures:
  * The paper's variant with a k by difficulty is left out.
  * Ties, which the paper does not mention: by efficiency the shorter comes
    first, then the one sampled first.

Good to know: the filter does not look at correctness with the metric 'length'.
A group whose short completions are all wrong teaches nothing.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Num, ScalarLike, Shaped

from lapo_jax import types
from lapo_jax.rewards import _arrays

METRICS = ('length', 'efficiency')


@jax.jit
def reward(correct: Shaped[Array, 'P G'],
           lengths: Num[Array, 'P G']) -> Float[Array, 'P G']:
  """R = c, float32 [P, G]; it is `kept` that reads the lengths.

  https://arxiv.org/abs/2508.09726

  Args:
    correct: [P, G], grades in [0, 1]; bool, int or float.
    lengths: [P, G], tokens through the stop token.

  Raises:
    ValueError: at trace time, other shapes or dtypes; both are named.
  """
  _arrays.check('P G', correct=correct, lengths=lengths)
  return correct.astype(jnp.float32)


@functools.partial(jax.jit, static_argnames=('metric',))
def kept(
    correct: Shaped[Array, 'P G'],
    lengths: Num[Array, 'P G'],
    *,
    k: ScalarLike = 8,
    metric: str = 'length',
) -> Bool[Array, 'P G']:
  """True on the k least l, or largest c/l, of each group; bool [P, G].

  https://arxiv.org/abs/2508.09726

  Args:
    correct: [P, G], grades in [0, 1]; bool, int or float.
    lengths: [P, G], tokens through the stop token.
    k: completions to keep of each group.
    metric: 'length', the shortest; 'efficiency', the most reward per token.

  Raises:
    ValueError: at trace time, other shapes, dtypes or choices.
  """
  _check_metric(metric)
  _arrays.check('P G', correct=correct, lengths=lengths)
  lengths = lengths.astype(jnp.float32)
  # A length of 0 would make 0/0 of a wrong completion.
  efficiency = correct.astype(jnp.float32) / jnp.maximum(lengths, 1.0)
  keys = (lengths,) if metric == 'length' else (lengths, -efficiency)
  order = jnp.lexsort(keys, axis=-1)  # the last key counts first
  rank = jnp.argsort(order, axis=-1)
  return rank < k


def make(k: int = 8, metric: str = 'length') -> types.Reward:
  """The plug-in.

  Args:
    k: completions to keep of each group.
    metric: 'length', the shortest; 'efficiency', the most reward per token.
  """
  _check_metric(metric)
  if k < 2:
    raise ValueError(f'gfpo: k is {k}, expected at least 2: the kept '
                     'completions are compared with one another.')

  def apply(outcomes, state):
    group_size = outcomes.lengths.shape[-1]
    if k > group_size:
      raise ValueError(f'gfpo: k is {k} of a group of {group_size}: expected '
                       'fewer, or a larger rollout.group_size.')
    correct = reward(outcomes.correct, outcomes.lengths)
    keep = kept(outcomes.correct, outcomes.lengths, k=k, metric=metric)
    return types.Rewards({'correct': correct}, keep=keep), state

  return types.Reward(apply)


def _check_metric(metric: str):
  if metric not in METRICS:
    raise ValueError(f'gfpo: metric is {metric!r}, expected one of {METRICS}.')
