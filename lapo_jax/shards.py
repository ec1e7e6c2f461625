# SPDX-License-Identifier: Apache-2.0
"""The sampler's programs on all data shards side by side.

`prefilling` and `decoding` say what each does on one shard; here they are put
onto a mesh, with a place for everything that passes between them. A data shard
is one device, or those of a tensor axis, which share each layer.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np

from lapo_jax import (
    decoding,
    draws,
    forcing,
    paging,
    pools,
    prefilling,
    sharding,
    types,
)


class Programs(NamedTuple):
  """What `make` makes; `sampling` says in which order they run.

  Attributes:
    pooled: whether keys and values lie in a pool.
    alone: whether a shard shares no step with others, and may end its run.
    shards: how many.
    pages: where keys and values lie; None = one device.
    place: numbers of all shards [S, …] -> each shard's on its devices.
    begin: prompts and how to sample them -> what `decoding.Job` holds.
    first_store, first_state: empty ones.
    prefill, bring: see `prefilling`.
    relay, decode: see `decoding`.
    view: what the host looks at.
    read: rows of an array.
    end: what was sampled -> `types.Rollout`.
  """

  pooled: bool
  alone: bool
  shards: int
  pages: Any
  place: Callable
  begin: Callable
  first_store: Callable
  first_state: Callable
  prefill: Callable
  bring: Callable
  relay: Callable
  decode: Callable
  view: Callable
  read: Callable
  end: Callable


def make(
    model: Any, *, group_size: int, max_completion_length: int,
    eos_ids: Sequence[int], pad_id: int, page_size: int, cache_dtype: Any,
    backend: str | None, shardings: tuple[Any, Any, Any] | None,
    forced_words: forcing.Words | None = None) -> Programs:
  """The programs, of `sampling.make_sample_fn`'s arguments and W.

  Compiles nothing yet: jit does, for each new set of shapes.
  """
  cap = max_completion_length
  dtype = jnp.dtype(cache_dtype or model.dtype)
  shards, alone, head_axis, tensor = 1, True, None, 1
  if shardings is None or shardings[2].mesh.size == 1:
    batch = whole = None
    # One device is a shard, and all there is.
    spread = lambda f, cut, out=None, donate=(): jax.jit(
        f, donate_argnums=donate)
  else:
    batch = shardings[2]
    mesh, axes = batch.mesh, batch.spec[0]
    shards = math.prod(mesh.shape[axis] for axis in axes)
    whole = sharding.replicated(mesh)
    tensor = mesh.size // shards
    # Devices of a tensor axis talk to one another within a step: there, all
    # shards make the same number of steps.
    alone = shards == 1 or tensor == 1
    # A tensor axis is left to the compiler, which cuts no kernel: those are
    # told which heads a device has.
    names = set(mesh.axis_names) - ({'tensor'} if tensor > 1 else set())

    def spread(f, cut, out=None, donate=()):
      cut = tuple(PartitionSpec(axes) if one == 'c' else PartitionSpec()
                  for one in cut)
      return jax.jit(jax.shard_map(
          f, mesh=mesh, in_specs=cut, out_specs=PartitionSpec(axes),
          axis_names=names, check_vma=False), donate_argnums=donate,
          out_shardings=out)

  layers, kv_heads, head_dim = model.cache_shape()
  parts = sharding.head_parts(kv_heads, tensor)
  if parts > 1:
    head_axis = 'tensor'
  elif tensor > 1:
    backend = 'xla'
  pooled = pools.has_kernel((layers, kv_heads // parts, head_dim), dtype,
                            backend)
  setup = prefilling.Setup(model, group_size, tuple(eos_ids), page_size,
                           backend, alone, head_axis, pooled, forced_words)
  pages = batch
  if head_axis:
    heads = (None, head_axis) if pooled else (head_axis,)
    pages = NamedSharding(mesh, PartitionSpec(axes, *heads))
  # Where the fields of a record lie.
  lies = lambda kind: kind(**{
      field.name: pages if field.name == 'pages' else batch
      for field in dataclasses.fields(kind)})
  store_places, active_places, state_places = map(
      lies, (prefilling.Store, prefilling.Active, decoding.State))

  def empty(num_pages):
    form = pools if pooled else paging
    return form.empty(num_pages * shards, page_size, model.cache_shape(), dtype)

  def begin(prompts, key, temperature, top_p, top_k, budgets, forced=None):
    num_prompts, prompt_slots = prompts.tokens.shape
    rows = num_prompts * group_size
    # An empty prompt reads as its last slot.
    last = jnp.arange(prompt_slots)[None] == prompt_slots - 1
    mask = prompts.mask | (last & ~jnp.any(prompts.mask, 1, keepdims=True))
    keys = key if key.ndim else jax.vmap(
        lambda b: jax.random.fold_in(key, b))(jnp.arange(rows))
    how = draws.How(temperature, top_p, top_k)
    lengths = jnp.sum(mask, axis=1, dtype=jnp.int32)
    job = decoding.Job(jax.random.key_data(keys), how,
                       jnp.clip(budgets, 1, cap), lengths,
                       jnp.zeros((num_prompts, 0), jnp.int32), forced)
    return (prompts.tokens, mask), job, how.kind(), lengths

  def first_store(params, prompts, num_pages):
    shape = jax.eval_shape(
        lambda params: model.apply(
            {'params': params}, *jnp.zeros((2, 1, 1), jnp.int32),
            cache=paging.Prefill(jnp.ones((1, 1), jnp.int32)))[0], params)
    return prefilling.Store(
        jnp.zeros((prompts[0].shape[0], shape.shape[-1]), shape.dtype),
        empty(num_pages))

  def first_state(hidden, num_slots, num_pages, num_columns):
    num_rows = hidden.shape[0] * group_size
    zeros = lambda *shape: jnp.zeros(shape, jnp.int32)
    slots_, pages = num_slots * shards, num_pages * shards
    return decoding.State(
        row=zeros(slots_) + num_rows // shards, t=zeros(slots_),
        page=zeros(slots_) + num_pages,
        hidden=jnp.zeros((slots_, hidden.shape[1]), hidden.dtype),
        next=zeros(shards), owner=zeros(pages) + num_slots, base=zeros(pages),
        table=zeros(slots_, num_columns),
        # A pool is that of the prompts.
        pages=() if pooled else empty(num_pages),
        tokens=zeros(num_rows, cap) + pad_id,
        logprobs=jnp.zeros((num_rows, cap), jnp.float32),
        thinking=jnp.zeros(slots_ if forced_words else 0, bool),
        forced=jnp.zeros((num_rows, cap if forced_words else 0), bool),
        lengths=zeros(num_rows), counts=zeros(shards, 2))

  def end(prompts, tokens, lengths, logprobs, forced):
    mask = jnp.arange(cap)[None] < lengths[:, None]
    widen = lambda x: jnp.repeat(x, group_size, axis=0)
    return types.Rollout(
        prompt_tokens=widen(prompts[0]), prompt_mask=widen(prompts[1]),
        completion_tokens=tokens, completion_mask=mask,
        action_mask=mask & ~forced if forced_words else mask,
        sampler_logprobs=logprobs)

  held = spread(functools.partial(decoding.held, setup), 'cc')
  return Programs(
      pooled=pooled, alone=alone, shards=shards, pages=pages,
      place=functools.partial(_place, batch=batch),
      begin=jax.jit(begin, out_shardings=(batch, batch, whole, whole)),
      first_store=jax.jit(first_store, static_argnums=2,
                          out_shardings=store_places),
      first_state=jax.jit(first_state, static_argnums=(1, 2, 3),
                          out_shardings=state_places),
      prefill=spread(functools.partial(prefilling.prefill, setup), 'wcccc',
                     store_places, (4,)),
      bring=spread(prefilling.bring, 'cc', active_places),
      relay=spread(functools.partial(decoding.relay, setup), 'cc',
                   state_places),
      decode=spread(functools.partial(decoding.decode, setup), 'wcccwc',
                    state_places, (5,)),
      view=jax.jit(lambda job, state: (
          state.row, held(job, state), state.next, state.owner, state.counts),
                   out_shardings=whole),
      read=spread(lambda values, rows: values.at[rows].get(mode='clip'), 'cc'),
      end=jax.jit(end, out_shardings=batch))


def _place(plan: Any, batch: Any) -> Any:
  """Numbers of all shards, each shard's on its devices; rows run on."""
  flat = jax.tree.map(lambda x: np.asarray(x, np.int32).reshape(
      -1, *x.shape[2:]), plan)
  return (jax.tree.map(jnp.asarray, flat) if batch is None else
          sharding.to_global(flat, batch))
