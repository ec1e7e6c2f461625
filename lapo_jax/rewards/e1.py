# SPDX-License-Identifier: Apache-2.0
"""e1: the prompt states an effort, a share of what the problem usually takes.

  R = c if l / T < r, else 0

https://arxiv.org/abs/2510.27042, Adaptive Effort Control. T is the mean length
of the group in tokens, r the effort that its prompt states. No number of
tokens is stated or learnt: "half of the usual" follows the policy as it
shortens.

Defaults: the rule is from a summary of the paper. The efforts ½, ¾, 1 and 1½,
and the sentence that states them, are ours.

Departures:
  * The efforts take turns, problem i gets number (i + visits) mod 4, so that
    the reward knows what the prompt said. The paper draws them.
  * A grade between 0 and 1 stays itself where the formula says c.

Good to know: a group whose lengths are equal earns nothing at r ≤ 1.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num, Shaped

from lapo_jax import types
from lapo_jax.rewards import _arrays


@jax.jit
def reward(
    correct: Shaped[Array, 'P G'],
    lengths: Num[Array, 'P G'],
    efforts: Num[Array, 'P'],
) -> Float[Array, 'P G']:
  """R = c if l < r·T, else 0; T is the group's mean length; float32 [P, G].

  https://arxiv.org/abs/2510.27042

  Args:
    correct: [P, G], grades in [0, 1]; bool, int or float.
    lengths: [P, G], tokens through the stop token.
    efforts: [P], r, the share of T that each prompt states.

  Raises:
    ValueError: at trace time, other shapes or dtypes; both are named.
  """
  _arrays.check('P G', correct=correct, lengths=lengths)
  _arrays.check_prompts(lengths, efforts=efforts)
  # l·G < r·Σl: sums of lengths are exact, a mean of equal ones may not be one.
  total = jnp.sum(lengths, axis=-1, keepdims=True, dtype=jnp.float32)
  within = lengths * float(lengths.shape[-1]) < efforts[:, None] * total
  return jnp.where(within, correct.astype(jnp.float32), 0.0)


def make(efforts: Sequence[float] = (0.5, 0.75, 1.0, 1.5)) -> types.Reward:
  """The plug-in.

  Args:
    efforts: r, shares of the usual length, in turn.
  """
  efforts = tuple(efforts)
  if not efforts or min(efforts) <= 0:
    raise ValueError(f'e1: efforts are {efforts}, expected one or more '
                     'positive shares of the usual length.')

  def init(num_examples):
    return jnp.zeros((num_examples,), jnp.int32)  # visits of each problem

  def apply(outcomes, state):
    index = outcomes.prompt_index
    stated = jnp.array(efforts, jnp.float32)[
        (index + state[index]) % len(efforts)]
    total = reward(outcomes.correct, outcomes.lengths, stated)
    return types.Rewards({'correct': total}), remember(outcomes, state)

  def remember(outcomes, state):
    return state.at[outcomes.prompt_index].add(1)

  def instruct(example, index, state, rng):
    del rng
    effort = efforts[(index + int(state[index])) % len(efforts)]
    return example.replace(
        question=f'{example.question} Use {100 * effort:g}% of the usual '
                 'reasoning effort.')

  return types.Reward(apply, init, instruct, remember=remember)
