# SPDX-License-Identifier: Apache-2.0
"""ThinkPrune: the accuracy reward under a token limit that the prompt states.

  R = c if l ≤ L, else 0

https://arxiv.org/abs/2504.01296. The limit L, in tokens, is also the cap of
generation: what is cut there has no answer. It is lowered in stages, each
starting from the policy of the last: 4000 → 3000 → 2000.

  stages = ({'rollout.max_completion_length': 4000},
            {'rollout.max_completion_length': 3000},
            {'rollout.max_completion_length': 2000})

In a config `cap` follows `rollout.max_completion_length`, so this sets both.

Defaults: L = 4000 and the stages are the released code's, with 16 completions
a prompt.

Departures:
  * The sentence stands at the end of the question; the code puts it into the
    system prompt, which a method does not write here.
  * A grade between 0 and 1 stays itself where the formula says c.
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
    cap: ScalarLike = 4000,
) -> Float[Array, 'P G']:
  """R = c if l ≤ L, else 0; float32 [P, G].

  https://arxiv.org/abs/2504.01296

  Args:
    correct: [P, G], grades in [0, 1]; bool, int or float.
    lengths: [P, G], tokens through the stop token.
    cap: L, tokens.

  Raises:
    ValueError: at trace time, other shapes or dtypes; both are named.
  """
  _arrays.check('P G', correct=correct, lengths=lengths)
  return jnp.where(lengths <= cap, correct.astype(jnp.float32), 0.0)


def make(cap: int = 4000) -> types.Reward:
  """The plug-in.

  Args:
    cap: L, the limit in tokens; the prompt states it.
  """

  def apply(outcomes, state):
    total = reward(outcomes.correct, outcomes.lengths, cap=cap)
    return types.Rewards({'correct': total}), state

  def instruct(example, index, state, rng):
    del index, state, rng
    return example.replace(
        question=(f'{example.question} The output of the assistant should be '
                  f'within {cap} tokens.'),
        target_length=cap)

  return types.Reward(apply, instruct=instruct)
