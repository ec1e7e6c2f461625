# SPDX-License-Identifier: Apache-2.0
"""From a config to the programs and places of a stage, all checked.

`build` is the one room that knows how a config's sections map onto the
arguments of the others, one section to one function. Whatever a user can get
wrong is refused here, before any compute and before anything is written.
"""

from collections.abc import Callable
import copy
import functools
import hashlib
from typing import Any, NamedTuple

from absl import logging
import jax
import ml_collections
import numpy as np

from lapo_jax import (
  cases,
  checks,
  forcing,
  ops,
  plugins,
  programs,
  rollout,
  sampling,
  sharding,
  types,
)
from lapo_jax import evaluate as evaluate_lib
from lapo_jax import grader as grader_lib
from lapo_jax import layout as layout_lib
from lapo_jax import tokenizer as tokenizer_lib
from lapo_jax.models import _folders

STREAMS = ('init', 'sample', 'eval')
# How parameters are held.
_OF_ALL_STAGES = ('model', 'mesh', 'updates.scan_layers')


class Run(NamedTuple):
  """What the loop uses, bound to one stage's config."""

  name: str
  config: ml_collections.ConfigDict
  task: types.Task
  eval_task: types.Task
  tokenizer: tokenizer_lib.Tokenizer
  grader: grader_lib.Grader
  reward: types.Reward
  encode: Callable
  group: Callable
  sample: Callable
  mute: Callable | None
  make_batch: Callable
  layout: layout_lib.Layout
  score: Callable
  update: Callable
  make_evaluate: Callable
  evaluate: Callable
  to_sampler: Callable
  load_params: Callable
  put_away: Callable
  bring: Callable
  init_opt_state: Callable
  replicate: Callable
  state_shapes: types.TrainState
  lowered: Callable
  manifest: dict[str, Any]


def stage_configs(
    config: ml_collections.ConfigDict,
) -> list[tuple[str, ml_collections.ConfigDict]]:
  """(name, config) of each stage: the base with the stage's overrides.

  Raises:
    ValueError: an override of a key that the config lacks, or of how the
      parameters are held.
  """
  found = []
  for i, overrides in enumerate(config.stages or ({},)):
    # Deep, so that references stay inside the copy; locked, so that a mistyped
    # override is no new key.
    stage = copy.deepcopy(config).lock()
    overrides = dict(overrides)
    name = overrides.pop('name', f'stage {i + 1}' if config.stages
                         else config.reward.name)
    if not isinstance(name, str) or not name or name in dict(found):
      raise ValueError(f'stages[{i}]: got the name {name!r}: expected a text '
                       'that no other stage has.')
    try:
      stage.update_from_flattened_dict(overrides)
    except (KeyError, TypeError) as error:
      raise ValueError(f'stages[{i}]: {error.args[0]}') from error
    for key in _OF_ALL_STAGES:
      if str(stage[key]) != str(config[key]):
        raise ValueError(
            f'stages[{i}]: got {key} of its own, but parameters pass from '
            'stage to stage as they are and where they are; set it for all.')
    found.append((name, stage))
  return found


def build(name: str, config: ml_collections.ConfigDict) -> Run:
  """Everything a stage needs; checks what can be checked before any compute.

  Raises:
    ValueError: a setting that does not fit, with what to change.
  """
  mesh = programs.make_mesh(config)
  replicated = sharding.replicated(mesh)
  family = plugins.module('models', config.model.name)
  model_settings = _without_name(config.model)
  model = plugins.make('models', config.model.name, **model_settings)

  if config.model.get('param_dtype') == 'bfloat16':
    logging.warning('model.param_dtype bfloat16: an update below 1/512 of a '
                    'parameter is lost, which is most of them at the usual '
                    'learning rates; float32 keeps them, with model.dtype '
                    'bfloat16 for the arithmetic.')

  # Task, text, method.
  tokenizer = tokenizer_lib.load(_folders.resolve(config.model.path))
  checks.tokens(tokenizer, model.vocab_size)
  task_settings = _without_name(config.task)
  task, eval_task = _make_tasks(config, task_settings)
  reward_settings = _without_name(config.reward)
  reward = plugins.make('rewards', config.reward.name, **reward_settings)
  encode = rollout.make_encode_fn(
      tokenizer, config.rollout.template, config.rollout.max_prompt_length,
      programs.prompt_places(mesh))
  names = checks.text(task, reward)
  reward_shapes = checks.reward(config, reward, len(task), names)
  checks.prompts(config, task, eval_task, encode, reward,
                 jax.device_get(reward.init(len(task))))
  # A worker holds one task: held-out problems are graded by the same code.
  grader = grader_lib.Grader((config.task.name, task_settings),
                             (config.reward.name, reward_settings),
                             names=names, **config.grader)

  words, limits = _forcing(config, tokenizer)
  found = programs.make(config, model, mesh, eos_ids=tokenizer.eos_ids,
                        pad_id=tokenizer.pad_id, reward_shapes=reward_shapes,
                        forced_words=words)
  make_sample = functools.partial(sampling.make_sample_fn, **found.sampler)
  group = lambda grades: {name: ops.to_groups(x, config.rollout.group_size)
                         for name, x in grades.items()}
  # From where the sampler has its rows.
  to_batch = jax.jit(lambda x: x, out_shardings=sharding.batch(mesh))
  score = lambda params, rows: found.score(params, to_batch(rows))

  sample = functools.partial(
      make_sample(group_size=config.rollout.group_size), forced=limits)
  sample_held_out = functools.partial(
      make_sample(group_size=config.eval.num_samples,
                  max_completion_length=config.eval.max_completion_length or
                  config.rollout.max_completion_length),
      forced=limits and limits.replace(first=-1))
  mute = reward.mute and _make_mute(reward.mute(tokenizer.pieces()))
  make_evaluate = lambda problems: evaluate_lib.make_evaluate_fn(
      sample_held_out, encode, problems, grader, tokenizer,
      batch_size=config.eval.batch_size, temperature=config.eval.temperature,
      key=key(config.seed, 'eval', 0))
  return Run(
      name=name, config=config, task=task, eval_task=eval_task,
      tokenizer=tokenizer, grader=grader, reward=reward, encode=encode,
      group=jax.jit(group, out_shardings=replicated),
      sample=sample, mute=mute, make_batch=found.make_batch,
      layout=found.layout, score=score,
      update=found.update, make_evaluate=make_evaluate,
      evaluate=make_evaluate(eval_task), to_sampler=found.to_sampler,
      load_params=lambda: found.from_loaded(family.load(
          config.model.path, model, found.load_places)),
      put_away=found.put_away, bring=found.bring,
      init_opt_state=found.init_opt_state,
      replicate=lambda tree: sharding.to_global(tree, replicated),
      state_shapes=found.state_shapes,
      lowered=lambda: cases.lowered(config, found, mesh),
      manifest=_manifest(task, eval_task))


