# SPDX-License-Identifier: Apache-2.0
"""The programs of a step and what they are called with, at their worst.

Every prompt and every completion is as long as its cap, and all slots are
busy. Arrays are shapes with places: nothing is allocated, and the devices need
not be here.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from lapo_jax import checks, forcing, sampling, sharding, slots, types
from lapo_jax import layout as layout_lib
from lapo_jax import programs as programs_lib
from lapo_jax import shards as shards_lib


class Case(NamedTuple):
  """A program, called.

  Attributes:
    function: jitted.
    arguments: shapes with places.
    beside: arrays likewise, which are kept meanwhile and are no arguments.
  """

  function: Any
  arguments: tuple
  beside: Any


class Sampler(NamedTuple):
  """The sampler's programs.

  Attributes:
    pooled: see `shards.Programs`.
    params: the copy of the parameters that it reads.
    cases: by name.
  """

  pooled: bool
  params: Any
  cases: dict[str, Case]


def sampler(config: ml_collections.ConfigDict, found: programs_lib.Programs,
            num_slots: int) -> Sampler:
  """`copy` of the parameters, `prefill`, `grow` (more pages) and `decode`.

  Args:
    config: one stage's.
    found: its programs.
    num_slots: completions that are decoded at once, on all devices.
  """
  settings = {key: value for key, value in found.sampler.items()
              if key != 'num_slots'}
  group_size = config.rollout.group_size
  programs = shards_lib.make(**settings, group_size=group_size,
                             page_size=sampling.PAGE)
  places, prompt_places, batch = settings['shardings']
  cap, shards = settings['max_completion_length'], programs.shards
  state = found.state_shapes
  trained = (state, reference(config, found))
  params = _placed(jax.eval_shape(found.to_sampler, state.params), places)

  # What one program hands to the next.
  def follow(f, *args):
    shapes = jax.eval_shape(f, *args)
    return _placed(shapes, batch).replace(
        pages=_placed(shapes.pages, programs.pages))

  plan = lambda numbers: _placed(jax.tree.map(
      lambda x: jax.ShapeDtypeStruct((math.prod(x.shape[:2]), *x.shape[2:]),
                                     jnp.int32), numbers), batch)
  key = jax.eval_shape(lambda: jax.random.key(0))
  numbers = [jax.ShapeDtypeStruct(
      (config.rollout.num_prompts * group_size,), dtype) for dtype in (
          jnp.float32, jnp.float32, jnp.int32, jnp.int32)]
  limits = settings['forced_words'] and forcing.Limits(*[numbers[-1]] * 3)
  tokens, job, kind, _ = jax.eval_shape(
      programs.begin, _prompts(config, prompt_places), key, *numbers, limits)
  tokens, job = _placed((tokens, job), batch)
  kind = _placed(kind, sharding.replicated(batch.mesh))

  prompts = config.rollout.num_prompts // shards
  rows = prompts * group_size
  most = min(-(-num_slots // shards), rows)
  pages = slots.make_store(
      np.full((shards, prompts), config.rollout.max_prompt_length),
      sampling.PAGE)
  own, columns = -(-cap // sampling.PAGE), 0
  if programs.pooled:
    job = job.replace(prompt_pages=plan(slots.prompt_pages(pages)))
    own += 1  # a completion begins with a part of its prompt
    columns = job.prompt_pages.shape[1] + own

  def start(count):
    """The first store, then what is left of it and the state: `count` pages."""
    first = follow(lambda *args: programs.first_store(
        *args, pages.size + (count if programs.pooled else 0)), params, tokens)
    state = follow(lambda hidden: programs.first_state(
        hidden, most, count, columns), first.hidden)
    if programs.pooled:
      return first, first.replace(pages=()), state.replace(pages=first.pages)
    return first, first, state

  total = slots.size(most * own)
  first, store, decoded = start(total)
  # The number of pages that comes before in the series.
  _, _, smaller = start(slots.size(2 * total // 3))
  into = slots.prefill_batches(
      pages, sampling.PREFILL_TOKENS // sampling.PAGE)[0]
  # With as many slots as rows, all prompts are asked for at once.
  ready = slots.ready(slots.first_view(shards, rows, rows), None, pages,
                      group_size, rows, False, programs.pooled)
  active = follow(programs.bring, store, plan(ready))
  layout = plan(slots.Layout(np.zeros((shards, most)),
                             np.zeros((shards, total))))
  return Sampler(programs.pooled, params, {
      'copy': Case(found.to_sampler, (state.params,), (
          state.opt_state, reference(config, found))),
      'prefill': Case(programs.prefill,
                      (params, tokens, *plan(into), first), trained),
      'grow': Case(programs.relay, (layout, smaller),
                   (trained, params, store, active)),
      'decode': Case(programs.decode, (params, job, store.hidden, active, kind,
                                       decoded), (trained, store.pages)),
  })


def trainer(config: ml_collections.ConfigDict, found: programs_lib.Programs,
            mesh: jax.sharding.Mesh) -> dict[str, Case]:
  """`update`, and `score` where the config asks for it.

  At the worst the short completions of `updates.short_share` are as long as
  the others, and no two share a row that `updates.pack` makes.
  """
  rollout, batch = config.rollout, sharding.batch(mesh)
  rows, cap = (rollout.num_prompts * rollout.group_size,
               rollout.max_completion_length)
  prompt = jax.ShapeDtypeStruct((rows, rollout.max_prompt_length), jnp.int32)
  completion = jax.ShapeDtypeStruct((rows, cap), jnp.int32)
  of = lambda s, dtype: jax.ShapeDtypeStruct(s.shape, dtype)
  samples = types.Rollout(
      prompt_tokens=prompt, prompt_mask=of(prompt, bool),
      completion_tokens=completion, completion_mask=of(completion, bool),
      action_mask=of(completion, bool),
      sampler_logprobs=of(completion, jnp.float32))
  advantages = jax.ShapeDtypeStruct(
      (rollout.num_prompts, rollout.group_size), jnp.float32)
  kept, state = reference(config, found), found.state_shapes
  compared = config.loss.kl_coef > 0
  off_policy = checks.updates_per_batch(config) > 1
  whole = jax.eval_shape(lambda *args: found.make_batch(*args, cap), samples,
                         advantages)
  whole = _placed(whole.replace(
      old_logprobs=whole.weights if off_policy else None,
      ref_logprobs=whole.weights if compared else None), batch)
  part = jax.tree.map(lambda x: jax.ShapeDtypeStruct(
      (x.shape[0] // config.updates.num_minibatches, *x.shape[1:]), x.dtype,
      sharding=batch), whole)
  laid = lambda batch_: _laid(found.layout, batch_, batch)
  cases = {'update': Case(found.update, (state, laid(part)), (kept, whole))}
  if off_policy or compared:
    # One program for both policies, which is given one of them.
    other = state.params if compared else ()
    cases['score'] = Case(found.score, (state.params, laid(whole).rollout),
                          (state.opt_state, other, whole))
  return cases


def lowered(config: ml_collections.ConfigDict, found: programs_lib.Programs,
            mesh: jax.sharding.Mesh) -> list[str]:
  """The text of each program of a stage, for hosts to compare."""
  every = {**sampler(config, found, found.sampler['num_slots']).cases,
           **trainer(config, found, mesh)}
  return [case.function.lower(*case.arguments).as_text()
          for case in every.values()]


def reference(config: ml_collections.ConfigDict,
              found: programs_lib.Programs) -> Any:
  """Shapes of the reference policy, where the devices keep one; else ()."""
  kept = config.loss.kl_coef > 0 and not config.updates.offload_reference
  return found.state_shapes.params if kept else ()


def device_bytes(tree: Any) -> int:
  """Bytes of arrays on one device, given their shapes and places."""
  return sum(x.dtype.itemsize * math.prod(x.sharding.shard_shape(x.shape))
             for x in jax.tree.leaves(tree))


def _laid(layout: layout_lib.Layout, batch: Any, place: Any) -> Any:
  """Shapes of a batch as score and update take it."""
  if not layout.packs:
    return batch
  rows, prompt = batch.rollout.prompt_mask.shape
  completion = batch.rollout.completion_mask.shape[1]
  plan = layout.plan(batch, np.full((rows, 2), (prompt, completion)))
  return _placed(jax.eval_shape(layout.pack, batch, plan), place)


def _prompts(config: ml_collections.ConfigDict,
             places: types.Prompts) -> types.Prompts:
  rollout = config.rollout
  shape = (rollout.num_prompts, rollout.max_prompt_length)
  numbers = jax.ShapeDtypeStruct(shape[:1], jnp.int32)
  return _placed(types.Prompts(
      tokens=jax.ShapeDtypeStruct(shape, jnp.int32),
      mask=jax.ShapeDtypeStruct(shape, bool), index=numbers,
      target_lengths=numbers), places)


def _placed(tree: Any, places: Any) -> Any:
  """Shapes with a place each, or all with the same."""
  if isinstance(places, jax.sharding.Sharding):
    places = jax.tree.map(lambda _: places, tree)
  return jax.tree.map(
      lambda s, place: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place),
      tree, places)
