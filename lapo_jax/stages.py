# SPDX-License-Identifier: Apache-2.0
"""A run's folder and what lies between its stages.

`agree` asks all hosts whether they are about to do the same, `claim` makes
the folder this run's own, `resume` finds where it stopped,
`begin` and `reference` make what is new at a stage's start, `record` keeps
what a stage reached. Each stage has a folder of checkpoints of its own: the
last of one is the reference policy of the next.
"""

import json
import pathlib
from typing import Any

from absl import logging
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from lapo_jax import build, checkpoint, hosts, metrics, types, workdir
from lapo_jax import evaluate as evaluate_lib
from lapo_jax.models import _folders

# Keys in which a resumed run may differ: they change no number it computes,
# those that follow the devices none but by rounding.
_FREE_KEYS = ('mesh', 'updates.microbatch_size', 'updates.remat',
              'updates.offload_reference', 'rollout.num_slots',
              'rollout.max_prompt_length', 'rollout.cache_share',
              'rollout.grade_ahead', 'grader', 'log_every', 'samples_every',
              'eval_every', 'checkpoint_every')


def agree(runs: list[build.Run]) -> None:
  """Checks that every host is about to run the same programs on the same data.

  The programs are those that sample, score and update, lowered for the
  longest prompts and completions.

  Raises:
    ValueError: a host differs; the message says which and in what.
  """
  if jax.process_count() == 1:
    return
  facts = {'data': {run.name: run.manifest for run in runs}}
  for run in runs:
    facts[f'programs of stage {run.name!r}'] = run.lowered()
  hosts.compare(facts)


def claim(folder: pathlib.Path, config: ml_collections.ConfigDict,
          runs: list[build.Run]) -> None:
  """Makes the folder this run's own: config.json, data.json and model.json.

  Raises:
    ValueError: it holds a run with another config or of other problems;
      nothing is written.
  """
  workdir.claim(folder, {
      'config.json': json.loads(config.to_json()),
      'data.json': {run.name: run.manifest for run in runs},
      'model.json': {'fingerprint': _folders.fingerprint(config.model.path)},
  }, _FREE_KEYS)


def resume(runs: list[build.Run],
           folder: pathlib.Path) -> tuple[int, types.TrainState, float]:
  """(stage, state, seconds spent) of the newest checkpoint, or of a start.

  Raises:
    checkpoint.DamagedError: nothing that was saved can be read, or not what
      the stages before have reached.
  """
  newest_first = list(reversed(range(len(runs))))
  found = checkpoint.restore_first([
      (_checkpoints(folder, i), runs[i].state_shapes) for i in newest_first])
  if found is not None:
    place, state, meta = found
    stage = newest_first[place]
    # Asked now: the summary wants them, and they cannot be made again.
    hosts.from_first(lambda: records(folder, stage + 1) and None)
    logging.info('Goes on from step %d (%s).', int(state.step),
                 runs[stage].name)
    return stage, state, meta['seconds']
  run = runs[0]
  params = run.load_params()
  zero = lambda: run.replicate(np.int32(0))
  return 0, types.TrainState(
      step=zero(), stage=zero(), nonfinite=zero(), params=params,
      opt_state=run.init_opt_state(params),
      reward_state=run.replicate(run.reward.init(len(run.task)))), 0.0


def save(folder: pathlib.Path, stage: int, state: types.TrainState,
         seconds: float, metric: float | None) -> None:
  """Writes a checkpoint; `seconds` is what the run has taken so far."""
  checkpoint.save(_checkpoints(folder, stage), int(state.step), state,
                  {'seconds': seconds, 'step': int(state.step)}, metric)


def begin(runs: list[build.Run], stage: int,
          state: types.TrainState) -> types.TrainState:
  """The state at a stage's start: new optimizer, the memory passes on.

  To the same method, that is, if it keeps as much: another may mean something
  else by the same shapes.
  """
  run, memory = runs[stage], state.reward_state
  if (run.config.reward.name != runs[stage - 1].config.reward.name or
      jax.tree.map(jnp.shape, memory) !=
      jax.tree.map(jnp.shape, run.state_shapes.reward_state)):
    memory = run.replicate(run.reward.init(len(run.task)))
  return state.replace(
      stage=run.replicate(np.int32(stage)), reward_state=memory,
      nonfinite=run.replicate(np.int32(0)),
      opt_state=run.init_opt_state(state.params))


def reference(runs: list[build.Run], stage: int,
              folder: pathlib.Path) -> Any:
  """Parameters of the policy at the stage's start, None if none is asked.

  They are the pretrained ones, or the last checkpoint of the stage before.
  """
  run = runs[stage]
  if run.config.loss.kl_coef == 0:
    return None
  if stage == 0:
    return run.load_params()
  place = _checkpoints(folder, stage - 1)
  params, meta = checkpoint.restore_latest(
      place, runs[stage - 1].state_shapes.params, field='params')
  end = sum(r.config.total_steps for r in runs[:stage])
  if meta['step'] != end:
    raise checkpoint.DamagedError(
        f'{place}: the checkpoint of step {end}, the reference policy of '
        f'stage {run.name!r}, is damaged; expected it whole.')
  return params


def record(folder: pathlib.Path, writer: metrics.Writer, first_step: int,
           number: int, run: build.Run, params: Any, *, name: str,
           steps: int) -> None:
  """Evaluates at a stage's end, once: the summary's row of this stage."""
  file = _record_file(folder, number)
  found = hosts.from_first(lambda: _read(file) if file.exists() else None)
  if found is None:
    with run.grader:
      found = evaluate(run, params)
    if jax.process_index() == 0:
      file.parent.mkdir(parents=True, exist_ok=True)
      metrics.replace_text(file, metrics.to_json(
          {'name': name, 'steps': steps, **found}, indent=2))
  # Its line counts completed steps. A run that resumes at `first_step` has cut
  # what it repeats from there on, this line too, whenever it was killed.
  if steps >= first_step:
    writer.write(steps, run.name,
                 evaluate_lib.scalars(found, run.config.task.name))


def records(folder: pathlib.Path, count: int) -> list[dict[str, Any]]:
  """The rows of the summary: the base, then each stage.

  Raises:
    checkpoint.DamagedError: one of them is not what was written.
  """
  return [_read(_record_file(folder, i)) for i in range(count)]


def evaluate(run: build.Run, params: Any) -> evaluate_lib.Found:
  """Evaluates on the held-out problems, and says what came out."""
  found = run.evaluate(run.to_sampler(params))
  logging.info('%s: held out: accuracy %.1f %%, mean tokens %.1f, truncated '
               '%.1f %%', run.name, 100 * found['accuracy'],
               found['mean_tokens'], 100 * found['truncated'])
  return found


def _read(file: pathlib.Path) -> dict[str, Any]:
  try:
    return json.loads(file.read_text())
  except (OSError, ValueError) as error:
    raise checkpoint.DamagedError(
        f'{file}: expected what the run has written there, for its summary: '
        f'{error}. Put it back, or start in another --workdir.') from error


def _checkpoints(folder: pathlib.Path, stage: int) -> pathlib.Path:
  return folder / 'checkpoints' / str(stage)


def _record_file(folder: pathlib.Path, number: int) -> pathlib.Path:
  return folder / 'stages' / f'{number}.json'
