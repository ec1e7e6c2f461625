# SPDX-License-Identifier: Apache-2.0
r"""LASER: a step reward for correct completions within a target length.

  R = 1 if correct, −½ if wrong but boxed, −1 without a box
    + ½ if correct and l ≤ L                                        LASER
  L from the group's difficulty, renewed every 20 steps             LASER-D
    + ½ if wrong, boxed, l > L and not repetitive                   LASER-DE

https://arxiv.org/abs/2505.15612, Length-bAsed StEp Reward shaping. Lengths are
in tokens. A box is the text `\boxed`. A group is easy if at least 2/3 of it is
correct, medium from 1/3, else hard. The L of a difficulty is the least
candidate with ⌊coverage·m⌋ ≥ 1, where coverage is the share of completions of
such groups that are no longer than the candidate, and m is 2G/3, G/3 or 1
(5, 2 and 1 for 8 completions); the cap if no candidate will do.

Defaults: all numbers are the released code's: the bonus ½, L = 4096 for LASER,
16 candidates up to the cap (1024, 2048, … 16384), 20 steps.

Departures:
  * Coverage is counted on the training completions since the last renewal; the
    code samples a monitoring set of its own. L is `target` until the first.
  * Exactly 1/3 or 2/3 correct is the upper band, in counting as in rewarding;
    the code counts it in the lower. It cannot happen with 8 completions.
  * Repetition is looked for by the code's rule, among words, not tokens.
  * A grade above ½ is correct.

Good to know: L = 4096 is meant for 16k generation.
"""

import collections
from collections.abc import Iterator, Sequence
import itertools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Num, ScalarLike, Shaped

from lapo_jax import types
from lapo_jax.rewards import _arrays

VARIANTS = ('fixed', 'difficulty', 'exploration')

# 'targets' float32 [3], L of easy, medium and hard groups; 'covered' float32
# [3, candidates] and 'seen' float32 [3], completions since the last renewal;
# 'steps' int32 [].
Memory = dict[str, jax.Array]


@jax.jit
def reward(
    correct: Shaped[Array, 'P G'],
    lengths: Num[Array, 'P G'],
    boxed: Shaped[Array, 'P G'] | None = None,
    target_lengths: Num[Array, 'P'] | None = None,
    explores: Shaped[Array, 'P G'] | None = None,
    *,
    target: ScalarLike = 4096,
    bonus: ScalarLike = 0.5,
) -> Float[Array, 'P G']:
  """R = 1, −½ wrong but boxed, −1 unboxed; + bonus if correct and l ≤ L.

  https://arxiv.org/abs/2505.15612. Float32 [P, G].

  Args:
    correct: [P, G], grades in [0, 1]; bool, int or float.
    lengths: [P, G], tokens through the stop token.
    boxed: [P, G], whether a completion has a box, None = all have.
    target_lengths: [P], L of each group, tokens, None = `target` for all.
    explores: [P, G], where a wrong, boxed completion longer than L gets the
      bonus too, None = nowhere.
    target: L, tokens.
    bonus: of a correct completion within L.

  Raises:
    ValueError: at trace time, other shapes or dtypes; both are named.
  """
  _arrays.check('P G', correct=correct, lengths=lengths, boxed=boxed,
                explores=explores)
  base = _base(correct, lengths, boxed)
  if target_lengths is None:
    target_lengths = jnp.full(lengths.shape[:1], target)
  _arrays.check_prompts(lengths, target_lengths=target_lengths)
  within = lengths <= target_lengths[:, None]
  rewarded = (base == 1.0) & within
  if explores is not None:
    rewarded |= (base == -0.5) & ~within & explores.astype(bool)
  return base + jnp.where(rewarded, bonus, 0.0)


@jax.jit
def difficulty(correct: Shaped[Array, 'P G']) -> Int[Array, 'P']:
  """0 easy, ≥ 2/3 of the group correct; 1 medium, ≥ 1/3; 2 hard; int32 [P].

  https://arxiv.org/abs/2505.15612

  Args:
    correct: [P, G], grades in [0, 1]; bool, int or float.

  Raises:
    ValueError: at trace time, other shapes or dtypes; both are named.
  """
  _arrays.check('P G', correct=correct)
  thrice = 3 * jnp.sum(_is_correct(correct), axis=-1)
  group_size = correct.shape[-1]
  return (jnp.where(thrice >= group_size, 1, 2) -
          jnp.where(thrice >= 2 * group_size, 1, 0))


def is_repetitive(words: Sequence[str]) -> bool:
  """Whether a text goes round in circles, by the rule of the released code.

  True if some n words come again in short distance (three times, in texts
  under 200 words twice), or if any 2n words come again; n is 4, in texts under
  100 words 3, under 30 words 2. n times the same word do not count.

  Args:
    words: of the text, in order.
  """
  total = len(words)
  if total <= 8:
    return False
  n = 2 if total < 30 else 3 if total < 100 else 4
  often = 2 if total < 200 else 3
  places = collections.defaultdict(list)
  for i, gram in enumerate(_grams(words, n)):
    if n == 2 or len(set(gram)) > 1:
      places[gram].append(i)
  near = any(len(found) >= often and
             min(b - a for a, b in itertools.pairwise(found)) < total // 3
             for found in places.values())
  long_grams = list(_grams(words, 2 * n)) if total >= 4 * n else []
  return near or len(set(long_grams)) < len(long_grams)


