# SPDX-License-Identifier: Apache-2.0
"""The device programs of the sampler, each for one data shard.

`step` is the heart: refill the idle slots, draw a token for each, run the
model on them. The others begin, prefill, rearrange and read. `sampling` says
the sentence that they make.

N slots, B completions of P prompts, T completion slots, Q pages of
completions, R pages of the A prompts that lie ready, W tokens a page, D model
width.
"""

from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from lapo_jax import draws, ops, paging, slots

# Steps until the host looks in, at the most.
_CHUNK = 64


@flax.struct.dataclass
class Job:
  """What is asked of one data shard.

  Attributes:
    keys: uint32 [B, 2], the data of random keys.
    how: `draws.How` of [B] numbers.
    budgets: int32 [B], tokens at most.
    prompt_lengths: int32 [P].
  """

  keys: jax.Array
  how: draws.How
  budgets: jax.Array
  prompt_lengths: jax.Array


@flax.struct.dataclass
class Store:
  """The prompts, prefilled.

  Attributes:
    hidden: float [P, D], the model's state after each.
    pages: per layer (keys, values), `Pages`.
  """

  hidden: jax.Array
  pages: tuple


@flax.struct.dataclass
class Active:
  """The prompts that lie ready, see `slots.Ready`.

  Attributes:
    pages: per layer (keys, values), `Pages` [R].
    ids: int32 [A].
    place: int32 [R].
    number: int32 [R].
    end: int32 [1].
  """

  pages: tuple
  ids: jax.Array
  place: jax.Array
  number: jax.Array
  end: jax.Array


@flax.struct.dataclass
class State:
  """What one step passes to the next.

  Attributes:
    row: int32 [N], the completion in each slot; B = none.
    t: int32 [N], tokens that it has.
    page: int32 [N], the page of its last tokens.
    hidden: float [N, D], the model's state, from which token t is drawn.
    next: int32 [1], the head of the queue.
    owner: int32 [Q], the slot of each page; N = free.
    base: int32 [Q], the number of the page's first token.
    pages: per layer (keys, values), `Pages` [Q].
    tokens: int32 [B, T].
    logprobs: float32 [B, T].
    lengths: int32 [B], 0 = not ended.
    counts: int32 [1, 2], steps done, and busy slots in them, summed.
  """

  row: jax.Array
  t: jax.Array
  page: jax.Array
  hidden: jax.Array
  next: jax.Array
  owner: jax.Array
  base: jax.Array
  pages: tuple
  tokens: jax.Array
  logprobs: jax.Array
  lengths: jax.Array
  counts: jax.Array


def prefill(model: Any, alone: bool, params: Any, prompts: tuple[Array, Array],
            rows: Int[Array, 'R'], into: Int[Array, 'R J'],
            store: Store) -> Store:
  """Runs prompts through the model, and keeps their pages.

  Args:
    model: see `sampling`.
    alone: whether one device holds the shard.
    params: its parameters.
    prompts: tokens and mask of all of this shard, [P, L], left-padded.
    rows: which of them; P = none.
    into: the pages in the store for each J·W tokens; behind the last = none.
    store: takes them.
  """
  size = paging.page_size(store.pages)
  here = jax.tree.map(lambda x: x.at[rows].get(mode='clip'),
                      prompts)
  num_tokens = jnp.sum(here[1], axis=1, dtype=jnp.int32)
  # To the left: pages begin with a prompt's first token.
  places = jnp.arange(into.shape[1] * size)[None]
  slots_ = here[0].shape[1]
  source = jnp.minimum(places + slots_ - num_tokens[:, None], slots_ - 1)
  tokens = jnp.take_along_axis(here[0], source, axis=1)
  real = places < num_tokens[:, None]
  hidden, cache = model.apply(
      {'params': params}, tokens, jnp.broadcast_to(places, tokens.shape),
      # Kernels are not cut: several devices take the form that is.
      cache=paging.Prefill(real.astype(jnp.int32),
                           backend=None if alone else 'xla'))
  last = jnp.take_along_axis(hidden, num_tokens[:, None, None] - 1, axis=1)
  pages = tuple(
      (paging.fill(keys, into, new_keys, True),
       paging.fill(values, into, new_values, False))
      for (keys, values), (new_keys, new_values) in zip(
          store.pages, cache.kept, strict=True))
  return Store(store.hidden.at[rows].set(
      last[:, 0].astype(store.hidden.dtype), mode='drop'), pages)


