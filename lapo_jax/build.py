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
import jax.numpy as jnp
import ml_collections
import optax

from lapo_jax import (
  checks,
  grpo,
  ops,
  plugins,
  rollout,
  sampling,
  sharding,
  types,
)
from lapo_jax import evaluate as evaluate_lib
from lapo_jax import grader as grader_lib
from lapo_jax import tokenizer as tokenizer_lib
from lapo_jax.models import _folders

STREAMS = ('init', 'sample', 'eval')


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
  make_batch: Callable
  split: Callable
  score: Callable
  update: Callable
  make_evaluate: Callable
  evaluate: Callable
  to_sampler: Callable
  load_params: Callable
  init_opt_state: Callable
  replicate: Callable
  state_shapes: types.TrainState
  manifest: dict[str, Any]


def stage_configs(
    config: ml_collections.ConfigDict,
) -> list[tuple[str, ml_collections.ConfigDict]]:
  """(name, config) of each stage: the base with the stage's overrides.

  Raises:
    ValueError: an override of a key that the config lacks.
  """
  found = []
  for i, overrides in enumerate(config.stages or ({},)):
    # Deep, so that references stay inside the copy; locked, so that a mistyped
    # override is no new key.
    stage = copy.deepcopy(config).lock()
    overrides = dict(overrides)
    name = overrides.pop('name', f'stage {i + 1}' if config.stages
                         else config.reward.name)
    try:
      stage.update_from_flattened_dict(overrides)
    except (KeyError, TypeError) as error:
      raise ValueError(f'stages[{i}]: {error.args[0]}') from error
    found.append((name, stage))
  return found


def build(name: str, config: ml_collections.ConfigDict) -> Run:
  """Everything a stage needs; checks what can be checked before any compute.

  Raises:
    ValueError: a setting that does not fit, with what to change.
  """
  checks.choices(config)
  # Mesh and model.
  mesh = sharding.make_mesh(**config.mesh)
  batch = sharding.batch(mesh)
  replicated = sharding.replicated(mesh)
  family = plugins.module('models', config.model.name)
  model_settings = _without_name(config.model)
  model = plugins.make('models', config.model.name, **model_settings)
  param_shapes = family.init_shapes(model)
  param_shardings = sharding.partition(family.PARTITION_RULES, param_shapes,
                                       mesh)
  checks.batches(config, sharding.batch_devices(mesh))

  # Task, text, method.
  tokenizer = tokenizer_lib.load(_folders.resolve(config.model.path))
  task_settings = _without_name(config.task)
  task, eval_task = _make_tasks(config, task_settings)
  reward_settings = _without_name(config.reward)
  reward = plugins.make('rewards', config.reward.name, **reward_settings)
  prompt_shardings = types.Prompts(tokens=batch, mask=batch, index=replicated,
                                   target_lengths=replicated)
  encode = rollout.make_encode_fn(
      tokenizer, config.rollout.template, config.rollout.max_prompt_length,
      prompt_shardings)
  reward_shapes = checks.reward(config, reward, len(task))
  checks.prompts(config, task, eval_task, encode, reward,
                 jax.device_get(reward.init(len(task))))
  # A worker holds one task: held-out problems are graded by the same code.
  grader = grader_lib.Grader((config.task.name, task_settings),
                             (config.reward.name, reward_settings),
                             **config.grader)

  # Optimizer and state, as shapes: nothing is allocated yet.
  optimizer = make_optimizer(config)
  opt_shapes = jax.eval_shape(optimizer.init, param_shapes)
  scalar = jax.ShapeDtypeStruct((), jnp.int32)
  shapes = types.TrainState(
      step=scalar, stage=scalar, nonfinite=scalar, params=param_shapes,
      opt_state=opt_shapes, reward_state=reward_shapes)
  everywhere = lambda tree: jax.tree.map(lambda _: replicated, tree)
  opt_shardings = sharding.partition_like(param_shardings, opt_shapes, mesh)
  state_shardings = types.TrainState(
      step=replicated, stage=replicated, nonfinite=replicated,
      params=param_shardings, opt_state=opt_shardings,
      reward_state=everywhere(reward_shapes))
  state_shapes = jax.tree.map(
      lambda s, place: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place),
      shapes, state_shardings)

  # The programs; XLA compiles each when its first shapes arrive.
  sampler_shardings = sharding.for_sampling(param_shardings)
  sampler_model = model.clone(
      dtype=jnp.dtype(config.rollout.dtype or model.dtype))
  make_sample = functools.partial(
      sampling.make_sample_fn, sampler_model, eos_ids=tokenizer.eos_ids,
      pad_id=tokenizer.pad_id,
      num_slots=_num_slots(config, sampler_model, mesh),
      cache_dtype=config.rollout.cache_dtype,
      max_completion_length=config.rollout.max_completion_length,
      shardings=(sampler_shardings, prompt_shardings, batch))
  # Weights as the sampler reads them, once for all its steps.
  to_sampler = lambda params: jax.tree.map(
      lambda x: x.astype(sampler_model.dtype), params)
  forward = {'temperature': config.rollout.temperature,
             'microbatch_size': config.updates.microbatch_size}
  make_batch = grpo.make_batch_fn(config.loss.aggregate, shardings=batch)
  score = grpo.make_score_fn(model, shardings=(param_shardings, batch),
                             **forward)
  update = grpo.make_update_fn(
      model, optimizer, shardings=(state_shardings, batch),
      clip_low=config.loss.clip_low, clip_high=config.loss.clip_high,
      kl_coef=config.loss.kl_coef,
      importance_cap=config.loss.importance_cap, **forward)
  group = lambda found: {name: ops.to_groups(x, config.rollout.group_size)
                         for name, x in found.items()}
  place = lambda f, to: jax.jit(f, in_shardings=(param_shardings,),
                                out_shardings=to)

  sample_held_out = make_sample(group_size=config.eval.num_samples)
  make_evaluate = lambda problems: evaluate_lib.make_evaluate_fn(
      sample_held_out, encode, problems, grader, tokenizer,
      batch_size=config.eval.batch_size, temperature=config.eval.temperature,
      key=key(config.seed, 'eval', 0))
  return Run(
      name=name, config=config, task=task, eval_task=eval_task,
      tokenizer=tokenizer, grader=grader, reward=reward, encode=encode,
      group=jax.jit(group, out_shardings=replicated),
      sample=make_sample(group_size=config.rollout.group_size),
      make_batch=make_batch, split=grpo.make_split_fn(batch), score=score,
      update=update, make_evaluate=make_evaluate,
      evaluate=make_evaluate(eval_task),
      to_sampler=place(to_sampler, sampler_shardings),
      load_params=lambda: family.load(config.model.path, model,
                                      param_shardings),
      init_opt_state=place(optimizer.init, opt_shardings),
      replicate=lambda tree: sharding.to_global(tree, replicated),
      state_shapes=state_shapes, manifest=_manifest(task, eval_task))


