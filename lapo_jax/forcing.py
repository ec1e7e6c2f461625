# SPDX-License-Identifier: Apache-2.0
"""Tokens that the sampler writes in place of those it draws.

  AdaptThink (arXiv:2505.13417): some completions begin with a given token;
    `</think>` makes them answer at once.
  s1's budget forcing (arXiv:2501.19393): thinking that lasts `most` tokens is
    ended, and an end before `least` tokens becomes "Wait".

What is forced is attended like any token, is no action of the policy, and has
log-prob 0 in the rollout. A completion thinks from its first token on, until
the token that ends thinking, or a stop token.

Departures: s1 also writes "Final Answer:" after the forced end, and counts how
often it writes "Wait"; here one token is written, and the least length decides
how often. AdaptThink's loss takes ½ for the probability of the first token,
forced or not; here a forced token is not trained on at all.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from lapo_jax import ops


class Words(NamedTuple):
  """The tokens that are written.

  Attributes:
    end: ends thinking; -1 = no limit asks for it.
    wait: goes on with it; likewise.
  """

  end: int
  wait: int


@flax.struct.dataclass
class Limits:
  """What is forced on each completion, traced; numbers are those of all.

  Attributes:
    first: int32 [B], its first token; -1 = none.
    least: int32 [B], tokens of thinking at least; 0 = none.
    most: int32 [B], tokens of thinking at most; the cap or more = no matter.
  """

  first: Any
  least: Any
  most: Any


def force(
    words: Words, limits: Limits, drawn: Int[Array, 'N'], t: Int[Array, 'N'],
    thinking: Bool[Array, 'N'], eos_ids: Sequence[int],
) -> tuple[Int[Array, 'N'], Bool[Array, 'N'], Bool[Array, 'N']]:
  """What is written, whether the policy chose it, and who goes on thinking.

  Args:
    words: the tokens that may be written.
    limits: of each row, [N].
    drawn: token t of each row.
    t: how many tokens it has.
    thinking: whether it thinks.
    eos_ids: the stop tokens.
  """
  begins = (t == 0) & (limits.first >= 0)
  tokens = jnp.where(begins, limits.first, drawn)
  stops = lambda tokens: (tokens == words.end) | ops.is_any_of(tokens, eos_ids)
  early = thinking & ~begins & (t < limits.least) & stops(tokens)
  late = thinking & ~begins & (t >= limits.most) & ~stops(tokens)
  tokens = jnp.where(early, words.wait, jnp.where(late, words.end, tokens))
  return tokens, ~(begins | early | late), thinking & ~stops(tokens)
