# SPDX-License-Identifier: Apache-2.0
"""N-gram repetition penalty: the share of a completion that it said before.

  R = c + p·(1 − distinct n-grams / all n-grams),   p ≤ 0

https://arxiv.org/abs/2502.03373 (Demystifying Long Chain-of-Thought
Reasoning), appendix C.2, as one number per completion like TRL's
`get_repetition_penalty_reward`. N-grams are of tokens, the stop token
included; a completion shorter than n has none and gets c. They are counted on
the devices that hold the tokens, exactly, by sorting.

Defaults: n = 3 and p = −1 are TRL's.

Departures:
  * The paper puts −0.05 on each token of a repeated 40-gram, which needs
    rewards per token.
  * A grade between 0 and 1 stays itself where the formula says c.

Good to know: the term falls on right and wrong completions alike. Sorting by n
keys suits small n; an n of 40 compiles slowly.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Num, ScalarLike, Shaped

from lapo_jax import types
from lapo_jax.rewards import _arrays


@jax.jit
def reward(
    correct: Shaped[Array, 'P G'],
    lengths: Num[Array, 'P G'],
    repeated: Num[Array, 'P G'],
    *,
    penalty: ScalarLike = -1.0,
) -> Float[Array, 'P G']:
  """R = c + p·repeated, float32 [P, G]; the lengths are not read.

  https://arxiv.org/abs/2502.03373, appendix C.2.

  Args:
    correct: [P, G], grades in [0, 1]; bool, int or float.
    lengths: [P, G], tokens through the stop token.
    repeated: [P, G], `repeated_share` of each completion.
    penalty: p.

  Raises:
    ValueError: at trace time, other shapes or dtypes; both are named.
  """
  _arrays.check('P G', correct=correct, lengths=lengths, repeated=repeated)
  return correct.astype(jnp.float32) + penalty * repeated


@functools.partial(jax.jit, static_argnames=('n',))
def repeated_share(tokens: Int[Array, 'B T'], mask: Bool[Array, 'B T'],
                   n: int = 3) -> Float[Array, 'B']:
  """1 − distinct / all n-grams, float32 [B]; 0 for a row shorter than n.

  https://arxiv.org/abs/2502.03373, appendix C.2.

  Args:
    tokens: int [B, T], the completions, right-padded.
    mask: bool [B, T], true on real tokens.
    n: tokens of an n-gram.

  Raises:
    ValueError: at trace time, other shapes or dtypes; both are named.
  """
  _arrays.check('B T', tokens=tokens, mask=mask)
  windows = tokens.shape[1] - n + 1
  if windows < 1:
    return jnp.zeros(tokens.shape[:1], jnp.float32)
  real = mask[:, n - 1:]  # the n-gram's last token is
  grams = [tokens[:, i:i + windows] for i in range(n)]
  # Equal n-grams become neighbours, those that touch padding come last.
  padding, *grams = jax.lax.sort([~real, *grams], dimension=1, num_keys=n + 1)
  same = [gram[:, 1:] == gram[:, :-1] for gram in grams]
  again = functools.reduce(jnp.logical_and, same) & ~padding[:, 1:]
  total = jnp.sum(real, axis=1, dtype=jnp.float32)
  return jnp.sum(again, axis=1, dtype=jnp.float32) / jnp.maximum(total, 1.0)


def make(n: int = 3, penalty: float = -1.0) -> types.Reward:
  """The plug-in.

  Args:
    n: tokens of an n-gram.
    penalty: p of a completion that only repeats itself.
  """
  if n < 1 or penalty > 0:
    raise ValueError(f'repetition: n {n} and penalty {penalty}: expected '
                     'n >= 1 and penalty <= 0.')

  def apply(outcomes, state):
    correct = outcomes.correct.astype(jnp.float32)
    # Row b = p·G + g, as `measure` found it.
    repeated = outcomes.extras['repeated']
    total = reward(correct, outcomes.lengths, repeated, penalty=penalty)
    return types.Rewards({'correct': correct,
                          'repetition': total - correct}), state

  def measure(rollout, logprob_fn, encode):
    del logprob_fn, encode
    return {'repeated': repeated_share(rollout.completion_tokens,
                                       rollout.completion_mask, n)}

  return types.Reward(apply, measure=measure)
