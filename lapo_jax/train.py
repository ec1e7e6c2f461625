# SPDX-License-Identifier: Apache-2.0
"""Composes the rooms: `prepare` builds the stages, `train_stage` loops.

A step of training is a sentence: choose prompts, sample groups, grade
outcomes, reward, advantages, update. A run is a tuple of stages; at a stage's
start the optimizer is new and the reference policy is the policy as it
stands, while the method's memory passes on.
"""

from collections.abc import Callable
import functools
import itertools
import pathlib
import time
from typing import Any

from absl import logging
import jax
import ml_collections
import numpy as np

from lapo_jax import advantages as advantages_lib
from lapo_jax import (
    build,
    checks,
    groups,
    grpo,
    hosts,
    metrics,
    ops,
    report,
    rollout,
    stages,
    types,
    wording,
)
from lapo_jax import evaluate as evaluate_lib

# A run that skips this many updates in a row has nothing left to learn from.
_MAX_NONFINITE = 3


class TrainingError(RuntimeError):
  """Training broke down; the message says what to change."""


def train_stage(run: build.Run, state: types.TrainState, ref_params: Any, *,
                last_step: int, writer: metrics.Writer,
                save: Callable) -> types.TrainState:
  """Trains from `state.step` to `last_step`.

  Raises:
    TrainingError: several updates in a row were not finite.
    hosts.Stopped: one of several hosts was sent SIGTERM.
  """
  config = run.config
  on_policy = checks.updates_per_batch(config) == 1
  apply_reward = jax.jit(run.reward.apply)
  remember = jax.jit(run.reward.remember)
  first_step = int(state.step)
  bar = wording.progress(last_step, first_step, run.name)

  for step in range(first_step, last_step):
    timer = metrics.Timer()
    found = groups.collect(run, state, step, timer)
    samples, outcomes, graded = found.samples, found.outcomes, found.graded

    with timer('advantages'):
      rewards, reward_state = apply_reward(outcomes, state.reward_state)
      for others in found.replaced:
        reward_state = remember(others, reward_state)
      advantages = advantages_lib.from_rewards(rewards, outcomes.lengths,
                                               **config.advantage)
      slots = ops.bucket(int(np.max(graded.outcomes.lengths)),
                         config.rollout.max_completion_length)
      trained = run.mute and run.mute(samples, outcomes.correct)
      dropped = outcomes.truncated if config.loss.drop_truncated else None
      batch = run.make_batch(samples, advantages, slots, trained, dropped)

    with timer('score'):
      lengths = run.layout.lengths(batch.rollout)
      scored = lambda params: run.layout.score(  # noqa: E731
          functools.partial(run.score, params), batch, lengths)  # noqa: B023
      batch = batch.replace(
          old_logprobs=None if on_policy else scored(state.params),
          ref_logprobs=(None if ref_params is None else
                        scored(run.bring(ref_params))))
      jax.block_until_ready(batch)

    updates = []
    with timer('update'):
      for part, rows in grpo.minibatches(
          batch, config.updates.num_epochs, config.updates.num_minibatches,
          config.loss.aggregate):
        part = run.layout.arrange(part, lengths[rows])
        state, one = run.update(state, part)  # donates state
        updates.append(one)
      state = state.replace(step=state.step + 1, reward_state=reward_state)
      nonfinite = int(state.nonfinite)

    if nonfinite >= _MAX_NONFINITE:
      advice = ('lower optimizer.learning_rate'
                if np.isfinite(rewards.total).all() else
                f'the rewards of {config.reward.name} are not: mend its '
                'settings or its formula')
      raise TrainingError(
          f'step {step}: loss or gradient was not finite {nonfinite} times in '
          f'a row; parameters are as before the first. Expected numbers: '
          f'{advice}, or look at the samples of these steps.')
    bar.update()
    update_metrics = grpo.merge(updates) | {
        'update/nonfinite': nonfinite, 'rollout/rounds': found.rounds}
    _log(run, writer, step, last_step,
         metrics.summary(outcomes, rewards, advantages, update_metrics, timer),
         lambda: _samples(graded, found.examples, rewards))  # noqa: B023
    reached = None
    last = step == last_step - 1  # whose evaluation is the stage's record
    if metrics.every(step, config.eval_every) and not last:
      reached = stages.evaluate(run, state.params)
      writer.write(step, run.name,
                   evaluate_lib.scalars(reached, config.task.name))
    asked = hosts.asked_to_stop(step)
    if asked or metrics.every(step, config.checkpoint_every,
                              last=last_step - 1):
      save(state, reached and reached['accuracy'])
    if asked:
      raise hosts.Stopped(
          f'asked to end after step {step}, which is saved: the same '
          'command, on all hosts again, goes on from there.')

  bar.close()
  return state