def _forcing(
    config: ml_collections.ConfigDict, tokenizer: tokenizer_lib.Tokenizer,
) -> tuple[forcing.Words | None, forcing.Limits | None]:
  """What the sampler writes by itself, and on which completions."""
  first, share, end, wait, least, most = (
      config.rollout.forced[key] for key in (
          'first', 'first_share', 'end', 'wait', 'least', 'most'))
  if not checks.forces(config):
    return None, None
  size = config.rollout.group_size
  member = np.arange(config.rollout.num_prompts * size) % size
  limits = forcing.Limits(
      first=(np.where(member < share * size, tokenizer.token(first), -1)
             if first else -1),
      least=least, most=most or np.iinfo(np.int32).max)
  word = lambda text, asked: tokenizer.token(text) if asked else -1
  return forcing.Words(end=word(end, least or most),
                       wait=word(wait, least)), limits


def _make_mute(mute: Callable) -> Callable:
  """`mute` of a method, jitted, for grades [P, G]."""
  return jax.jit(lambda samples, correct: mute(samples, ops.to_batch(correct)))


def key(seed: int, stream: str, step: int) -> jax.Array:
  """The random key of a stream at a step; nothing is stored or split."""
  root = jax.random.fold_in(jax.random.key(seed), STREAMS.index(stream))
  return jax.random.fold_in(root, step)


def _make_tasks(config: ml_collections.ConfigDict, settings: dict[str, Any]
                ) -> tuple[evaluate_lib.Part, evaluate_lib.Part]:
  """The training problems and the held-out ones; no text is in both.

  Held out are those of `eval.task`, or else the task's last
  `eval.num_examples`. Training problems that are held out too are left out:
  published files overlap.
  """
  name, most = config.task.name, config.eval.num_examples
  task = plugins.make('tasks', name, **settings)
  if config.eval.task:
    held_out = plugins.make('tasks', name, **{**settings, **config.eval.task})
    held_out = evaluate_lib.Part(held_out, range(len(held_out)))
    pool = range(len(task))
  elif most < len(task):
    pool = range(len(task) - most)
    held_out = evaluate_lib.Part(task, range(len(pool), len(task)))
  else:
    raise ValueError(f'eval.num_examples {most} leaves nothing to train on of '
                     f'{len(task)} problems: expected fewer, or eval.task.')
  shared = set(evaluate_lib.shared_questions(evaluate_lib.Part(task, pool),
                                             held_out))
  if len(shared) == len(pool):
    raise ValueError(f'all {len(pool)} training problems are held out too: '
                     'expected an eval.task with others.')
  if shared:
    logging.warning('%d of %d training problems are left out, for they are '
                    'held out too; the first is number %d.', len(shared),
                    len(pool), min(shared))
  return (evaluate_lib.Part(task, [i for i in pool if i not in shared]),
          evaluate_lib.Part(held_out, range(min(most, len(held_out)))))


def _manifest(task: evaluate_lib.Part,
              eval_task: evaluate_lib.Part) -> dict[str, Any]:
  """What a run is trained and evaluated on, for its data.json.

  The fingerprints change with any problem or answer, or their order.
  """
  parts = {'train': task, 'held_out': eval_task}
  return {name: {'problems': len(part), 'fingerprint': _fingerprint(part),
                 **part.manifest}
          for name, part in parts.items()}


def _fingerprint(task: types.Task) -> str:
  digest = hashlib.sha256()
  for i in range(len(task)):
    digest.update(repr(task[i]).encode('utf-8', 'backslashreplace'))
  return digest.hexdigest()


def _without_name(section: ml_collections.ConfigDict) -> dict[str, Any]:
  return {key: value for key, value in section.to_dict().items()
          if key != 'name'}
