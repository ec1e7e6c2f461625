# SPDX-License-Identifier: Apache-2.0
"""SAR, self-aligned reward: is the answer likelier because of the question?

  R = c + w·clip(1 − ppl(a|q) / ppl(a), −1, 1)
  ppl = exp(−mean log π of the completion's tokens)

https://arxiv.org/abs/2509.05489. An answer that dwells on the question needs
it; padding and generalities read as well without. The term stands on every
completion, right or wrong. ppl(a) is one more forward pass of the policy: the
same prompt template with an empty question before the same tokens.

Lengths are not read. Use it with `advantage.scale='none'`: the sum is compared
with its group's mean and not divided. Without c, the term alone collapses to
very short answers.

Defaults: w = 0.2 is the paper's; with it, 6 completions a prompt, learning
rate 1e-6 and 1e-3 of k3.

Departures:
  * ppl(a|q) comes from the sampler's log-probabilities, ppl(a) from the
    training pass: they differ by what `policy/sampler_kl` shows.
  * Tokens that were forced on the policy are left out of both means.
  * A grade between 0 and 1 stays itself where the formula says c.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Num, ScalarLike, Shaped

from lapo_jax import ops, types
from lapo_jax.rewards import _arrays


@jax.jit
def reward(
    correct: Shaped[Array, 'P G'],
    lengths: Num[Array, 'P G'],
    alignment: Num[Array, 'P G'],
    *,
    weight: ScalarLike = 0.2,
) -> Float[Array, 'P G']:
  """R = c + w·alignment, float32 [P, G]; the lengths are not read.

  https://arxiv.org/abs/2509.05489

  Args:
    correct: [P, G], grades in [0, 1]; bool, int or float.
    lengths: [P, G], tokens through the stop token.
    alignment: [P, G], `self_alignment` of each completion.
    weight: w.

  Raises:
    ValueError: at trace time, other shapes or dtypes; both are named.
  """
  _arrays.check('P G', correct=correct, lengths=lengths, alignment=alignment)
  return correct.astype(jnp.float32) + weight * alignment


@jax.jit
def self_alignment(
    given_question: Float[Array, 'B T'],
    alone: Float[Array, 'B T'],
    mask: Bool[Array, 'B T'],
) -> Float[Array, 'B']:
  """clip(1 − ppl(a|q)/ppl(a), −1, 1), float32 [B]; 0 without a token.

  https://arxiv.org/abs/2509.05489. ppl = exp(−mean log π of the tokens).

  Args:
    given_question: [B, T], log-probs of the completions after their prompts.
    alone: [B, T], of the same tokens after the empty question.
    mask: bool [B, T], true on the tokens that count.

  Raises:
    ValueError: at trace time, other shapes or dtypes; both are named.
  """
  _arrays.check('B T', given_question=given_question, alone=alone, mask=mask)
  lost = ops.masked_mean(alone, mask) - ops.masked_mean(given_question, mask)
  # 1 − e^x ≥ −1 is x ≤ log 2: clipped where nothing can overflow.
  return -jnp.expm1(jnp.minimum(lost, math.log(2.0)))


def make(weight: float = 0.2) -> types.Reward:
  """The plug-in.

  Args:
    weight: w of the self-aligned term.
  """

  def apply(outcomes, state):
    correct = outcomes.correct.astype(jnp.float32)
    # Row b = p·G + g, as `measure` found it.
    alignment = outcomes.extras['self_alignment']
    total = reward(correct, outcomes.lengths, alignment, weight=weight)
    return types.Rewards({'correct': correct,
                          'alignment': total - correct}), state

  return types.Reward(apply, measure=_measure)


def _measure(rollout: types.Rollout, logprob_fn: types.LogprobFn,
             encode: types.EncodeFn) -> dict[str, jax.Array]:
  """Scores the completions after the empty question; float32 [B]."""
  num_rows = rollout.completion_tokens.shape[0]
  prompts = encode([types.Example('', '')] * num_rows, range(num_rows))
  alone = logprob_fn(rollout.replace(prompt_tokens=prompts.tokens,
                                     prompt_mask=prompts.mask))
  return {'self_alignment': self_alignment(
      rollout.sampler_logprobs, alone, rollout.action_mask)}