def train_and_evaluate(config: ml_collections.ConfigDict,
                       workdir: str) -> types.TrainState:
  """Trains every stage, or what is left of them, and writes the summary.

  Run again after a kill, it goes on from the last checkpoint and ends with
  the same bits.

  Args:
    config: see configs/default.py.
    workdir: the run's folder: config.json, metrics.jsonl, checkpoints/,
      stages/, summary.json, summary.png.

  Raises:
    ValueError: a setting that does not fit, or a folder of another run;
      nothing has been computed or written.
    TrainingError: training broke down.
    hosts.Stopped: one of several hosts was sent SIGTERM.
  """
  return train(prepare(config, workdir), workdir)


def prepare(config: ml_collections.ConfigDict,
            workdir: str) -> list[build.Run]:
  """Builds every stage and makes the folder this run's own.

  Raises:
    ValueError: as `train_and_evaluate`.
  """
  hosts.compare_start(config.to_json(sort_keys=True))
  runs = hosts.in_step(lambda: [
      build.build(name, stage) for name, stage in build.stage_configs(config)])
  stages.agree(runs)
  stages.claim(pathlib.Path(workdir), config, runs)
  return runs


def train(runs: list[build.Run], workdir: str) -> types.TrainState:
  """Trains the stages of `prepare`; see `train_and_evaluate`."""
  started = time.monotonic()
  workdir = pathlib.Path(workdir).absolute()
  ends = list(itertools.accumulate(run.config.total_steps for run in runs))
  logging.info('%d devices, %d stages, %d steps.', jax.device_count(),
               len(runs), ends[-1])
  current, state, spent = stages.resume(runs, workdir)
  seconds = lambda: spent + time.monotonic() - started

  with metrics.Writer(workdir, resume_step=int(state.step) - 1) as writer:
    record = functools.partial(stages.record, workdir, writer, int(state.step))
    record(0, runs[0], state.params, name='base', steps=0)
    for i in range(current, len(runs)):
      run = runs[i]
      if int(state.stage) < i:
        state = stages.begin(runs, i, state)
      save = lambda state, metric, i=i: stages.save(workdir, i, state,
                                                    seconds(), metric)
      with run.grader:
        run.grader.start()
        reference = stages.reference(runs, i, workdir)
        # By the same name: what is put away shall not stay on the devices.
        reference = reference and run.put_away(reference)
        state = train_stage(run, state, reference, last_step=ends[i],
                            writer=writer, save=save)
        record(i + 1, run, state.params, name=run.name, steps=ends[i])

  if jax.process_index() == 0:
    found = stages.records(workdir, len(runs) + 1)
    report.write_summary(workdir, found, seconds())
    print(report.table(found))
    print(f'Written: {workdir / "summary.json"} and summary.png')
  return state


def _log(run: build.Run, writer: metrics.Writer, step: int, last_step: int,
         scalars: dict[str, float], samples: Callable) -> None:
  """Numbers, and now and then what they mean and what the model wrote."""
  config = run.config
  if metrics.every(step, config.log_every):
    writer.write(step, run.name, scalars)
    logging.info('%s', wording.log_line(step, last_step, scalars))
  if step == 0 or metrics.every(step, config.samples_every):
    rows = samples()
    writer.write_samples(step, run.name, rows)
    completions = config.rollout.num_prompts * config.rollout.group_size
    for line in wording.explain(scalars, completions,
                                config.rollout.max_completion_length):
      logging.info('%s', line)
    logging.info('Samples of step %d:\n%s', step, wording.samples_table(rows))


def _samples(graded: rollout.Graded, examples: list[types.Example],
             rewards: types.Rewards, count: int = 4) -> list[dict[str, Any]]:
  """Rows of the samples table: completions from all over the batch."""
  totals, lengths = np.ravel(rewards.total), np.ravel(graded.outcomes.lengths)
  group_size = len(totals) // len(examples)
  if not len(graded.rows):  # all of its prompts were drawn again elsewhere
    return []
  picks = np.linspace(0, len(graded.rows) - 1, count).astype(int)
  return [{
      'prompt': (examples[b // group_size].question +
                 examples[b // group_size].prefill),
      'completion': graded.texts[i], 'gold': examples[b // group_size].answer,
      'verdict': graded.verdicts[i], 'length': int(lengths[b]),
      'reward': float(totals[b])
  } for i, b in zip(picks, graded.rows[picks], strict=True)]