def make_optimizer(
    config: ml_collections.ConfigDict) -> optax.GradientTransformation:
  """AdamW; warm-up, then a cosine down to a share of the learning rate."""
  settings = config.optimizer
  updates = (config.total_steps * config.updates.num_epochs *
             config.updates.num_minibatches)
  warmup = max(1, round(settings.warmup_share * updates))
  # Not from 0: the first update of a stage counts too. A stage of one update
  # has a warm-up and nothing to decay.
  schedule = optax.warmup_cosine_decay_schedule(
      settings.learning_rate / (warmup + 1), settings.learning_rate, warmup,
      max(updates, warmup + 1),
      settings.final_share * settings.learning_rate)
  return optax.chain(
      optax.clip_by_global_norm(settings.clip_norm),
      optax.adamw(schedule, b1=settings.b1, b2=settings.b2,
                  weight_decay=settings.weight_decay))


def key(seed: int, stream: str, step: int) -> jax.Array:
  """The random key of a stream at a step; nothing is stored or split."""
  root = jax.random.fold_in(jax.random.key(seed), STREAMS.index(stream))
  return jax.random.fold_in(root, step)


def _num_slots(config: ml_collections.ConfigDict, model: Any,
               mesh: jax.sharding.Mesh) -> int:
  """Decode slots on all devices: as asked, or what memory holds."""
  settings = config.rollout
  if settings.num_slots:
    return settings.num_slots
  memory = sharding.device_memory(mesh)
  fits = mesh.size * sampling.slots_that_fit(
      model, cache_dtype=settings.cache_dtype,
      max_completion_length=settings.max_completion_length,
      max_prompt_length=settings.max_prompt_length,
      memory=int(settings.cache_share * memory))
  asked = settings.num_prompts * settings.group_size
  logging.info(
      'rollout.num_slots: %d of %d completions are decoded at once; %d fit '
      'into %.2g of the %.3g GB of each of %d devices.', min(fits, asked),
      asked, fits, settings.cache_share, memory / 1e9, mesh.size)
  return fits


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
