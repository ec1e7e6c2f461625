# SPDX-License-Identifier: Apache-2.0
"""LEAD: two rewards, whose weights follow what there is left to learn.

  r_c = c
  r_l = max(−1, 1 − |l − L*| / L*),   L* = clip(mean correct length, low, cap)
  A   = whiten(λ_c·norm(r_c) + λ_l·norm(r_l))

  CV  = σ / (|μ| + ε)                 of each reward, over the batch
  PSI = CV·Φ,  Φ = (1 − (clip(μ, lo, hi) − lo) / (hi − lo))^a
  λ  ← 0.95·λ + 0.05·PSI / ΣPSI;  used: λ_c = max(λ_c, 0.3), λ_l = 1 − λ_c

https://arxiv.org/abs/2605.09806. Lengths are in tokens; L* is the cap where
nothing is correct. μ is the mean of the prompts' means, σ² the mean of their
variances plus the variance of their means (divided by n) plus 1e-8. Of r_l
only correct completions count there, and prompts with one; without any, μ and
σ are 0. [lo, hi] is [0, 1] for c and [−1, 1] for r_l.

The state is λ_c and λ_l, ½ at first; it moves before it is used. The floor of
0.3 touches what is used, not the state. Where both PSI are 0 the state shrinks
and no longer sums to 1; the used weights still do.

Use it with `advantage.decoupled=True`, `advantage.whiten='tokens'` (the code;
the paper whitens over 'completions') and `advantage.eps=1e-6`.

Defaults: all numbers are the released code's: low 1000, cap 8000, momentum
0.95, floor 0.3, a 1, ε 1e-8. Shape 'symmetric' is the paper's; 'asymmetric'
(the code's fallback) and 'over' are the code's ablations, as are the
statistics 'median', 'min' and 'all'.

Departures: a grade above ½ is correct. The code scales both CV to a sum of 1
before PSI, which only moves the ε of PSI's own sum; here, as in the paper, not.

Good to know: r_l stands on wrong completions too, so a wrong one of the right
length may come out above a correct one that is far from it.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Num, ScalarLike, Shaped

from lapo_jax import ops, types
from lapo_jax.rewards import _arrays

SHAPES = ('symmetric', 'asymmetric', 'over')
STATISTICS = ('mean', 'median', 'min', 'all')

# λ by the name of its term, float32 [].
Weights = dict[str, jax.Array]


@functools.partial(jax.jit, static_argnames=('shape', 'statistic'))
def reward(
    correct: Shaped[Array, 'P G'],
    lengths: Num[Array, 'P G'],
    *,
    correct_weight: ScalarLike = 0.5,
    low: ScalarLike = 1000,
    cap: ScalarLike = 8000,
    shape: str = 'symmetric',
    statistic: str = 'mean',
) -> Float[Array, 'P G']:
  """R = λ_c·c + (1 − λ_c)·r_l with a fixed λ_c, before any normalisation.

  https://arxiv.org/abs/2605.09806. Float32 [P, G].

  Args:
    correct: [P, G], grades in [0, 1]; bool, int or float.
    lengths: [P, G], tokens through the stop token.
    correct_weight: λ_c.
    low: least L*, tokens.
    cap: largest L*, tokens.
    shape: of r_l, see `length_score`.
    statistic: L* of the lengths, see `length_score`.

  Raises:
    ValueError: at trace time, other shapes, dtypes or choices.
  """
  score = length_score(correct, lengths, low=low, cap=cap, shape=shape,
                       statistic=statistic)
  return (correct_weight * correct.astype(jnp.float32) +
          (1.0 - correct_weight) * score)


@functools.partial(jax.jit, static_argnames=('shape', 'statistic'))
def length_score(
    correct: Shaped[Array, 'P G'],
    lengths: Num[Array, 'P G'],
    *,
    low: ScalarLike = 1000,
    cap: ScalarLike = 8000,
    shape: str = 'symmetric',
    statistic: str = 'mean',
    shortest: ScalarLike = 500,
) -> Float[Array, 'P G']:
  """r_l = max(−1, 1 − |l − L*|/L*), right or wrong; float32 [P, G].

  https://arxiv.org/abs/2605.09806

  Args:
    correct: [P, G], grades in [0, 1]; bool, int or float.
    lengths: [P, G], tokens through the stop token.
    low: least L*, tokens.
    cap: largest L*, tokens, and L* where nothing is correct.
    shape: 'symmetric' max(−1, 1 − |l − L*|/L*). With x = 1 − l/L*: 'over'
      clip(x, −1, 0); 'asymmetric' max(0, x) if correct, or 0 if shorter than
      `shortest`, and clip(x, −1, 0) if wrong.
    statistic: L* of the correct lengths, 'mean' | 'median' | 'min'; 'all',
      the mean of all lengths.
    shortest: tokens under which 'asymmetric' suspects a completion.

  Raises:
    ValueError: at trace time, other shapes, dtypes or choices.
  """
  _check_choices(shape, statistic)
  member = _is_correct(correct, lengths)
  target = _target(member, lengths, low, cap, statistic)[:, None]
  excess = 1.0 - lengths / target
  if shape == 'symmetric':
    return jnp.maximum(1.0 - jnp.abs(lengths - target) / target, -1.0)
  penalty = jnp.clip(excess, -1.0, 0.0)
  if shape == 'over':
    return penalty
  bonus = jnp.where(lengths < shortest, 0.0, jnp.maximum(excess, 0.0))
  return jnp.where(member, bonus, penalty)


@jax.jit
def instability(
    values: Num[Array, 'P G'],
    mask: Bool[Array, 'P G'],
    *,
    low: ScalarLike,
    high: ScalarLike,
    power: ScalarLike = 1.0,
    eps: ScalarLike = 1e-8,
) -> Float[Array, '']:
  """PSI = σ/(|μ| + ε)·(1 − (clip(μ, low, high) − low)/(high − low))^a.

  https://arxiv.org/abs/2605.09806. Float32 [].

  Args:
    values: [P, G], a reward.
    mask: [P, G], completions that count; prompts without one are left out.
    low: the reward's least value.
    high: its largest value.
    power: a.
    eps: ε.

  Raises:
    ValueError: at trace time, other shapes or dtypes; both are named.
  """
  _arrays.check('P G', values=values, mask=mask)
  known = jnp.any(mask, axis=-1)
  means = ops.masked_mean(values, mask)
  variances = ops.masked_std(values, mask, ddof=0)**2
  mean = ops.masked_mean(means, known)
  spread = (ops.masked_mean(variances, known) +
            ops.masked_std(means, known, ddof=0)**2 + 1e-8)
  std = jnp.where(jnp.any(known), jnp.sqrt(spread), 0.0)
  left = 1.0 - (jnp.clip(mean, low, high) - low) / (high - low)
  return std / (jnp.abs(mean) + eps) * left**power


def make(
    low: int = 1000,
    cap: int = 8000,
    momentum: float = 0.95,
    floor: float = 0.3,
    power: float = 1.0,
    eps: float = 1e-8,
    shape: str = 'symmetric',
    statistic: str = 'mean',
) -> types.Reward:
  """The plug-in.

  Args:
    low: least L*, tokens.
    cap: largest L* and generation cap, tokens.
    momentum: share of λ that stays at each step.
    floor: least λ_c that is used.
    power: a of Φ.
    eps: ε of CV and of the sum of PSI.
    shape: of r_l, see `length_score`.
    statistic: L* of the lengths, see `length_score`.
  """
  _check_choices(shape, statistic)
  if not 0 < low <= cap:
    raise ValueError(f'lead: low {low} and cap {cap}: expected 0 < low <= '
                     'cap, in tokens; set reward.low.')

  def init(num_examples):
    del num_examples
    return {name: jnp.full((), 0.5, jnp.float32)
            for name in ('correct', 'length')}

  def apply(outcomes, state):
    correct, lengths = outcomes.correct.astype(jnp.float32), outcomes.lengths
    score = length_score(correct, lengths, low=low, cap=cap, shape=shape,
                         statistic=statistic)
    member = _is_correct(correct, lengths)
    psi = {'correct': instability(correct, jnp.ones_like(member), low=0.0,
                                  high=1.0, power=power, eps=eps),
           'length': instability(score, member, low=-1.0, high=1.0,
                                 power=power, eps=eps)}
    state = _follow(state, psi, momentum, eps)
    used = jnp.maximum(state['correct'], floor)
    return types.Rewards({'correct': correct, 'length': score},
                         {'correct': used, 'length': 1.0 - used}), state

  return types.Reward(apply, init)


def _follow(state: Weights, psi: Weights, momentum: float,
            eps: float) -> Weights:
  """λ ← m·λ + (1 − m)·PSI/(ΣPSI + ε)."""
  total = psi['correct'] + psi['length'] + eps
  return {name: momentum * state[name] + (1.0 - momentum) * psi[name] / total
          for name in state}


def _is_correct(correct: Shaped[Array, 'P G'],
                lengths: Num[Array, 'P G']) -> Bool[Array, 'P G']:
  _arrays.check('P G', correct=correct, lengths=lengths)
  return correct.astype(jnp.float32) > 0.5


def _target(member: Bool[Array, 'P G'], lengths: Num[Array, 'P G'],
            low: ScalarLike, cap: ScalarLike,
            statistic: str) -> Float[Array, 'P']:
  """L* of each group, tokens."""
  everyone = jnp.ones(lengths.shape, bool)
  if statistic == 'all':
    return jnp.clip(ops.masked_mean(lengths, everyone), low, cap)
  if statistic == 'mean':
    found = ops.masked_mean(lengths, member)
  else:
    found = ops.masked_quantile(lengths, member,
                                0.0 if statistic == 'min' else 0.5)
  return jnp.where(jnp.any(member, axis=-1), jnp.clip(found, low, cap),
                   jnp.asarray(cap, jnp.float32))


def _check_choices(shape: str, statistic: str):
  for what, got, legal in (('shape', shape, SHAPES),
                           ('statistic', statistic, STATISTICS)):
    if got not in legal:
      raise ValueError(f'lead: {what} is {got!r}, expected one of {legal}.')
