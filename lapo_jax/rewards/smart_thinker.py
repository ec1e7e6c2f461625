# SPDX-License-Identifier: Apache-2.0
"""SmartThinker: penalise what lies beyond an estimated best length.

  R = c − Λ·pen,  pen = max(0, l − l*) if correct, else 0
  l* = (v₂·μ₁ − v₁·μ₂) / (v₂ − v₁), within the group's lengths, if v₂ < v₁
  Λ  = (share of wrong) / (max pen − mean pen + 1e-6)

https://github.com/SJTU-RTEAS/SmartThinker. Of a group's lengths in tokens, μ₁
and v₁ are mean and variance (divided by n) of all, μ₂ and v₂ of the correct
ones: l* is where a Gaussian of the correct lengths most exceeds one of all. If
v₂ > v₁, or if everything is correct, it is the shortest length; if the two
variances are equal, the longest where μ₂ < μ₁ and else the shortest. The mean
penalty is over the whole group. Λ puts the most penalised correct completion on
the group's mean reward; in a group all correct or all wrong it is 0.

Defaults: none to choose; with 8 completions a prompt.

Departures: a grade between 0 and 1 counts as correct above ½ and stays itself
where the formula says c. None else known.

Good to know: the mean penalty is at most the share of correct times the largest
one, so Λ·pen ≤ 1 and no correct completion falls below the wrong ones' 0.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Num, Shaped

from lapo_jax import ops, types
from lapo_jax.rewards import _arrays


@jax.jit
def reward(correct: Shaped[Array, 'P G'],
           lengths: Num[Array, 'P G']) -> Float[Array, 'P G']:
  """R = c − Λ·max(0, l − l*) if correct, else c; float32 [P, G].

  https://github.com/SJTU-RTEAS/SmartThinker

  Args:
    correct: [P, G], grades in [0, 1]; bool, int or float.
    lengths: [P, G], tokens through the stop token.

  Raises:
    ValueError: at trace time, other shapes or dtypes; both are named.
  """
  member = _is_correct(correct, lengths)
  beyond, best = _above_shortest(member, lengths)
  excess = beyond - best[:, None]
  penalty = jnp.where(member, jnp.maximum(excess, 0.0), 0.0)
  everyone = jnp.ones(lengths.shape, bool)
  mean = ops.masked_mean(penalty, everyone, keepdims=True)
  most = jnp.max(penalty, axis=-1, keepdims=True)
  wrong = jnp.mean(~member, axis=-1, keepdims=True)
  mixed = (wrong > 0) & (wrong < 1)
  coef = jnp.where(mixed, wrong / (most - mean + 1e-6), 0.0)
  return correct.astype(jnp.float32) - coef * penalty


@jax.jit
def optimal_lengths(correct: Shaped[Array, 'P G'],
                    lengths: Num[Array, 'P G']) -> Float[Array, 'P']:
  """l* = (v₂·μ₁ − v₁·μ₂)/(v₂ − v₁) within the group; tokens, float32 [P].

  https://github.com/SJTU-RTEAS/SmartThinker. Index 1 is all completions, 2
  the correct; the longest length where nothing is correct.

  Args:
    correct: [P, G], grades in [0, 1]; bool, int or float.
    lengths: [P, G], tokens through the stop token.

  Raises:
    ValueError: at trace time, other shapes or dtypes; both are named.
  """
  member = _is_correct(correct, lengths)
  shortest = jnp.min(lengths, axis=-1)
  return shortest + _above_shortest(member, lengths)[1]


def make() -> types.Reward:
  """The plug-in; it has no settings."""

  def apply(outcomes, state):
    correct = outcomes.correct.astype(jnp.float32)
    total = reward(outcomes.correct, outcomes.lengths)
    return types.Rewards({'correct': correct,
                          'length': total - correct}), state

  return types.Reward(apply)


def _is_correct(correct: Shaped[Array, 'P G'],
                lengths: Num[Array, 'P G']) -> Bool[Array, 'P G']:
  _arrays.check('P G', correct=correct, lengths=lengths)
  return correct.astype(jnp.float32) > 0.5


def _above_shortest(
    member: Bool[Array, 'P G'], lengths: Num[Array, 'P G'],
) -> tuple[Float[Array, 'P G'], Float[Array, 'P']]:
  """l and l* less the group's shortest length, tokens.

  Where penalties are a token or less, the difference of two lengths in
  thousands would keep few of their digits.
  """
  everyone = jnp.ones(lengths.shape, bool)
  lengths = lengths - jnp.min(lengths, axis=-1, keepdims=True)
  lengths = lengths.astype(jnp.float32)
  longest = jnp.max(lengths, axis=-1)
  mean, own_mean = (ops.masked_mean(lengths, m) for m in (everyone, member))
  var, own_var = (ops.masked_std(lengths, m, ddof=0)**2
                  for m in (everyone, member))
  gap = own_var - var
  # μ₂ + v₂·(μ₁ − μ₂)/(v₂ − v₁): the formula, without its large products.
  crossing = own_mean + own_var * (mean - own_mean) / jnp.where(
      gap < 0, gap, 1.0)
  found = jnp.where(gap < 0, jnp.clip(crossing, 0.0, longest), 0.0)
  alike = jnp.where(own_mean < mean, longest, 0.0)
  found = jnp.where(jnp.abs(gap) < 1e-6, alike, found)
  found = jnp.where(jnp.all(member, axis=-1), 0.0, found)
  return lengths, jnp.where(jnp.any(member, axis=-1), found, longest)
