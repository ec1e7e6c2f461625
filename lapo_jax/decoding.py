# SPDX-License-Identifier: Apache-2.0
"""The sampler's device programs that decode, each for one data shard.

`step` is the heart: refill the idle slots, draw a token for each, run the
model on them. `decode` repeats it, `relay` changes the number of slots and
pages between two runs. `sampling` says the sentence that they make.

The keys and values of completions lie in pages of their own, beside those of
the prompts that are ready (`paging`), or all lie in one pool (`pools`). In a
pool a completion's own pages begin with its prompt's tail: the tokens that do
not fill a page.

N slots, B completions of P prompts, T completion slots, Q pages of
completions, R pages of the A prompts that lie ready, F pages of all prompts,
J pages a row, W tokens a page, D model width.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from lapo_jax import draws, forcing, ops, paging, pools, slots, types
from lapo_jax.prefilling import Active, Setup

# Steps until the host looks in, at the most.
CHUNK = 64


@flax.struct.dataclass
class Job:
  """What is asked of one data shard.

  Attributes:
    keys: uint32 [B, 2], the data of random keys.
    how: `draws.How` of [B] numbers.
    budgets: int32 [B], tokens at most.
    prompt_lengths: int32 [P].
    prompt_pages: int32 [P, F'], where each prompt's pages lie in the pool;
      [P, 0] without one.
    forced: `forcing.Limits` of [B] numbers, None without.
  """

  keys: jax.Array
  how: draws.How
  budgets: jax.Array
  prompt_lengths: jax.Array
  prompt_pages: jax.Array
  forced: forcing.Limits | None


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
    table: int32 [N, J], the pages of each slot's row in the pool, in order;
      [N, 0] without one.
    pages: per layer (keys, values): `Pages` [Q], or the pool of F + Q pages,
      prompts' first.
    tokens: int32 [B, T].
    logprobs: float32 [B, T].
    thinking: bool [N], whether the completion still thinks; [0] without
      forcing, as the next.
    forced: bool [B, T], tokens that the policy did not choose; [B, 0].
    lengths: int32 [B], 0 = not ended.
    counts: int32 [1, 2], steps done, and busy slots in them, summed.
  """

  row: types.Leaf
  t: types.Leaf
  page: types.Leaf
  hidden: types.Leaf
  next: types.Leaf
  owner: types.Leaf
  base: types.Leaf
  table: types.Leaf
  pages: types.Leaf
  tokens: types.Leaf
  logprobs: types.Leaf
  thinking: types.Leaf
  forced: types.Leaf
  lengths: types.Leaf
  counts: types.Leaf


def relay(setup: Setup, layout: slots.Layout, state: State) -> State:
  """The state with other numbers of slots and pages."""
  num_rows = state.lengths.shape[0]
  num_slots, num_pages = state.row.shape[0], state.owner.shape[0]
  new_slots, new_pages = layout.slots.shape[0], layout.pages.shape[0]
  filled = layout.slots < num_slots
  became = lambda old, new, count: jnp.full(count + 1, new, jnp.int32).at[
      old].set(jnp.arange(new, dtype=jnp.int32), mode='drop').at[count].set(new)
  slot = became(layout.slots, new_slots, num_slots)
  page = became(layout.pages, new_pages, num_pages)
  owner = _pick(slot, _pick(state.owner, layout.pages))
  table = _pick(state.table, layout.slots)
  if setup.pooled:
    first = _first(state)
    table = jnp.where(table < first, table, first + _pick(page, table - first))
    pages = pools.take(state.pages, jnp.concatenate(
        [jnp.arange(first, dtype=jnp.int32), first + layout.pages]))
  else:
    pages = paging.take(state.pages, layout.pages)
  return state.replace(
      row=jnp.where(filled, _pick(state.row, layout.slots), num_rows),
      t=jnp.where(filled, _pick(state.t, layout.slots), 0),
      page=_pick(page, _pick(state.page, layout.slots)),
      hidden=_pick(state.hidden, layout.slots),
      owner=jnp.where(layout.pages < num_pages, owner, new_slots),
      base=_pick(state.base, layout.pages), table=table, pages=pages,
      thinking=(_pick(state.thinking, layout.slots) if setup.forced_words
                else state.thinking))


def held(setup: Setup, job: Job, state: State) -> Int[Array, 'N']:
  """Tokens in each slot's own pages, with its prompt's tail; 0 = no page."""
  if not setup.pooled:
    return state.t
  return jnp.where(state.t > 0, _place(setup, job, state), 0)


def decode(setup: Setup, params: Any, job: Job, hidden: Array,
           active: Active, kind: Array, state: State) -> State:
  """Steps until the host has to look in.

  That is when pages or ready prompts are lacking, when all is done, or after
  some steps.

  Args:
    setup: what is fixed.
    params: of the model.
    job: what is asked.
    hidden: [P, D], the model's state after each prompt.
    active: the prompts that lie ready.
    kind: `draws.How.kind` of all shards.
    state: as the last call left it.
  """
  num_rows, num_slots = job.budgets.shape[0], state.row.shape[0]
  size = setup.page_size
  count = lambda x: jnp.sum(x, dtype=jnp.int32)
  shared = None if setup.pooled else _shared(job, active, size)

  def goes_on(carry):
    i, state = carry
    within = i < CHUNK
    if not setup.alone:
      return within
    live = state.row < num_rows
    idle, startable = count(~live), active.end[0] - state.next[0]
    fresh = jnp.minimum(idle, startable)
    full = held(setup, job, state) % size == 0
    wants = count(live & full) + fresh
    lacking = (idle > startable) & (active.end[0] < num_rows)
    return (within & (num_slots - idle + fresh > 0) & ~lacking &
            (wants <= count(state.owner == num_slots)))

  def one(carry):
    i, state = carry
    return i + 1, step(setup, params, job, hidden, active, shared, kind, state)

  return jax.lax.while_loop(goes_on, one, (jnp.int32(0), state))[1]


def step(setup: Setup, params: Any, job: Job, after_prompt: Array,
         active: Active, shared: tuple[Array, Array] | None, kind: Array,
         state: State) -> State:
  """Refills the idle slots, draws a token for each, runs the model on them.

  Other arguments as in `decode`; `shared` is that of `_shared`.
  """
  num_rows, num_pages = job.budgets.shape[0], state.owner.shape[0]
  model = setup.model

  # Refill.
  idle = state.row == num_rows
  waiting = state.next[0] + jnp.cumsum(idle, dtype=jnp.int32) - 1
  take = idle & (waiting < active.end[0])
  state = state.replace(row=jnp.where(take, waiting, state.row),
                        t=jnp.where(take, 0, state.t),
                        next=state.next + jnp.sum(take))
  row, t = state.row, state.t
  prompt = row // setup.group_size
  hidden = jnp.where(take[:, None], _pick(after_prompt, prompt), state.hidden)

  # A page for those whose last one is full; without one, a slot waits.
  state = _turn_pages(setup, job, state)
  busy = (row < num_rows) & (state.page < num_pages)

  # Draw.
  keys = jax.random.wrap_key_data(_pick(job.keys, row))
  uniforms = draws.uniforms(jax.vmap(jax.random.fold_in)(keys, t))
  logits = model.apply({'params': params}, hidden, method='unembed')
  how = jax.tree.map(lambda x: _pick(x, row), job.how)
  drawn, logprobs = draws.draw(logits, uniforms, how, kind)
  out = jnp.where(busy, row, num_rows)
  if setup.forced_words:
    limits = jax.tree.map(lambda x: _pick(x, row), job.forced)
    drawn, own, thinking = forcing.force(
        setup.forced_words, limits, drawn, t, state.thinking | (t == 0),
        setup.eos_ids)
    logprobs = jnp.where(own, logprobs, 0.0)
    state = state.replace(
        thinking=jnp.where(busy, thinking, state.thinking),
        forced=state.forced.at[out, t].set(~own, mode='drop'))
  tokens = state.tokens.at[out, t].set(drawn, mode='drop')
  logprobs = state.logprobs.at[out, t].set(logprobs, mode='drop')

  # Run the model: the drawn tokens are number t of their rows.
  cache = (_pool(setup, job, busy, state) if setup.pooled else
           _pages(setup, active, shared, busy, state))
  positions = _pick(job.prompt_lengths, prompt) + t
  found, cache = model.apply({'params': params}, drawn[:, None],
                             positions[:, None], cache=cache)

  # Ends: a stop token, or the budget.
  ended = busy & (ops.is_any_of(drawn, setup.eos_ids) |
                  (t + 1 >= _pick(job.budgets, row)))
  lengths = state.lengths.at[jnp.where(ended, row, num_rows)].set(
      t + 1, mode='drop')
  freed = _pick(jnp.append(ended, False), state.owner)
  return state.replace(
      row=jnp.where(ended, num_rows, row), t=jnp.where(busy, t + 1, t),
      hidden=jnp.where(busy[:, None], found[:, 0], hidden),
      owner=jnp.where(freed, row.shape[0], state.owner), pages=cache.pages,
      tokens=tokens, logprobs=logprobs, lengths=lengths,
      counts=state.counts + jnp.stack([jnp.int32(1), jnp.sum(busy)])[None])


def _turn_pages(setup: Setup, job: Job, state: State) -> State:
  """The state with a new page for each slot whose last one is full."""
  num_rows, num_slots = job.budgets.shape[0], state.row.shape[0]
  num_pages, size = state.owner.shape[0], setup.page_size
  prompt = state.row // setup.group_size
  wants = (state.row < num_rows) & (held(setup, job, state) % size == 0)
  free = jnp.nonzero(state.owner == num_slots, size=num_slots,
                     fill_value=num_pages)[0].astype(jnp.int32)
  found = _pick(free, jnp.cumsum(wants, dtype=jnp.int32) - 1)
  new = jnp.where(wants, found, num_pages)
  place = _place(setup, job, state)
  each = jnp.arange(num_slots, dtype=jnp.int32)
  state = state.replace(
      page=jnp.where(wants, found, state.page),
      owner=state.owner.at[new].set(each, mode='drop'),
      base=state.base.at[new].set(place - place % size, mode='drop'))
  if not setup.pooled:
    return state

  # The first of a slot's pages begins with the tail.
  first, begins = _first(state), wants & (state.t == 0)
  whole = _pick(job.prompt_lengths, prompt) // size
  pages = _pick(job.prompt_pages, prompt)
  copies = begins & (found < num_pages) & (place > 0)
  order = jnp.argsort(~copies, stable=True)
  source = jnp.take_along_axis(
      pages, jnp.minimum(whole, pages.shape[1] - 1)[:, None], 1)[:, 0]
  copied = pools.copy(state.pages, jnp.sum(copies, dtype=jnp.int32),
                      source[order], first + found[order])
  pages = jnp.pad(pages, ((0, 0), (0, state.table.shape[1] - pages.shape[1])))
  table = jnp.where(begins[:, None], pages, state.table)
  columns = jnp.arange(table.shape[1])[None]
  here = wants[:, None] & (columns == (whole + place // size)[:, None])
  return state.replace(
      pages=copied, table=jnp.where(here, (first + found)[:, None], table))


def _pool(setup: Setup, job: Job, busy: Bool[Array, 'N'],
          state: State) -> pools.Decode:
  """Where the tokens of a step lie in a pool."""
  size = setup.page_size
  before = _pick(job.prompt_lengths, state.row // setup.group_size) + state.t
  pages = _first(state) + jnp.where(busy, state.page, state.owner.shape[0])
  return pools.Decode(
      page=pages, offset=before % size, lengths=jnp.where(busy, before + 1, 0),
      table=state.table, pages=state.pages, head_axis=setup.head_axis)


def _pages(setup: Setup, active: Active, shared: tuple[Array, Array],
           busy: Bool[Array, 'N'], state: State) -> paging.Decode:
  """Where the tokens of a step lie in pages of prompts and of completions."""
  (num_active,), (num_slots,) = active.ids.shape, state.row.shape
  place, valid = shared
  prompt, member = state.row // setup.group_size, state.row % setup.group_size
  at = jnp.where(busy, _pick(place, prompt), num_active)
  readers = jnp.full((num_active, setup.group_size), num_slots, jnp.int32).at[
      at, member].set(jnp.arange(num_slots, dtype=jnp.int32), mode='drop')
  size = valid.shape[1]
  written = jnp.append(jnp.where(busy, state.t + 1, 0), 0)
  step = paging.Step(
      page=jnp.where(busy, state.page, state.owner.shape[0]),
      offset=state.t % size, owner=state.owner,
      valid=_valid(_pick(written, state.owner) - state.base, size),
      readers=_pick(readers, active.place), prompt_valid=valid)
  return paging.Decode(step, state.pages, active.pages)


def _shared(job: Job, active: Active, size: int) -> tuple[Array, Array]:
  """Of the prompts: their places [P + 1], and the real tokens [R, W]."""
  num_active = active.ids.shape[0]
  place = jnp.full(job.prompt_lengths.shape[0] + 1, num_active, jnp.int32).at[
      active.ids].set(jnp.arange(num_active, dtype=jnp.int32), mode='drop')
  lengths = _pick(job.prompt_lengths, _pick(active.ids, active.place))
  return place, _valid(lengths - active.number * size, size)


def _valid(count: Int[Array, 'Q'], size: int) -> Bool[Array, 'Q W']:
  """True on the first tokens of each page."""
  return jnp.arange(size)[None] < count[:, None]


def _place(setup: Setup, job: Job, state: State) -> Int[Array, 'N']:
  """The place of each slot's next token in its own pages."""
  if not setup.pooled:
    return state.t
  prompt = state.row // setup.group_size
  return state.t + _pick(job.prompt_lengths, prompt) % setup.page_size


def _first(state: State) -> int:
  """The first page of a completion in the pool, F."""
  return state.pages[0].shape[0] - state.owner.shape[0]


def _pick(x: Array, ids: Int[Array, '*A']) -> Array:
  """x[ids]; an id beyond the last picks the last."""
  return x.at[ids].get(mode='clip')
