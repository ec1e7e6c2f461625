# SPDX-License-Identifier: Apache-2.0
"""SAS: no credit for unsure steps of right completions, no blame for sure
steps of wrong ones.

  R = c
  confidence of a step = mean log-prob of its tokens
  silent: the ⌈r·n⌉ least confident of a right completion's n steps
          the ⌈r·n⌉ most confident of a wrong one's

https://arxiv.org/abs/2604.24003. Steps are the parts of the thinking between
blank lines; the answer, from `</think>` on, is always trained on. What is
silent has advantage 0: it still counts among the tokens that the loss is
divided by.

Defaults: r = 0.3. `answer_only` is what the released code does by a slip: all
thinking of right completions is silent, none of wrong ones.

Departures:
  * Confidence is that of the policy that sampled, as the sampler saw it.
  * What is silent has advantage 0 and nothing else: with `loss.kl_coef` it is
    held to the reference policy as all tokens are.
  * `delimiter` may be another text than a blank line, for models that write
    none. Across the border of two tokens it is found, of three it is not.
"""

from collections.abc import Sequence
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Num, ScalarLike, Shaped
import numpy as np

from lapo_jax import types
from lapo_jax.rewards import _arrays

_END_OF_THINKING = '</think>'


@jax.jit
def reward(correct: Shaped[Array, 'P G'],
           lengths: Num[Array, 'P G']) -> Float[Array, 'P G']:
  """R = c, float32 [P, G]; it is `trained` that chooses among the tokens.

  https://arxiv.org/abs/2604.24003

  Args:
    correct: [P, G], grades in [0, 1]; bool, int or float.
    lengths: [P, G], tokens through the stop token.

  Raises:
    ValueError: at trace time, other shapes or dtypes; both are named.
  """
  _arrays.check('P G', correct=correct, lengths=lengths)
  return correct.astype(jnp.float32)


@functools.partial(jax.jit, static_argnames=('answer_only',))
def trained(
    logprobs: Float[Array, 'B T'],
    steps: Int[Array, 'B T'],
    correct: Shaped[Array, 'B'],
    *,
    share: ScalarLike = 0.3,
    answer_only: bool = False,
) -> Bool[Array, 'B T']:
  """The tokens that are not silent, bool [B, T]; see the module.

  https://arxiv.org/abs/2604.24003

  Args:
    logprobs: [B, T], of the policy that sampled.
    steps: [B, T], the step of each token of thinking, from 0 without gaps;
      −1 on the answer and on padding.
    correct: [B], grades in [0, 1], right above ½; bool, int or float.
    share: r.
    answer_only: all steps of right completions are silent, none of wrong ones.

  Raises:
    ValueError: at trace time, other shapes or dtypes; both are named.
  """
  _arrays.check('B T', logprobs=logprobs, steps=steps)
  thinks = steps >= 0
  right = correct.astype(jnp.float32)[:, None] > 0.5
  if answer_only:
    return ~(thinks & right)
  rows = jnp.arange(steps.shape[0])[:, None]
  place = jnp.where(thinks, steps, steps.shape[1])
  total = lambda x: jnp.zeros(steps.shape, jnp.float32).at[rows, place].add(
      x, mode='drop')
  sizes = total(1.0)
  confidence = total(logprobs) / jnp.maximum(sizes, 1.0)
  # The first to be silent come first, steps that there are not last.
  key = jnp.where(sizes > 0, jnp.where(right, confidence, -confidence),
                  jnp.inf)
  rank = jnp.argsort(jnp.argsort(key, axis=1, stable=True), axis=1)
  count = jnp.sum(sizes > 0, axis=1, keepdims=True)
  # Less a rounding error: ⌈0.3 · 10⌉ is 3.
  silent = rank < jnp.ceil(share * count - 1e-4)
  return ~(thinks & jnp.take_along_axis(silent, jnp.maximum(steps, 0), axis=1))


def make_steps_fn(vocabulary: Sequence[str], delimiter: str = '\n\n'):
  """A jitted `(tokens int32 [B, T], mask bool [B, T]) -> steps int32 [B, T]`.

  A step ends with the token that completes the delimiter; −1 stands on the
  answer, which begins with `</think>`, and on padding.

  Args:
    vocabulary: the text of each token.
    delimiter: what lies between steps.
  """
  has = lambda test: np.array([bool(test(text)) for text in vocabulary])
  whole = has(lambda text: delimiter in text)
  ends = has(lambda text: _END_OF_THINKING in text)
  halves = [(has(lambda text, i=i: text.endswith(delimiter[:i])),
             has(lambda text, i=i: text.startswith(delimiter[i:])))
            for i in range(1, len(delimiter))]

  @jax.jit
  def split(tokens, mask):
    before = jnp.pad(tokens, ((0, 0), (1, 0)))[:, :-1]
    first = jnp.arange(tokens.shape[1])[None] == 0
    complete = jnp.asarray(whole)[tokens]
    for left, right in halves:
      complete |= (jnp.asarray(left)[before] & jnp.asarray(right)[tokens] &
                   ~first)
    # A step begins after a delimiter, not at one that follows another.
    begins = jnp.pad(complete, ((0, 0), (1, 0)))[:, :-1] & ~complete
    answers = jnp.cumsum(jnp.asarray(ends)[tokens] & mask, axis=1) > 0
    steps = jnp.cumsum(begins, axis=1, dtype=jnp.int32)
    return jnp.where(mask & ~answers, steps, -1)

  return split


def make(share: float = 0.3, delimiter: str = '\n\n',
         answer_only: bool = False) -> types.Reward:
  """The plug-in.

  Args:
    share: r, of the steps that are silent.
    delimiter: what lies between steps, a blank line.
    answer_only: the released code's variant.
  """
  if not 0 <= share <= 1 or not delimiter:
    raise ValueError(f'sas: share is {share} and delimiter {delimiter!r}, '
                     'expected a share in [0, 1] and some text.')

  def mute(vocabulary):
    split = make_steps_fn(vocabulary, delimiter)

    def find(rollout, correct):
      steps = split(rollout.completion_tokens, rollout.completion_mask)
      return trained(rollout.sampler_logprobs, steps, correct, share=share,
                     answer_only=answer_only)

    return find

  def apply(outcomes, state):
    return types.Rewards(
        {'correct': reward(outcomes.correct, outcomes.lengths)}), state

  return types.Reward(apply, mute=mute)
