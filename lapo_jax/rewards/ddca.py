# SPDX-License-Identifier: Apache-2.0
"""DDCA: lengths compared among the correct alone, by how easy the problem is.

  A = (c − μ) / (sd + ε) + β·A_len
  A_len = −ρ·(s − mean s) if correct, else 0
  s = sigmoid((l − μ_l) / (sd_l + ε))

https://arxiv.org/abs/2602.02099, Dynamic Decoupled Conditional Advantage. ρ is
the solve rate of the group; μ_l and sd_l, in tokens, and the mean of s are over
its correct completions. All sd are divided by n. Wrong completions neither
dilute the length's baseline nor feel it, and a hard problem hardly does.

The terms are the two summands of A, normalised already: use them with
`advantage.baseline='none'` and `advantage.scale='none'`, which gives A itself.
With the default settings the sum would be normalised once more.

Defaults: β = 0.2 and ε = 1e-8, the released code's.

Departures:
  * The leave-one-out form of the code is left out.
  * A grade above ½ is correct.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Num, ScalarLike, Shaped

from lapo_jax import ops, types
from lapo_jax.rewards import _arrays


@jax.jit
def reward(
    correct: Shaped[Array, 'P G'],
    lengths: Num[Array, 'P G'],
    *,
    beta: ScalarLike = 0.2,
    eps: ScalarLike = 1e-8,
) -> Float[Array, 'P G']:
  """A = (c − μ)/(sd + ε) + β·A_len, the whole advantage, float32 [P, G].

  https://arxiv.org/abs/2602.02099

  Args:
    correct: [P, G], grades in [0, 1]; bool, int or float.
    lengths: [P, G], tokens through the stop token.
    beta: β of `length_advantages`.
    eps: ε, added to the sd of grades and to that of tokens.

  Raises:
    ValueError: at trace time, other shapes or dtypes; both are named.
  """
  _arrays.check('P G', correct=correct, lengths=lengths)
  return (accuracy_advantages(correct, eps=eps) +
          beta * length_advantages(correct, lengths, eps=eps))


@jax.jit
def accuracy_advantages(correct: Shaped[Array, 'P G'], *,
                        eps: ScalarLike = 1e-8) -> Float[Array, 'P G']:
  """(c − μ)/(sd + ε), float32 [P, G]; 0 where c is the same in a whole group.

  https://arxiv.org/abs/2602.02099. c is 1 above a grade of ½, sd is divided by
  n.

  Args:
    correct: [P, G], grades in [0, 1]; bool, int or float.
    eps: ε.

  Raises:
    ValueError: at trace time, other shapes or dtypes; both are named.
  """
  _arrays.check('P G', correct=correct)
  return _standardised(_is_correct(correct),
                       jnp.ones(correct.shape, bool), eps)


@jax.jit
def length_advantages(
    correct: Shaped[Array, 'P G'],
    lengths: Num[Array, 'P G'],
    *,
    eps: ScalarLike = 1e-8,
) -> Float[Array, 'P G']:
  """A_len = −ρ·(s − mean s) if correct, 0 if wrong; float32 [P, G].

  https://arxiv.org/abs/2602.02099. s = sigmoid((l − μ_l)/(sd_l + ε)), ρ the
  solve rate; statistics of the correct completions, sd divided by n.

  Args:
    correct: [P, G], grades in [0, 1]; bool, int or float.
    lengths: [P, G], tokens through the stop token.
    eps: ε, tokens.

  Raises:
    ValueError: at trace time, other shapes or dtypes; both are named.
  """
  _arrays.check('P G', correct=correct, lengths=lengths)
  member = _is_correct(correct)
  solved = jnp.mean(member, axis=-1, keepdims=True)
  score = jax.nn.sigmoid(_standardised(lengths, member, eps))
  centred = score - ops.masked_mean(score, member, keepdims=True)
  return jnp.where(member, -solved * centred, 0.0)


def make(beta: float = 0.2, eps: float = 1e-8) -> types.Reward:
  """The plug-in.

  Args:
    beta: weight of the length advantage.
    eps: added to every sd.
  """

  def apply(outcomes, state):
    length = length_advantages(outcomes.correct, outcomes.lengths, eps=eps)
    return types.Rewards({
        'correct': accuracy_advantages(outcomes.correct, eps=eps),
        'length': beta * length}), state

  return types.Reward(apply)


def _is_correct(correct: Shaped[Array, 'P G']) -> Bool[Array, 'P G']:
  return correct.astype(jnp.float32) > 0.5


def _standardised(values: Shaped[Array, 'P G'], mask: Bool[Array, 'P G'],
                  eps: ScalarLike) -> Float[Array, 'P G']:
  """(x − mean)/(sd + ε) where the mask is true, else 0."""
  values = values.astype(jnp.float32)
  std = ops.masked_std(values, mask, ddof=0, keepdims=True)
  centred = values - ops.masked_mean(values, mask, keepdims=True)
  # Without spread the float32 mean may miss the values, and ε is tiny.
  return jnp.where(mask & (std > 0), centred / (std + eps), 0.0)