def make(
    variant: str = 'fixed',
    target: int = 4096,
    bonus: float = 0.5,
    cap: int = 16384,
    num_candidates: int = 16,
    interval: int = 20,
) -> types.Reward:
  """The plug-in.

  Args:
    variant: 'fixed' LASER, 'difficulty' LASER-D, 'exploration' LASER-DE.
    target: L in tokens; of the last two until the first renewal.
    bonus: of a correct completion within L.
    cap: generation cap in tokens, the largest candidate.
    num_candidates: candidates for L, at even steps up to the cap.
    interval: steps between renewals.
  """
  if variant not in VARIANTS:
    raise ValueError(f'laser: variant is {variant!r}, expected one of '
                     f'{VARIANTS}.')
  if num_candidates < 1 or interval < 1:
    raise ValueError('laser: expected num_candidates and interval of at least '
                     f'1, got {num_candidates} and {interval}.')

  def apply(outcomes, state):
    boxed, targets, explores = outcomes.extras['boxed'], None, None
    if variant != 'fixed':
      bands = difficulty(outcomes.correct)
      targets = state['targets'][bands]
      state = _renew(_count(state, bands, outcomes.lengths, cap), cap, interval,
                     outcomes.lengths.shape[-1])
    if variant == 'exploration':
      explores = outcomes.extras['repetitive'] < 0.5
    base = _base(outcomes.correct, outcomes.lengths, boxed)
    total = reward(outcomes.correct, outcomes.lengths, boxed, targets,
                   explores, target=target, bonus=bonus)
    return types.Rewards({'correct': base, 'length': total - base}), state

  def init(num_examples):
    del num_examples
    if variant == 'fixed':
      return ()
    return {'targets': jnp.full(3, target, jnp.float32),
            'covered': jnp.zeros((3, num_candidates), jnp.float32),
            'seen': jnp.zeros(3, jnp.float32),
            'steps': jnp.zeros((), jnp.int32)}

  def read(completion_text, example):
    del example
    found = {'boxed': float('\\boxed' in completion_text)}
    if variant == 'exploration':
      found['repetitive'] = float(is_repetitive(completion_text.split()))
    return found

  return types.Reward(apply, init, read=read)


def _is_correct(correct: Shaped[Array, 'P G']) -> Bool[Array, 'P G']:
  return correct.astype(jnp.float32) > 0.5


def _base(correct: Shaped[Array, 'P G'], lengths: Num[Array, 'P G'],
          boxed: Shaped[Array, 'P G'] | None) -> Float[Array, 'P G']:
  """1 if correct, −½ if wrong but boxed, −1 without a box."""
  boxed = jnp.ones(lengths.shape) if boxed is None else boxed
  wrong = jnp.where(boxed.astype(jnp.float32) > 0.5, -0.5, -1.0)
  return jnp.where(_is_correct(correct), 1.0, wrong)


def _count(state: Memory, bands: Int[Array, 'P'], lengths: Num[Array, 'P G'],
           cap: int) -> Memory:
  """Adds this step's completions, by the difficulty of their groups."""
  candidates = _candidates(cap, state['covered'].shape[1])
  below = lengths[:, :, None] <= candidates[None, None, :]
  group_size = float(lengths.shape[-1])
  return {**state, 'steps': state['steps'] + 1,
          'seen': state['seen'].at[bands].add(group_size),
          'covered': state['covered'].at[bands].add(
              jnp.sum(below, axis=1, dtype=jnp.float32))}


def _renew(state: Memory, cap: int, interval: int,
           group_size: int) -> Memory:
  """At every `interval`-th step: L from the counts, which start again."""
  candidates = _candidates(cap, state['covered'].shape[1])
  number = jnp.array([2 * group_size // 3, group_size // 3, 1], jnp.float32)
  # covered / seen · m ≥ 1, without a division that could round.
  enough = (state['covered'] * number[:, None] >=
            jnp.maximum(state['seen'], 1.0)[:, None])
  found = jnp.where(enough, candidates[None, :], jnp.inf)
  fresh = {'targets': jnp.minimum(jnp.min(found, axis=1), float(cap)),
           'covered': jnp.zeros_like(state['covered']),
           'seen': jnp.zeros_like(state['seen']), 'steps': state['steps']}
  now = state['steps'] % interval == 0
  return jax.tree.map(lambda new, old: jnp.where(now, new, old), fresh, state)


def _candidates(cap: int, number: int) -> Float[Array, 'C']:
  """Even steps up to the cap, tokens."""
  return cap * jnp.arange(1, number + 1, dtype=jnp.float32) / number


def _grams(words: Sequence[str], n: int) -> Iterator[tuple[str, ...]]:
  return zip(*(words[i:] for i in range(n)), strict=False)
