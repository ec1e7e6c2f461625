# SPDX-License-Identifier: Apache-2.0
"""From a config and a model to the mesh and what runs on it.

Of shapes alone: neither weights nor text nor tasks are asked for, so that a
run and `plan` make the same programs.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from absl import logging
import jax
import jax.numpy as jnp
import ml_collections
import optax

from lapo_jax import (
    checks,
    forcing,
    grpo,
    hosts,
    plugins,
    sampling,
    sharding,
    stacking,
    types,
)
from lapo_jax import layout as layout_lib


class Programs(NamedTuple):
  """What runs on the mesh, and where its arrays lie; of shapes alone.

  Attributes:
    sampler: the arguments of `sampling.make_sample_fn`, but for group_size.
    make_batch: see `grpo.make_batch_fn`.
    layout: of the rows in the update.
    score: see `grpo.make_score_fn`.
    update: see `grpo.make_update_fn`.
    load_places: where a family's `load` shall put the parameters.
    from_loaded: what it returns -> the parameters as the state holds them.
    to_sampler: parameters -> their copy as the sampler reads it.
    put_away: the reference's parameters -> them where they wait.
    bring: what waits -> parameters to score with.
    init_opt_state: parameters -> the optimizer's state.
    state_shapes: a `types.TrainState` of shapes with their places.
  """

  sampler: dict[str, Any]
  make_batch: Callable
  layout: layout_lib.Layout
  score: Callable
  update: Callable
  load_places: Any
  from_loaded: Callable
  to_sampler: Callable
  put_away: Callable
  bring: Callable
  init_opt_state: Callable
  state_shapes: types.TrainState


def make_mesh(config: ml_collections.ConfigDict,
              devices: Sequence[Any] | None = None) -> jax.sharding.Mesh:
  """The mesh of a config whose own settings fit it and one another.

  Raises:
    ValueError: one that does not, with what to change.
  """
  checks.choices(config)
  mesh = sharding.make_mesh(**config.mesh, devices=devices)
  checks.batches(config, sharding.batch_devices(mesh),
                 sharding.sampling_devices(mesh))
  return mesh


def make(config: ml_collections.ConfigDict, model: Any,
         mesh: jax.sharding.Mesh, *, eos_ids: Sequence[int], pad_id: int,
         reward_shapes: Any, forced_words: forcing.Words | None = None,
    memory: int | None = None) -> Programs:
  """The programs of a stage.

  Args:
    config: the stage's.
    model: a model family's module.
    mesh: where they run.
    eos_ids: the stop tokens.
    pad_id: fills what follows one.
    reward_shapes: of the method's memory.
    forced_words: see `sampling.make_sample_fn`.
    memory: bytes of each device, None = as it says itself.
  """
  batch, replicated = sharding.batch(mesh), sharding.replicated(mesh)
  family = plugins.module('models', config.model.name)
  param_shapes = family.init_shapes(model)
  load_places = sharding.partition(family.PARTITION_RULES, param_shapes, mesh)
  param_shardings, from_loaded = load_places, lambda params: params
  if config.updates.scan_layers:
    param_shapes = stacking.shapes(model, param_shapes)
    param_shardings = stacking.places(model, load_places)
    from_loaded = lambda params: stacking.stack(model, params)

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
  sampler_shardings = sharding.for_sampling(load_places)
  rollout = config.rollout
  sampler_model = model.clone(dtype=jnp.dtype(rollout.dtype or model.dtype))
  sampler = {
      'model': sampler_model, 'eos_ids': eos_ids, 'pad_id': pad_id,
      'num_slots': num_slots(
          rollout, sampler_model, mesh, memory=memory,
          cap=max(rollout.max_completion_length,
                  config.eval.max_completion_length),
          asked=rollout.num_prompts * rollout.group_size),
      'cache_dtype': rollout.cache_dtype,
      'backend': _backend(mesh),
      'forced_words': forced_words,
      'max_completion_length': rollout.max_completion_length,
      'shardings': (sampler_shardings, prompt_places(mesh),
                    sharding.sampling_batch(mesh))}
  # Weights as the sampler reads them, once for all its steps.
  by_layer = lambda params: (model.unstack(params)
                             if stacking.is_stacked(params) else params)
  to_sampler = lambda params: jax.tree.map(
      lambda x: x.astype(sampler_model.dtype), by_layer(params))
  forward = {'temperature': rollout.temperature,
             'microbatch_size': config.updates.microbatch_size}
  # Which completions count is said with each batch.
  loss = {key: config.loss[key] for key in config.loss
          if key != 'drop_truncated'}
  make_batch = grpo.make_batch_fn(loss.pop('aggregate'), batch)
  score = grpo.make_score_fn(model, shardings=(param_shardings, batch),
                             **forward)
  update = grpo.make_update_fn(
      model.clone(remat=config.updates.remat), optimizer,
      shardings=(state_shardings, batch),
      **loss, **forward)
  waiting = param_shardings
  if config.updates.offload_reference:
    waiting = jax.tree.map(lambda x: x.with_memory_kind('pinned_host'),
                           waiting)
  place = lambda f, to: jax.jit(f, in_shardings=(param_shardings,),
                                out_shardings=to)
  return Programs(
      sampler=sampler, make_batch=make_batch, score=score, update=update,
      layout=layout_lib.make(
          microbatch_size=config.updates.microbatch_size,
          short_share=config.updates.short_share, pack=config.updates.pack,
          shardings=batch),
      put_away=lambda params: jax.device_put(params, waiting),
      bring=lambda params: jax.device_put(params, param_shardings),
      load_places=load_places, from_loaded=from_loaded,
      to_sampler=place(to_sampler, sampler_shardings),
      init_opt_state=place(optimizer.init, opt_shardings),
      state_shapes=state_shapes)


def make_optimizer(
    config: ml_collections.ConfigDict) -> optax.GradientTransformation:
  """AdamW; warm-up, then a cosine down to a share of the learning rate."""
  settings = config.optimizer
  updates = config.total_steps * checks.updates_per_batch(config)
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


def prompt_places(mesh: jax.sharding.Mesh) -> types.Prompts:
  """Where the fields of `types.Prompts` lie."""
  rows, replicated = sharding.sampling_batch(mesh), sharding.replicated(mesh)
  return types.Prompts(tokens=rows, mask=rows, index=replicated,
                       target_lengths=replicated)


def _backend(mesh: jax.sharding.Mesh) -> str:
  """Whose kernels the mesh's devices take, wherever they are compiled for."""
  platform = mesh.devices.flat[0].platform
  return platform if platform in ('tpu', 'gpu') else 'xla'


