# SPDX-License-Identifier: Apache-2.0
"""The first half of a step: choose prompts, sample groups, grade outcomes.

`collect` does so once, or in rounds: groups that are all right or all wrong
teach nothing, and DAPO (arXiv:2503.14476) draws others in their place until
the batch is full or the rounds are spent. Which prompts a round draws depends
on the seed, the step, the round and what the earlier ones drew, and on nothing
else: resume is exact.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, ScalarLike
import numpy as np

from lapo_jax import advantages as advantages_lib
from lapo_jax import build, metrics, rollout, types

# Tells the random numbers of `instruct` from others of the same seed.
_INSTRUCT = 2


class Groups(NamedTuple):
  """What a step has sampled and graded.

  Attributes:
    examples: of each prompt, as the method has instructed them.
    prompts: encoded.
    samples: a `types.Rollout`.
    graded: what grading found; its outcomes are of the task alone.
    outcomes: with what the method has measured, on devices.
    rounds: how often prompts were drawn.
    replaced: the outcomes of the groups that later rounds have taken the
      place of, or that they brought in vain; as many of each round.
  """

  examples: list[types.Example]
  prompts: types.Prompts
  samples: types.Rollout
  graded: rollout.Graded
  outcomes: types.Outcomes
  rounds: int
  replaced: tuple[types.Outcomes, ...] = ()


def collect(run: build.Run, state: types.TrainState, step: int,
            timer: metrics.Timer) -> Groups:
  """The groups of a step.

  Args:
    run: the stage.
    state: whose policy samples.
    step: the number of the step.
    timer: is told how long prompts, sampling and grading take.
  """
  settings = run.config.rollout
  groups, drawn = None, np.zeros(0, np.int64)
  with timer('sample'):
    policy = run.to_sampler(state.params)  # decode layout
  for turn in range(1 + settings.refill_rounds):
    indices = rollout.choose(len(run.task), settings.num_prompts, step,
                             run.config.seed, turn, drawn)
    if not len(indices):
      break  # every problem has been drawn
    drawn = np.append(drawn, indices)
    found = _sampled(run, policy, state, step, turn, indices, timer)
    groups = found if groups is None else _refilled(run, groups, found)
    if advantages_lib.informative(groups.outcomes.correct).all():
      break
  del policy  # frees the copy before the backward pass

  with timer('grade'):
    # Asks the policy about the groups that are left, not about all.
    score = lambda rows: run.score(state.params, rows)
    extras = run.group(run.reward.measure(groups.samples, score, run.encode))
  outcomes = groups.outcomes
  return groups._replace(outcomes=outcomes.replace(
      extras={**outcomes.extras, **extras}))


def _sampled(run: build.Run, policy: Any, state: types.TrainState, step: int,
             turn: int, indices: np.ndarray, timer: metrics.Timer) -> Groups:
  """The groups of one round."""
  config = run.config
  settings = config.rollout
  with timer('prompts'):
    memory = jax.device_get(state.reward_state)
    rng = np.random.default_rng((config.seed, _INSTRUCT, step, turn)[
        :4 if turn else 3])
    examples = [run.reward.instruct(run.task[int(i)], int(i), memory, rng)
                for i in indices]
    prompts = run.encode(examples, indices)
  with rollout.Ahead(run.grader, run.tokenizer, examples,
                     settings.group_size) as ahead:
    with timer('sample'):
      key = build.key(config.seed, 'sample', step)
      samples = jax.block_until_ready(run.sample(
          policy, prompts, jax.random.fold_in(key, turn) if turn else key,
          np.float32(settings.temperature),
          budgets=np.int32(rollout.cap(
              step, settings.max_completion_length, **settings.cap_cycle)),
          watch=ahead.watch if settings.grade_ahead else None))
    with timer('grade'):  # text on the host that holds it, numbers everywhere
      graded = rollout.grade(samples, prompts, examples, run.grader,
                             run.tokenizer, ahead)
      kept = (graded.outcomes.lengths if run.reward.trim is None else
              np.asarray(run.reward.trim(graded.outcomes)))
      if np.any(kept < graded.outcomes.lengths):
        samples = _placed(cut, samples, samples, kept.reshape(-1),
                          run.tokenizer.pad_id)
        graded = rollout.regrade(graded, samples, prompts, examples,
                                 run.grader, run.tokenizer)
  return Groups(examples, prompts, samples, graded,
                run.replicate(graded.outcomes), turn + 1)


def _refilled(run: build.Run, groups: Groups, found: Groups) -> Groups:
  """The groups with those of a later round in place of what teaches nothing."""
  groups, found = _alike(groups, found)
  takes = np.asarray(advantages_lib.refill(
      *(advantages_lib.informative(x.outcomes.correct)
        for x in (groups, found))))
  others = np.setdiff1d(np.arange(2 * len(takes)), takes)
  pick = lambda a, b: [(*a, *b)[i] for i in takes]
  first, second = ((x.prompts, x.samples, x.outcomes)
                   for x in (groups, found))
  prompts, samples, outcomes = _placed(take, first, first, second, takes)
  replaced = _placed(take, first[2], first[2], second[2], others)
  return Groups(
      examples=pick(groups.examples, found.examples), prompts=prompts,
      samples=samples, outcomes=outcomes, rounds=found.rounds,
      replaced=(*groups.replaced, replaced),
      graded=_merged(groups.graded, found.graded, takes)._replace(
          outcomes=jax.device_get(outcomes)))


def _alike(*rounds: Groups) -> list[Groups]:
  """The rounds with the same extras: 0 where a task has not named a grade."""
  zeros = jnp.zeros_like(rounds[0].outcomes.correct)
  names = sorted({name for one in rounds for name in one.outcomes.extras})
  return [one._replace(outcomes=one.outcomes.replace(extras={
      name: one.outcomes.extras.get(name, zeros) for name in names}))
          for one in rounds]


def cut(samples: types.Rollout, kept: Int[Array, 'B'] | Int[np.ndarray, 'B'],
        pad_id: ScalarLike) -> types.Rollout:
  """The completions without what follows their first `kept` tokens."""
  inside = jnp.arange(samples.completion_mask.shape[1])[None] < kept[:, None]
  return samples.replace(
      completion_tokens=jnp.where(inside, samples.completion_tokens, pad_id),
      completion_mask=samples.completion_mask & inside,
      action_mask=samples.action_mask & inside,
      sampler_logprobs=jnp.where(inside, samples.sampler_logprobs, 0.0))


def take(first: Any, second: Any,
         groups: Int[Array, 'P'] | Int[np.ndarray, 'P']) -> Any:
  """Prompts, samples, outcomes of these groups of two rounds.

  Args:
    first: of P groups.
    second: likewise.
    groups: int32 [P], numbers among the 2·P.
  """
  num_prompts = groups.shape[0]

  def pick(x, y):
    # Prompts of both rounds lie to the right of their slots.
    if x.ndim == 2 and x.shape[1] != y.shape[1]:
      width = max(x.shape[1], y.shape[1])
      x, y = (jnp.pad(z, ((0, 0), (width - z.shape[1], 0))) for z in (x, y))
    size = x.shape[0] // num_prompts
    rows = groups[:, None] * size + jnp.arange(size)[None]
    return jnp.concatenate([x, y])[rows.reshape(-1)]

  return jax.tree.map(pick, first, second)


def _placed(function: Callable, like: Any, *args: Any) -> Any:
  """What the function gives of device arrays, lying as those of `like` do."""
  places = jax.tree.map(lambda x: x.sharding, like)
  return jax.jit(function, out_shardings=places)(*args)


def _merged(first: rollout.Graded, second: rollout.Graded,
            takes: np.ndarray) -> rollout.Graded:
  """The texts that this host holds of the groups taken."""
  group_size = first.outcomes.lengths.shape[1]
  num_rows = first.outcomes.lengths.size
  known = {}
  for offset, graded in ((0, first), (num_rows, second)):
    known |= {offset + row: found for row, *found in zip(
        graded.rows.tolist(), graded.texts, graded.verdicts, graded.results,
        strict=True)}
  sources = (takes[:, None] * group_size + np.arange(group_size)).reshape(-1)
  here = [b for b, source in enumerate(sources) if source in known]
  texts, verdicts, results = ([known[sources[b]][i] for b in here]
                              for i in range(3))
  return first._replace(rows=np.array(here, int), texts=texts,
                        verdicts=verdicts, results=results)