def bring(store: Store, ready: slots.Ready) -> Active:
  """Copies the pages of the prompts that shall lie ready."""
  take = lambda pages: pages.take(ready.source)
  return Active(tuple((take(keys), take(values))
                      for keys, values in store.pages),
                ready.ids, ready.place, ready.number, ready.end)


def relay(num_rows: int, layout: slots.Layout, state: State) -> State:
  """The state with other numbers of slots and pages."""
  num_slots, num_pages = state.row.shape[0], state.owner.shape[0]
  new_slots, new_pages = layout.slots.shape[0], layout.pages.shape[0]
  pick = lambda x, ids: x.at[ids].get(mode='clip')
  filled = layout.slots < num_slots
  became = lambda old, new, count: jnp.full(count + 1, new, jnp.int32).at[
      old].set(jnp.arange(new, dtype=jnp.int32), mode='drop').at[count].set(new)
  slot = became(layout.slots, new_slots, num_slots)
  page = became(layout.pages, new_pages, num_pages)
  owner = pick(slot, pick(state.owner, layout.pages))
  pages = tuple((keys.take(layout.pages), values.take(layout.pages))
                for keys, values in state.pages)
  return state.replace(
      row=jnp.where(filled, pick(state.row, layout.slots), num_rows),
      t=jnp.where(filled, pick(state.t, layout.slots), 0),
      page=pick(page, pick(state.page, layout.slots)),
      hidden=pick(state.hidden, layout.slots),
      owner=jnp.where(layout.pages < num_pages, owner, new_slots),
      base=pick(state.base, layout.pages), pages=pages)


def decode(model: Any, group_size: int, eos_ids: Sequence[int], alone: bool,
           params: Any, job: Job, hidden: Array, active: Active, kind: Array,
           state: State) -> State:
  """Steps until the host has to look in.

  That is when pages or ready prompts are lacking, when all is done, or after
  some steps.

  Args:
    model: see `sampling`.
    group_size: G.
    eos_ids: the stop tokens.
    alone: whether this shard may leave the loop by itself.
    params: of the model.
    job: what is asked.
    hidden: [P, D], the model's state after each prompt.
    active: the prompts that lie ready.
    kind: `draws.How.kind` of all shards.
    state: as the last call left it.
  """
  num_rows, num_slots = job.budgets.shape[0], state.row.shape[0]
  num_active, size = active.ids.shape[0], paging.page_size(active.pages)
  count = lambda x: jnp.sum(x, dtype=jnp.int32)
  # Of the prompts: their places, and what is real in their pages.
  place = jnp.full(job.prompt_lengths.shape[0] + 1, num_active, jnp.int32).at[
      active.ids].set(jnp.arange(num_active, dtype=jnp.int32), mode='drop')
  lengths = job.prompt_lengths.at[
      active.ids.at[active.place].get(mode='clip')].get(mode='clip')
  valid = _valid(lengths - active.number * size, size)

  def goes_on(carry):
    i, state = carry
    within = i < _CHUNK
    if not alone:
      return within
    live = state.row < num_rows
    idle, startable = count(~live), active.end[0] - state.next[0]
    fresh = jnp.minimum(idle, startable)
    wants = count(live & (state.t % size == 0)) + fresh
    lacking = (idle > startable) & (active.end[0] < num_rows)
    return (within & (num_slots - idle + fresh > 0) & ~lacking &
            (wants <= count(state.owner == num_slots)))

  def one(carry):
    i, state = carry
    return i + 1, step(model, group_size, eos_ids, params, job, hidden, active,
                       place, valid, kind, state)

  return jax.lax.while_loop(goes_on, one, (jnp.int32(0), state))[1]


