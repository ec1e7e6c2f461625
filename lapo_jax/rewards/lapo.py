# SPDX-License-Identifier: Apache-2.0
"""LAPO: find how long right answers are, then make that length a habit.

  discovery        R = correct + α·band(l)
  internalisation  R = correct + β·exp(−(l − n)² / 2σ²), if correct

https://arxiv.org/abs/2507.15758. Discovery rewards correct completions whose
length lies between the 30th and the 70th percentile of the group's correct
lengths, and remembers their median M(q) for each problem. Internalisation
states n = int(M(q)) tokens at the start of the thinking, rewards correct
completions near n, and lowers M(q) when a group beats it. Both stages keep the
same memory, so it passes from one to the other.

Departures:
  * A lone correct completion, or several of one length, get the whole band
    reward, as in the paper; the released code gives such groups none.
  * A lowered M(q) is stated when q is drawn next, as in the paper; the
    released code builds its prompts once, so its update never acts.
  * β is 0.8 as in the code and the appendix; section 5 of the paper says 0.7.
    σ = 120 is the code's, the paper names none.
  * A grade between 0 and 1 counts as correct above ½; it stays itself in the
    sum and scales no length term.
  * The sentences of the variants 'range' and 'outside' are ours.

Good to know:
  * In a group that is all correct, α (or β) cancels when advantages are
    divided by the group's sd: choose `decoupled` or another `scale` if it
    should matter there.
  * The slope 100 and σ 120 are tokens, meant for 4k generation: shorter tasks
    need smaller ones.
  * A truncated completion must come graded wrong; the loop sees to that.
  * `cap` is the generation cap, M(q) of a problem not solved. A later stage
    may lower it, never raise it: the old cap would look like a solution.
  * A step draws no problem twice, so no two groups write to one M(q).
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Num, ScalarLike, Shaped

from lapo_jax import ops, types
from lapo_jax.rewards import _arrays

STAGES = ('discovery', 'internalisation')
GUIDANCES = ('exact', 'range', 'outside', 'implicit')
STATISTICS = ('median', 'mean', 'min')

# Float32 [N] by name: 'target' is M(q), 'low' and 'high' are the band of the
# group that it came from. All are the cap where q is unsolved.
Memory = dict[str, jax.Array]


@jax.jit
def reward(correct: Shaped[Array, 'P G'], lengths: Num[Array, 'P G'],
           target_lengths: Num[Array, 'P'] | None = None,
           **settings: ScalarLike) -> Float[Array, 'P G']:
  """R of `internalisation` if target lengths are given, else of `discovery`.

  https://arxiv.org/abs/2507.15758. Float32 [P, G]: c + β·exp(−(l − n)²/2σ²) or
  c + α·max(0, 1 − d/slope), for the correct.

  Args:
    correct: [P, G], grades in [0, 1]; bool, int or float.
    lengths: [P, G], tokens through the stop token.
    target_lengths: [P], n, tokens that each prompt states.
    **settings: those of the one or the other.

  Raises:
    ValueError: at trace time, other shapes or dtypes; both are named.
  """
  if target_lengths is None:
    return discovery(correct, lengths, **settings)
  return internalisation(correct, lengths, target_lengths, **settings)


@jax.jit
def discovery(
    correct: Shaped[Array, 'P G'],
    lengths: Num[Array, 'P G'],
    *,
    alpha: ScalarLike = 0.7,
    low: ScalarLike = 0.3,
    high: ScalarLike = 0.7,
    slope: ScalarLike = 100.0,
) -> Float[Array, 'P G']:
  """R = c + α·max(0, 1 − d/slope) if correct, else c; float32 [P, G].

  https://arxiv.org/abs/2507.15758. d is the distance in tokens to the group's
  band: the quantiles `low` to `high` of its correct lengths, linearly
  interpolated; 0 inside.

  Args:
    correct: [P, G], grades in [0, 1]; bool, int or float.
    lengths: [P, G], tokens through the stop token.
    alpha: α.
    low: quantile of the correct lengths where the band begins.
    high: quantile where it ends.
    slope: tokens outside the band over which its reward falls to 0.

  Raises:
    ValueError: at trace time, other shapes or dtypes; both are named.
  """
  band = _band_score(correct, lengths, low, high, slope)
  return correct.astype(jnp.float32) + alpha * band


@jax.jit
def internalisation(
    correct: Shaped[Array, 'P G'],
    lengths: Num[Array, 'P G'],
    target_lengths: Num[Array, 'P'],
    *,
    beta: ScalarLike = 0.8,
    sigma: ScalarLike = 120.0,
) -> Float[Array, 'P G']:
  """R = c + β·exp(−(l − n)²/2σ²) if correct, else c; float32 [P, G].

  https://arxiv.org/abs/2507.15758

  Args:
    correct: [P, G], grades in [0, 1]; bool, int or float.
    lengths: [P, G], tokens through the stop token.
    target_lengths: [P], n, tokens that each prompt states.
    beta: β.
    sigma: σ, tokens.

  Raises:
    ValueError: at trace time, other shapes or dtypes; both are named.
  """
  score = _target_score(correct, lengths, target_lengths, sigma)
  return correct.astype(jnp.float32) + beta * score


def make(
    stage: str = 'discovery',
    alpha: float = 0.7,
    low: float = 0.3,
    high: float = 0.7,
    slope: float = 100.0,
    beta: float = 0.8,
    sigma: float = 120.0,
    cap: int = 4096,
    guidance: str = 'exact',
    statistic: str = 'median',
) -> types.Reward:
  """The plug-in, for one of the two stages.

  Args:
    stage: 'discovery' | 'internalisation'.
    alpha: discovery's weight of the length term.
    low: quantile of the correct lengths where the band begins.
    high: quantile where it ends.
    slope: tokens outside the band over which its reward falls to 0.
    beta: internalisation's weight of the length term.
    sigma: width of its Gaussian, tokens.
    cap: generation cap, tokens.
    guidance: where internalisation states n: the 'exact' number at the start
      of the thinking, the 'range' of the band there, 'outside' it at the end
      of the question, 'implicit' nowhere.
    statistic: M(q) of the correct lengths: 'median' | 'mean' | 'min'.
  """
  for what, got, legal in (('stage', stage, STAGES),
                           ('guidance', guidance, GUIDANCES),
                           ('statistic', statistic, STATISTICS)):
    if got not in legal:
      raise ValueError(f'lapo: {what} is {got!r}, expected one of {legal}.')
  if not 0 <= low <= high <= 1:
    raise ValueError(f'lapo: low {low} and high {high}: expected quantiles, '
                     '0 <= low <= high <= 1.')
  for what, width in (('slope', slope), ('sigma', sigma)):
    if not width > 0:
      raise ValueError(f'lapo: {what} is {width}, expected tokens above 0.')

  def init(num_examples):
    # Three buffers, not one thrice: the loop donates its state.
    return {name: jnp.full((num_examples,), cap, jnp.float32)
            for name in ('target', 'low', 'high')}

  def instruct(example, index, state, rng):
    del rng
    numbers = {name: int(state[name][index]) for name in state}
    return _state_budget(example, guidance, **numbers)

  def discover(outcomes, state):
    correct = outcomes.correct.astype(jnp.float32)
    score = _band_score(correct, outcomes.lengths, low, high, slope)
    return (types.Rewards({'correct': correct, 'length': alpha * score}),
            remember(outcomes, state))

  def internalise(outcomes, state):
    correct, lengths = outcomes.correct.astype(jnp.float32), outcomes.lengths
    # Unsolved before, the cap is no target: the group centres on itself.
    own = ops.masked_quantile(lengths, _is_correct(correct), 0.5)
    stated = outcomes.target_lengths
    centre = jnp.where(stated < cap, stated, own)
    score = _target_score(correct, lengths, centre, sigma)
    return (types.Rewards({'correct': correct, 'length': beta * score}),
            remember(outcomes, state))

  remember = functools.partial(
      _refresh if stage == 'discovery' else _lower, low=low, high=high,
      cap=cap, statistic=statistic)
  if stage == 'discovery':
    return types.Reward(discover, init, remember=remember)
  return types.Reward(internalise, init, instruct, remember=remember)


def _refresh(outcomes: types.Outcomes, state: Memory, *, low, high, cap,
             statistic) -> Memory:
  """M(q) becomes the group's, whatever it was; the cap if none is correct."""
  solved, found = _group_facts(outcomes.correct, outcomes.lengths, low, high,
                               statistic)
  return {name: state[name].at[outcomes.prompt_index].set(
      jnp.where(solved, found[name], cap)) for name in state}


