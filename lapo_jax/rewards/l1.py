# SPDX-License-Identifier: Apache-2.0
"""L1: the prompt states a number of tokens, the reward asks to keep to it.

  exact    R = c − α·|n − l|
  maximum  R = c·clip(α·(n − l) + ½, 0, 1)     slope 'paper'
           R = c·clip(α·(n − l)/2 + ½, 0, 1)   slope 'code'

https://arxiv.org/abs/2503.04697 (LCPO-Exact, LCPO-Max). n, stated in tokens, is
drawn anew for each prompt from the integers 100 to 4000. α = 3e-4 per token.

Defaults: α and the range of n are the paper's and the code's. Paper and code
give the maximum two slopes: the paper's formula is steeper; it is the default.

Departures:
  * Of the mode 'mixed' the paper says that half of the prompts state a
    maximum. Here an odd n is a maximum and an even one exact, so that the
    reward can tell which its prompt stated.
  * A grade between 0 and 1 stays itself where the formula says c.

Good to know:
  * `exact` penalises wrong completions as well: a wrong one of the right
    length may beat a correct one that is 1/α = 3333 tokens off.
  * α is per token: shorter tasks need a larger one.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num, ScalarLike, Shaped

from lapo_jax import types
from lapo_jax.rewards import _arrays

MODES = ('exact', 'maximum', 'mixed')
SLOPES = ('paper', 'code')


@functools.partial(jax.jit, static_argnames=('mode', 'slope'))
def reward(
    correct: Shaped[Array, 'P G'],
    lengths: Num[Array, 'P G'],
    target_lengths: Num[Array, 'P'],
    *,
    mode: str = 'exact',
    alpha: ScalarLike = 3e-4,
    slope: str = 'paper',
) -> Float[Array, 'P G']:
  """R of `exact`, of `maximum`, or for 'mixed' of what each n stands for.

  https://arxiv.org/abs/2503.04697. Float32 [P, G]: c − α·|n − l| or
  c·clip(α·(n − l) + ½, 0, 1).

  Args:
    correct: [P, G], grades in [0, 1]; bool, int or float.
    lengths: [P, G], tokens through the stop token.
    target_lengths: [P], n, tokens that each prompt states.
    mode: 'exact' | 'maximum' | 'mixed', where an odd n is a maximum.
    alpha: α, per token.
    slope: of the maximum: 'paper' | 'code', which halves α.

  Raises:
    ValueError: at trace time, other shapes, dtypes or choices.
  """
  _check_choices(mode, slope)
  if mode == 'exact':
    return exact(correct, lengths, target_lengths, alpha=alpha)
  at_most = maximum(correct, lengths, target_lengths, alpha=alpha, slope=slope)
  if mode == 'maximum':
    return at_most
  odd = (target_lengths % 2 == 1)[:, None]
  return jnp.where(
      odd, at_most, exact(correct, lengths, target_lengths, alpha=alpha))


@jax.jit
def exact(
    correct: Shaped[Array, 'P G'],
    lengths: Num[Array, 'P G'],
    target_lengths: Num[Array, 'P'],
    *,
    alpha: ScalarLike = 3e-4,
) -> Float[Array, 'P G']:
  """R = c − α·|n − l|, on wrong completions too; float32 [P, G].

  https://arxiv.org/abs/2503.04697, LCPO-Exact.

  Args:
    correct: [P, G], grades in [0, 1]; bool, int or float.
    lengths: [P, G], tokens through the stop token.
    target_lengths: [P], n, tokens that each prompt states.
    alpha: α, per token.

  Raises:
    ValueError: at trace time, other shapes or dtypes; both are named.
  """
  spare = _spare_tokens(correct, lengths, target_lengths)
  return correct.astype(jnp.float32) - alpha * jnp.abs(spare)


@functools.partial(jax.jit, static_argnames=('slope',))
def maximum(
    correct: Shaped[Array, 'P G'],
    lengths: Num[Array, 'P G'],
    target_lengths: Num[Array, 'P'],
    *,
    alpha: ScalarLike = 3e-4,
    slope: str = 'paper',
) -> Float[Array, 'P G']:
  """R = c·clip(α·(n − l) + ½, 0, 1), float32 [P, G].

  https://arxiv.org/abs/2503.04697, LCPO-Max.

  Args:
    correct: [P, G], grades in [0, 1]; bool, int or float.
    lengths: [P, G], tokens through the stop token.
    target_lengths: [P], n, tokens that each prompt states.
    alpha: α, per token.
    slope: 'paper' | 'code', which halves α.

  Raises:
    ValueError: at trace time, other shapes, dtypes or choices.
  """
  _check_choices('maximum', slope)
  spare = _spare_tokens(correct, lengths, target_lengths)
  steepness = alpha if slope == 'paper' else alpha / 2.0
  share = jnp.clip(steepness * spare + 0.5, 0.0, 1.0)
  return correct.astype(jnp.float32) * share


def make(
    mode: str = 'exact',
    alpha: float = 3e-4,
    slope: str = 'paper',
    low: int = 100,
    high: int = 4000,
) -> types.Reward:
  """The plug-in.

  Args:
    mode: what the prompt states: 'exact' "Think for n tokens.", 'maximum'
      "Think for maximum n tokens.", 'mixed' either, half and half.
    alpha: reward per token.
    slope: of the maximum: 'paper' | 'code', half as steep.
    low: least n, tokens.
    high: largest n, tokens.
  """
  _check_choices(mode, slope)
  if not 1 <= low <= high:
    raise ValueError(f'l1: low {low} and high {high}: expected '
                     '1 <= low <= high, in tokens.')

  def apply(outcomes, state):
    correct = outcomes.correct.astype(jnp.float32)
    total = reward(correct, outcomes.lengths, outcomes.target_lengths,
                   mode=mode, alpha=alpha, slope=slope)
    return types.Rewards({'correct': correct,
                          'length': total - correct}), state

  def instruct(example, index, state, rng):
    del index, state
    number = int(rng.integers(low, high + 1))
    at_most = mode == 'maximum' or (mode == 'mixed' and number % 2 == 1)
    limit = f'maximum {number}' if at_most else number
    return example.replace(
        question=f'{example.question} Think for {limit} tokens.',
        target_length=number)

  return types.Reward(apply, instruct=instruct)


def _spare_tokens(correct: Shaped[Array, 'P G'], lengths: Num[Array, 'P G'],
                  target_lengths: Num[Array, 'P']) -> Float[Array, 'P G']:
  """n − l."""
  _arrays.check('P G', correct=correct, lengths=lengths)
  _arrays.check_prompts(lengths, target_lengths=target_lengths)
  return (target_lengths[:, None] - lengths).astype(jnp.float32)


def _check_choices(mode: str, slope: str):
  for what, got, legal in (('mode', mode, MODES), ('slope', slope, SLOPES)):
    if got not in legal:
      raise ValueError(f'l1: {what} is {got!r}, expected one of {legal}.')
