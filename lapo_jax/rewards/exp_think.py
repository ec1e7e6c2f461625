# SPDX-License-Identifier: Apache-2.0
"""ExpThink: a correct answer counts if it is near the shortest one so far.

  R = c, but 0 if correct and l > ⌊H·(1 + q)⌋

https://arxiv.org/abs/2605.07501. H, in tokens, is the least length of a correct
completion of this problem so far; one number per problem, kept in the
checkpoint. The current group enters the record first, so its shortest correct
completion always counts.

Defaults: q = 0.3 is the released script's (the class it calls says 0.1).

Departures:
  * The released code also takes the gradient from the first tokens that a
    completion without reward shares with the record; masks are not a reward's.
  * Groups are kept or drawn anew by the final reward there; not here.
  * A grade between 0 and 1 counts as correct above ½ and stays itself.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num, ScalarLike, Shaped

from lapo_jax import types
from lapo_jax.rewards import _arrays

# H of a problem without a correct completion yet: beyond every length.
_NONE = 2**30


@jax.jit
def reward(
    correct: Shaped[Array, 'P G'],
    lengths: Num[Array, 'P G'],
    records: Num[Array, 'P'] | None = None,
    *,
    slack: ScalarLike = 0.3,
) -> Float[Array, 'P G']:
  """R = c, but 0 if correct and l > ⌊H·(1 + q)⌋; float32 [P, G].

  https://arxiv.org/abs/2605.07501

  Args:
    correct: [P, G], grades in [0, 1]; bool, int or float.
    lengths: [P, G], tokens through the stop token.
    records: [P], tokens, the least correct length before this step, None = no
      record; the group itself always enters.
    slack: q.

  Raises:
    ValueError: at trace time, other shapes or dtypes; both are named.
  """
  _arrays.check('P G', correct=correct, lengths=lengths)
  best = shortest_correct(correct, lengths)
  if records is not None:
    _arrays.check_prompts(lengths, records=records)
    best = jnp.minimum(best, records)
  correct = correct.astype(jnp.float32)
  # A float32 product may fall just short of the whole number that it is.
  limit = (best + jnp.floor(best * slack + 1e-3))[:, None]
  return jnp.where((correct > 0.5) & (lengths > limit), 0.0, correct)


@jax.jit
def shortest_correct(correct: Shaped[Array, 'P G'],
                     lengths: Num[Array, 'P G']) -> Int[Array, 'P']:
  """min of l over the correct, tokens, int32 [P]; 2³⁰ where nothing is.

  https://arxiv.org/abs/2605.07501

  Args:
    correct: [P, G], grades in [0, 1]; bool, int or float.
    lengths: [P, G], tokens through the stop token.

  Raises:
    ValueError: at trace time, other shapes or dtypes; both are named.
  """
  _arrays.check('P G', correct=correct, lengths=lengths)
  member = correct.astype(jnp.float32) > 0.5
  return jnp.min(jnp.where(member, lengths, _NONE), axis=-1).astype(jnp.int32)


def make(slack: float = 0.3) -> types.Reward:
  """The plug-in.

  Args:
    slack: q, how far beyond the record an answer may go, as a share of it.
  """

  def init(num_examples):
    return jnp.full((num_examples,), _NONE, jnp.int32)

  def remember(outcomes, state):
    # A minimum: several groups of one problem in a step share their record.
    return state.at[outcomes.prompt_index].min(
        shortest_correct(outcomes.correct, outcomes.lengths))

  def apply(outcomes, state):
    state = remember(outcomes, state)
    total = reward(outcomes.correct, outcomes.lengths,
                   state[outcomes.prompt_index], slack=slack)
    return types.Rewards({'correct': total}), state

  return types.Reward(apply, init, remember=remember)