def _lower(outcomes: types.Outcomes, state: Memory, *, low, high, cap,
           statistic) -> Memory:
  """M(q) becomes the group's if that is lower or the first."""
  solved, found = _group_facts(outcomes.correct, outcomes.lengths, low, high,
                               statistic)
  index = outcomes.prompt_index
  old = state['target'][index]
  better = solved & ((old >= cap) | (found['target'] < old))
  return {name: state[name].at[index].set(
      jnp.where(better, found[name], state[name][index])) for name in state}


def _state_budget(example: types.Example, guidance: str, target: int, low: int,
                  high: int) -> types.Example:
  """The example with its budget, and the sentence that states it."""
  example = example.replace(target_length=target)
  if guidance == 'implicit':
    return example
  if guidance == 'outside':
    return example.replace(question=f'{example.question} Answer the question '
                                    f'with {target} tokens.')
  number = f'{low} to {high}' if guidance == 'range' else target
  return example.replace(prefill=f'{example.prefill} I will answer the '
                                 f'question with {number} tokens.')


def _is_correct(correct: Shaped[Array, 'P G']) -> Bool[Array, 'P G']:
  return correct.astype(jnp.float32) > 0.5


def _band_score(correct: Shaped[Array, 'P G'], lengths: Num[Array, 'P G'],
                low: ScalarLike, high: ScalarLike,
                slope: ScalarLike) -> Float[Array, 'P G']:
  """1 in the band of correct lengths, falling to 0 outside, 0 if wrong."""
  _arrays.check('P G', correct=correct, lengths=lengths)
  member = _is_correct(correct)
  begin = ops.masked_quantile(lengths, member, low)[:, None]
  end = ops.masked_quantile(lengths, member, high)[:, None]
  outside = jnp.maximum(jnp.maximum(begin - lengths, lengths - end), 0.0)
  return jnp.where(member, jnp.maximum(1.0 - outside / slope, 0.0), 0.0)


