# SPDX-License-Identifier: Apache-2.0
"""HBPO: completions under several stated budgets, compared in two ways.

  f₂(b) = β·cos(πb / 2L)
  R = f₂(b)                              if correct and l ≤ b
  R = β·cos(πl / 2L) − α·|l − b|         if correct and l > b
  R = 0                                  if wrong
  A = (R − μ) / (sd + ε) + (μ_b − f₂(b))

https://arxiv.org/abs/2507.15844, Hierarchical Budget Policy Optimization. b is
the budget in tokens that opens a completion's thinking ("I will answer the
question within b tokens."), one of 512, 1024, 2048, 2560 for a quarter of the
group each. μ and sd are the group's, μ_b the mean reward of the completions of
one budget. L is the generation cap.

`reward` and `advantages` are the paper's, with a budget per completion. The
plug-in's two terms are the two summands of A; to get A itself, use
`advantage.baseline='none'` and `advantage.scale='none'`. With the group's mean
taken off, the second term, the same for a whole group there, has no effect.

Defaults: β = 4, α = 1/4096, L = 4096 and the budgets are the paper's. sd is
divided by n − 1, ε = 1e-6, as in the released code.

Departures:
  * A loop's group shares one prompt: the plug-in draws one budget for all of a
    group, anew at each visit of a problem. Budgets are thus compared over
    steps, by the second term, and not within the group.
  * The released code rewards wrong completions without a box with −1, and
    correct ones over 4096 tokens with 0; not here.
  * A grade above ½ is correct.

Good to know: where nothing is correct every completion is pushed down by
f₂(b). A correct completion near the cap may get less than 0, a wrong one's
reward.
"""

from collections.abc import Sequence
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num, ScalarLike, Shaped

from lapo_jax import ops, types
from lapo_jax.rewards import _arrays


@jax.jit
def reward(
    correct: Shaped[Array, 'P G'],
    lengths: Num[Array, 'P G'],
    budgets: Num[Array, 'P G'],
    *,
    alpha: ScalarLike = 1 / 4096,
    beta: ScalarLike = 4.0,
    cap: ScalarLike = 4096,
) -> Float[Array, 'P G']:
  """R = f₂(b) if l ≤ b, else β·cos(πl/2L) − α·|l − b|; 0 if wrong.

  https://arxiv.org/abs/2507.15844. Float32 [P, G].

  Args:
    correct: [P, G], grades in [0, 1]; bool, int or float.
    lengths: [P, G], tokens through the stop token.
    budgets: [P, G], b, tokens that open each completion's thinking.
    alpha: α, penalty per token beyond the budget.
    beta: β, the cosine's height.
    cap: L, generation cap, tokens.

  Raises:
    ValueError: at trace time, other shapes or dtypes; both are named.
  """
  _arrays.check('P G', correct=correct, lengths=lengths, budgets=budgets)
  within = cosine(budgets, beta=beta, cap=cap)
  beyond = (cosine(lengths, beta=beta, cap=cap) -
            alpha * jnp.abs(lengths - budgets))
  return jnp.where(correct.astype(jnp.float32) > 0.5,
                   jnp.where(lengths <= budgets, within, beyond), 0.0)


@jax.jit
def cosine(
    lengths: Num[Array, 'P G'],
    *,
    beta: ScalarLike = 4.0,
    cap: ScalarLike = 4096,
) -> Float[Array, 'P G']:
  """β·cos(πl / 2L), float32 [P, G]: β at length 0, 0 at the cap.

  https://arxiv.org/abs/2507.15844

  Args:
    lengths: [P, G], tokens.
    beta: β.
    cap: L, generation cap, tokens.

  Raises:
    ValueError: at trace time, other shapes or dtypes; both are named.
  """
  _arrays.check('P G', lengths=lengths)
  return beta * jnp.cos(math.pi * lengths / (2.0 * cap))


@jax.jit
def advantages(
    rewards: Num[Array, 'P G'],
    budgets: Num[Array, 'P G'],
    *,
    beta: ScalarLike = 4.0,
    cap: ScalarLike = 4096,
    eps: ScalarLike = 1e-6,
) -> tuple[Float[Array, 'P G'], Float[Array, 'P G']]:
  """The summands of A: (R − μ)/(sd + ε) and μ_b − f₂(b); float32 [P, G].

  https://arxiv.org/abs/2507.15844

  Args:
    rewards: [P, G], R.
    budgets: [P, G], b, tokens; those of one b share μ_b, their mean R.
    beta: β of f₂.
    cap: L, generation cap, tokens.
    eps: ε; sd is divided by n − 1.

  Raises:
    ValueError: at trace time, other shapes or dtypes; both are named.
  """
  _arrays.check('P G', rewards=rewards, budgets=budgets)
  rewards = rewards.astype(jnp.float32)
  everyone = jnp.ones(rewards.shape, bool)
  std = ops.masked_std(rewards, everyone, keepdims=True)
  centred = rewards - ops.masked_mean(rewards, everyone, keepdims=True)
  between = jnp.where(std > 0, centred / (std + eps), 0.0)
  same = budgets[:, :, None] == budgets[:, None, :]  # [P, G, G]
  own = ops.masked_mean(
      jnp.broadcast_to(rewards[:, None, :], same.shape), same)
  return between, own - cosine(budgets, beta=beta, cap=cap)


def make(
    budgets: Sequence[int] = (512, 1024, 2048, 2560),
    alpha: float = 1 / 4096,
    beta: float = 4.0,
    cap: int = 4096,
    eps: float = 1e-6,
) -> types.Reward:
  """The plug-in.

  Args:
    budgets: tokens that a prompt may state; drawn with equal chances.
    alpha: penalty per token beyond the budget.
    beta: the cosine's height.
    cap: L, generation cap, tokens.
    eps: added to the group's sd.
  """
  budgets = tuple(budgets)
  if not budgets or min(budgets) < 1:
    raise ValueError(f'hbpo: budgets are {budgets}, expected one or more '
                     'positive numbers of tokens.')

  def apply(outcomes, state):
    lengths = outcomes.lengths
    stated = jnp.broadcast_to(outcomes.target_lengths[:, None], lengths.shape)
    total = reward(outcomes.correct, lengths, stated, alpha=alpha, beta=beta,
                   cap=cap)
    between, budget = advantages(total, stated, beta=beta, cap=cap, eps=eps)
    return types.Rewards({'group': between, 'budget': budget}), state

  def instruct(example, index, state, rng):
    del index, state
    number = int(budgets[rng.integers(len(budgets))])
    return example.replace(
        prefill=(f'{example.prefill} I will answer the question within '
                 f'{number} tokens.'),
        target_length=number)

  return types.Reward(apply, instruct=instruct)
