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
import functools
from typing import Any, NamedTuple

import jax
from jaxtyping import Array
import numpy as np

from lapo_jax import (
    decoding,
    forcing,
    paging,
    pools,
    sharding,
    slots,
    types,
)
from lapo_jax import shards as shards_lib

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
  programs = shards_lib.make(
      model, group_size=group_size, max_completion_length=cap, eos_ids=eos_ids,
      pad_id=pad_id, page_size=PAGE, cache_dtype=cache_dtype, backend=backend,
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