def _target_score(correct: Shaped[Array, 'P G'], lengths: Num[Array, 'P G'],
                  target_lengths: Num[Array, 'P'],
                  sigma: ScalarLike) -> Float[Array, 'P G']:
  """A Gaussian of the distance to the target, 0 if wrong."""
  _arrays.check('P G', correct=correct, lengths=lengths)
  _arrays.check_prompts(lengths, target_lengths=target_lengths)
  distance = (lengths - target_lengths[:, None]) / sigma
  return jnp.where(_is_correct(correct), jnp.exp(-(distance**2) / 2.0), 0.0)


def _group_facts(
    correct: Shaped[Array, 'P G'], lengths: Num[Array, 'P G'], low: float,
    high: float, statistic: str,
) -> tuple[Bool[Array, 'P'], dict[str, Float[Array, 'P']]]:
  """Which groups have a correct completion, and what M(q) and band they find.
  """
  member = _is_correct(correct)
  quantile = lambda q: ops.masked_quantile(lengths, member, q)
  if statistic == 'mean':
    target = ops.masked_mean(lengths, member)
  else:
    target = quantile(0.0 if statistic == 'min' else 0.5)
  found = {'target': target, 'low': quantile(low), 'high': quantile(high)}
  return jnp.any(member, axis=-1), found