def num_slots(settings: ml_collections.ConfigDict, model: Any,
              mesh: jax.sharding.Mesh, *, cap: int, asked: int,
              memory: int | None = None) -> int:
  """Decode slots on all devices: as configured, or what memory holds.

  Args:
    settings: with num_slots, cache_share, cache_dtype and max_prompt_length.
    model: a model family's module, in the sampler's dtype.
    mesh: of the devices.
    cap: tokens that a completion may have.
    asked: completions that there are, for the log.
    memory: bytes of a device, None = what it has.
  """
  tensor, kv_heads = mesh.shape['tensor'], model.cache_shape()[1]
  parts = sharding.head_parts(kv_heads, tensor)
  if parts < tensor:
    logging.warning(
        'mesh.tensor %d does not divide the %d key heads of the model: each '
        'device holds the whole cache, and no kernel reads it.', tensor,
        kv_heads)
  if settings.num_slots:
    return settings.num_slots
  # Hosts differ a little in what they have.
  memory = memory or min(hosts.gather(sharding.device_memory(mesh)))
  shards = mesh.size // tensor * parts
  fits = shards * sampling.slots_that_fit(
      model, cache_dtype=settings.cache_dtype,
      max_completion_length=cap,
      max_prompt_length=settings.max_prompt_length,
      memory=int(settings.cache_share * memory), backend=_backend(mesh))
  logging.info(
      'num_slots: %d of %d completions are decoded at once; %d fit '
      'into %.2g of the %.3g GB of each of %d devices.', min(fits, asked),
      asked, fits, settings.cache_share, memory / 1e9, mesh.size)
  return fits
