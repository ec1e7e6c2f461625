# SPDX-License-Identifier: Apache-2.0
"""Sampling groups of completions in decode slots that are refilled.

Each prompt is prefilled once; its keys and values serve its G completions.
The P·G completions queue for a fixed number of slots. A step draws a token
for every slot and runs the model on it; a slot whose completion has ended
takes the next of the queue on device, before the next step. Keys and values
lie in pages (`paging`), so that a step costs what is live, not the cap; on a
TPU in one pool with tables of pages (`pools`), as its kernels take them.

The host looks in every few dozen steps: it finds room for more pages, brings
in the pages of the next prompts, and, once the queue is empty, goes on with
fewer slots (`slots`). Data shards have a queue each and share no step.

A completion is a function of (parameters, prompt, key, its number b, …):
its randomness is fold_in(fold_in(key, b), t), so neither its slot nor batch
mates, refills or the mesh change it.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array
import numpy as np

from lapo_jax import (
    decoding,
    draws,
    forcing,
    paging,
    pools,
    prefilling,
    sharding,
    slots,
    types,
)

# Tokens whose keys and values lie together.
PAGE = 64
# Prompt tokens that are prefilled in one call, about.
PREFILL_TOKENS = 4096
# Fields of the state that make a `types.Rollout`.
_RESULTS = ('tokens', 'lengths', 'logprobs', 'forced')


class Progress(NamedTuple):
  """What `watch` is told.

  Attributes:
    finished: completions that have ended since the last time, row numbers.
    read: `() -> (rows, tokens [n, T], lengths [n])`, those of them that this
      host holds.
    num_slots: slots decoded at once, in all data shards.
    steps: decoding steps so far, summed over data shards.
    busy: slots that drew a token in them, summed likewise.
    waiting: completions that have not begun.
    cache_bytes: of the keys and values, completions' and ready prompts'.
  """

  finished: np.ndarray
  read: Callable
  num_slots: int
  steps: int
  busy: int
  waiting: int
  cache_bytes: int


class Programs(NamedTuple):
  """The sampler's programs; each runs on all data shards side by side.

  `make_sample_fn` says in which order. `pages` is where keys and values lie,
  None on one device.
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