def step(model: Any, group_size: int, eos_ids: Sequence[int], params: Any,
         job: Job, after_prompt: Array, active: Active,
         place: Int[Array, 'P1'], valid: Bool[Array, 'R W'], kind: Array,
         state: State) -> State:
  """Refills the idle slots, draws a token for each, runs the model on them."""
  num_rows, num_slots = job.budgets.shape[0], state.row.shape[0]
  num_pages, size = state.owner.shape[0], valid.shape[1]
  num_active = active.ids.shape[0]
  pick = lambda x, ids: x.at[ids].get(mode='clip')
  each = jnp.arange(num_slots, dtype=jnp.int32)

  # Refill.
  idle = state.row == num_rows
  waiting = state.next[0] + jnp.cumsum(idle, dtype=jnp.int32) - 1
  take = idle & (waiting < active.end[0])
  row = jnp.where(take, waiting, state.row)
  t = jnp.where(take, 0, state.t)
  prompt = row // group_size
  hidden = jnp.where(take[:, None], pick(after_prompt, prompt), state.hidden)
  busy = row < num_rows

  # A page for those whose last one is full; without one, a slot waits.
  wants = busy & (t % size == 0)
  free = jnp.nonzero(state.owner == num_slots, size=num_slots,
                     fill_value=num_pages)[0].astype(jnp.int32)
  found = pick(free, jnp.cumsum(wants, dtype=jnp.int32) - 1)
  page = jnp.where(wants, found, state.page)
  busy &= page < num_pages
  new = jnp.where(wants, found, num_pages)
  owner = state.owner.at[new].set(each, mode='drop')
  base = state.base.at[new].set(t, mode='drop')

  # Draw.
  keys = jax.random.wrap_key_data(pick(job.keys, row))
  uniforms = draws.uniforms(jax.vmap(jax.random.fold_in)(keys, t))
  logits = model.apply({'params': params}, hidden, method='unembed')
  how = jax.tree.map(lambda x: pick(x, row), job.how)
  drawn, logprobs = draws.draw(logits, uniforms, how, kind)
  out = jnp.where(busy, row, num_rows)
  tokens = state.tokens.at[out, t].set(drawn, mode='drop')
  logprobs = state.logprobs.at[out, t].set(logprobs, mode='drop')

  # Run the model: the drawn tokens are number t of their rows.
  at = jnp.where(busy, pick(place, prompt), num_active)
  readers = jnp.full((num_active, group_size), num_slots, jnp.int32).at[
      at, row % group_size].set(each, mode='drop')
  written = jnp.append(jnp.where(busy, t + 1, 0), 0)
  where = paging.Step(
      page=jnp.where(busy, page, num_pages), offset=t % size, owner=owner,
      valid=_valid(pick(written, owner) - base, size),
      readers=pick(readers, active.place), prompt_valid=valid)
  positions = pick(job.prompt_lengths, prompt) + t
  found, cache = model.apply(
      {'params': params}, drawn[:, None], positions[:, None],
      cache=paging.Decode(where, state.pages, active.pages))
  hidden = jnp.where(busy[:, None], found[:, 0], hidden)

  # Ends: a stop token, or the budget.
  ended = busy & (ops.is_any_of(drawn, eos_ids) |
                  (t + 1 >= pick(job.budgets, row)))
  lengths = state.lengths.at[jnp.where(ended, row, num_rows)].set(
      t + 1, mode='drop')
  return state.replace(
      row=jnp.where(ended, num_rows, row), t=jnp.where(busy, t + 1, t),
      page=page, hidden=hidden, next=state.next + jnp.sum(take),
      owner=jnp.where(pick(jnp.append(ended, False), owner), num_slots, owner),
      base=base, pages=cache.completions, tokens=tokens, logprobs=logprobs,
      lengths=lengths,
      counts=state.counts + jnp.stack([jnp.int32(1), jnp.sum(busy)])[None])


def _valid(held: Int[Array, 'Q'], size: int) -> Bool[Array, 'Q W']:
  """True on the first tokens of each page."""
  return jnp.arange(size)[None] < held[:, None]