def make_sample_fn(
    model: Any, *, group_size: int, max_completion_length: int,
    eos_ids: Sequence[int], pad_id: int, num_slots: int | None = None,
    cache_dtype: Any = '', backend: str | None = None,
    forced_words: forcing.Words | None = None,
    shardings: tuple[Any, Any, Any] | None = None) -> Callable:
  """`(params, prompts, key, temperature, top_p, top_k, budgets) -> Rollout`.

  Args:
    model: a model family's module.
    group_size: completions of each prompt, G.
    max_completion_length: the cap T in tokens; a row that reaches it without
      a stop token is truncated.
    eos_ids: the stop tokens; the one that is sampled belongs to the row.
    pad_id: fills what follows it.
    num_slots: completions that are decoded at once, in all data shards
      together; None = all of them.
    cache_dtype: of keys and values; '' = the model's. 'int8' has a scale
      for each token and head.
    backend: 'xla', 'tpu' or 'gpu', whose kernels are used; None = JAX's.
    forced_words: tokens that are written where `forced` asks for it; None =
      none ever.
    shardings: of params, of `types.Prompts` and of the batch; None on one
      device.

  Returns:
    The sampler. `temperature` (0 is greedy), `top_p` (default 1), `top_k`
    (default 0 = all) and `budgets` (tokens at most, at least 1, default T) are
    numbers or arrays [B], traced, see `draws.How`: other numbers compile
    nothing, but for the sizes that lengths ask for (`slots.size`). `key` is
    one for all completions, or an array of B keys. The log-probs are those of
    softmax(logits / temperature), of softmax(logits) when greedy, never of a
    truncated distribution. An empty prompt reads as its last slot, the pad
    token. `watch` is called with a `Progress` whenever the host has looked in.
    `forced`, `forcing.Limits` of numbers or [B], goes with `forced_words`.
  """
  cap = max_completion_length
  programs = make_programs(
      model, group_size=group_size, max_completion_length=cap, eos_ids=eos_ids,
      pad_id=pad_id, cache_dtype=cache_dtype, backend=backend,
      forced_words=forced_words, shardings=shardings)
  shards, place, pooled = programs.shards, programs.place, programs.pooled

  def sample(params: Any, prompts: types.Prompts, key: Array,
             temperature: Any, top_p: Any = 1.0, top_k: Any = 0,
             budgets: Any = None,
             watch: Callable | None = None,
             forced: forcing.Limits | None = None) -> types.Rollout:
    num_rows = prompts.tokens.shape[0] * group_size // shards
    most = min(-(-(num_slots or num_rows * shards) // shards), num_rows)
    # One number for all compiles what one for each does.
    each = lambda x, dtype: np.broadcast_to(np.asarray(x, dtype),
                                            num_rows * shards)
    prompts, job, kind, lengths = programs.begin(
        prompts, key, each(temperature, np.float32), each(top_p, np.float32),
        each(top_k, np.int32),
        each(cap if budgets is None else budgets, np.int32),
        jax.tree.map(lambda x: each(x, np.int32), forced))
    lengths = np.asarray(lengths).reshape(shards, -1)
    pages = slots.make_store(lengths, PAGE)
    view = slots.first_view(shards, most, num_rows)
    # A run that no shard may leave is a long one.
    ahead = slots.AHEAD if programs.alone else decoding.CHUNK
    layout = slots.layout(view, num_rows, PAGE, ahead)
    num_pages = layout.pages.shape[1]
    store = programs.first_store(params, prompts,
                                 pages.size + (num_pages if pooled else 0))
    for rows, into in slots.prefill_batches(pages,
                                            PREFILL_TOKENS // PAGE):
      store = programs.prefill(params, prompts, *place((rows, into)), store)

    ready, columns = None, 0
    if pooled:
      job = job.replace(prompt_pages=place(slots.prompt_pages(pages)))
      # One more: a completion begins with a part of its prompt.
      columns = job.prompt_pages.shape[1] + -(-cap // PAGE) + 1
    state = programs.first_state(store.hidden, most, num_pages, columns)
    if pooled:
      state, store = (state.replace(pages=store.pages),
                      store.replace(pages=()))
    done = False
    while not done:
      fewer = layout is not None and layout.slots.size < view.row.size
      found = slots.ready(view, ready, pages, group_size, num_rows, fewer,
                          pooled)
      if found is not None:
        ready, active = found, programs.bring(store, place(found))
      state = programs.decode(params, job, store.hidden, active, kind, state)
      before = view
      row, held, head, owner, counts = (np.asarray(x).reshape(shards, -1)
                                        for x in programs.view(job, state))
      view = slots.View(row, held, head[:, 0], owner)
      if watch is not None:
        finished = slots.finished(before, view, num_rows)
        watch(Progress(
            finished=np.concatenate([
                rows + shard * num_rows
                for shard, rows in enumerate(finished)]),
            read=functools.partial(_read, programs.read, place, state,
                                   finished, num_rows),
            num_slots=view.row.size, steps=int(counts[:, 0].sum()),
            busy=int(counts[:, 1].sum()),
            waiting=int((num_rows - view.next).sum()),
            cache_bytes=sum(x.nbytes for x in jax.tree.leaves(
                (state.pages, active.pages)))))
      done = np.all(view.next == num_rows) and np.all(view.row == num_rows)
      layout = None if done else slots.layout(view, num_rows, PAGE, ahead)
      if layout is not None:
        state = programs.relay(place(layout), state)
    # Not its pages: their number would make a program of each.
    return programs.end(prompts, *(getattr(state, name) for name in _RESULTS))

  return sample


def slots_that_fit(model: Any, *, max_completion_length: int,
                   max_prompt_length: int, cache_dtype: Any,
                   memory: int, backend: str | None = None) -> int:
  """Slots whose keys and values fit at full length, at least 1.

  Args:
    model: a model family's module.
    max_completion_length: tokens.
    max_prompt_length: tokens; a slot may be the only one of its prompt.
    cache_dtype: as in `make_sample_fn`.
    memory: bytes.
    backend: as in `make_sample_fn`.
  """
  layers, kv_heads, width = model.cache_shape()
  if (backend or jax.default_backend()) == 'tpu':
    width = pools.whole_lanes(width)
  pages = (-(-max_completion_length // PAGE) + -(-max_prompt_length // PAGE))
  slot = pages * PAGE * paging.token_bytes(
      layers, kv_heads, width, cache_dtype or model.dtype)
  return max(1, memory // slot)


def _place(plan: Any, batch: Any) -> Any:
  """Numbers of all shards, each shard's on its devices; rows run on."""
  flat = jax.tree.map(lambda x: np.asarray(x, np.int32).reshape(
      -1, *x.shape[2:]), plan)
  return (jax.tree.map(jnp.asarray, flat) if batch is None else
          sharding.to_global(flat, batch))


def _read(read: Callable, place: Callable, state: decoding.State,
          rows: list[np.ndarray], num_rows: int) -> tuple[np.ndarray, ...]:
  """Rows that have ended: (row numbers, tokens, lengths), this host's."""
  width = slots.size(max(1, *map(len, rows)))
  ids = np.full((len(rows), width), num_rows)
  for shard, found in enumerate(rows):
    ids[shard, :len(found)] = found
  places, tokens = sharding.local_rows(read(state.tokens, place(ids)))
  _, lengths = sharding.local_rows(read(state.lengths, place(ids)))
  numbers = ids + num_rows * np.arange(len(rows))[:, None]
  real = (ids < num_rows).reshape(-1)[places]
  return tuple(x[real] for x in (numbers.reshape(-1)[places], tokens, lengths))


def make_programs(
    model: Any, *, group_size: int, max_completion_length: int,
    eos_ids: Sequence[int], pad_id: int, cache_dtype: Any,
    backend: str | None, shardings: tuple[Any, Any, Any] | None,
    forced_words: forcing.Words | None = None) -> Programs:
  """The programs of `make_sample_fn`, which has the same arguments.

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
  if tensor > 1 and kv_heads % tensor == 0:
    head_axis = 'tensor'
  elif tensor > 1:
    backend = 'xla'
  own_heads = kv_heads // tensor if head_axis else kv_heads
  pooled = pools.has_kernel((layers, own_heads, head_dim), dtype, backend)
  setup = prefilling.Setup(model, group_size, tuple(eos_ids), PAGE, backend,
                           alone, head_axis, pooled, forced_words)
  pages = batch
  if head_axis:
    heads = (None, head_axis) if pooled else (head_axis,)
    pages = sharding.NamedSharding(mesh, PartitionSpec(axes, *heads))
  # Where the fields of a record lie.
  lies = lambda kind: kind(**{
      field.name: pages if field.name == 'pages' else batch
      for field in dataclasses.fields(kind)})
  store_places, active_places, state_places = map(
      lies, (prefilling.Store, prefilling.Active, decoding.State))

  def empty(num_pages):
    form = pools if pooled else paging
    return form.empty(num_pages * shards, PAGE, model.cache_shape(), dtype)

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
