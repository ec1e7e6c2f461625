# SPDX-License-Identifier: Apache-2.0
"""What the host decides between two runs of decoding steps, in numpy.

How many slots go on, how many pages they need, which prompts lie ready. Every
host sees the same small numbers of all data shards and decides alike; arrays
have the shards in front. Sizes come from a short series, so that few programs
are compiled.

S data shards, N slots, B completions of P prompts in a queue, Q pages of
completions, R pages of prompts, A prompts that lie ready; W tokens a page.
"""

from typing import NamedTuple

import numpy as np

# Steps that a run should last before it lacks a page.
AHEAD = 16
_NO_PAGE = 1 << 30
# Slots go on as a fourth when no more are live, down to a few: fewer cost a
# step next to nothing less, and each number is a program.
_FEWER, _FEWEST = 4, 4


class View(NamedTuple):
  """Where the shards stand.

  Attributes:
    row: [S, N], the completion in each slot; B = none.
    held: [S, N], tokens in its own pages; 0 = it has no page yet.
    next: [S], heads of the queues.
    owner: [S, Q], the slot of each page; N = free.
  """

  row: np.ndarray
  held: np.ndarray
  next: np.ndarray
  owner: np.ndarray


class Layout(NamedTuple):
  """Slots and pages to go on with.

  Attributes:
    slots: [S, N'], which slot each new one was; N = an empty one.
    pages: [S, Q'], which page each new one was; Q = a free one.
  """

  slots: np.ndarray
  pages: np.ndarray


class Ready(NamedTuple):
  """Prompts to lie ready.

  Attributes:
    ids: [S, A], the prompts; P = none.
    place: [S, R], which of the A a page belongs to.
    number: [S, R], which page of its prompt it is; behind the last = none.
    source: [S, R], the page in the store.
    end: [S], completions before this one may start.
  """

  ids: np.ndarray
  place: np.ndarray
  number: np.ndarray
  source: np.ndarray
  end: np.ndarray


class Store(NamedTuple):
  """The pages of all prompts of each shard.

  Attributes:
    counts: [S, P], pages of each prompt.
    starts: [S, P], the first of them.
    size: pages of a shard's store.
  """

  counts: np.ndarray
  starts: np.ndarray
  size: int


def size(count: int) -> int:
  """The least of 1, 2, 4, 8, 16, 32, 48, 64, 96, 128, … that is ≥ count.

  Few sizes are few programs; from 32 on they are worth two an octave.
  """
  found = 1
  while found < count:
    found *= 2
  return found // 4 * 3 if found > 32 and count <= found // 4 * 3 else found


def make_store(lengths: np.ndarray, page_size: int) -> Store:
  """Pages for prompts of these lengths [S, P], in tokens."""
  counts = -(-lengths // page_size)
  ends = np.cumsum(counts, axis=1)
  return Store(counts, ends - counts, size(int(ends[:, -1].max())))


def prefill_batches(store: Store,
                    num_pages: int) -> list[tuple[np.ndarray, np.ndarray]]:
  """(prompts [S, R], their pages [S, R, J]) of each call.

  Prompts of like lengths go together. R and J come from the series, R·J is
  about `num_pages` at the most. P stands for no prompt, and what lies behind
  the store for no page.
  """
  shards, count = store.counts.shape
  order = np.argsort(-store.counts, axis=1, kind='stable')
  ranked = np.take_along_axis(store.counts, order, axis=1).max(axis=0)
  found, start = [], 0
  while start < count:
    width = size(int(ranked[start]))
    rows = size(max(1, min(num_pages // width, count - start)))
    prompts = np.full((shards, rows), count)
    part = order[:, start:start + rows]
    prompts[:, :part.shape[1]] = part
    pages = np.full((shards, rows, width), _NO_PAGE)
    for shard, row in np.ndindex(*part.shape):
      here = part[shard, row]
      used = store.counts[shard, here]
      pages[shard, row, :used] = store.starts[shard, here] + np.arange(used)
    found.append((prompts, pages))
    start += rows
  return found


def prompt_pages(store: Store) -> np.ndarray:
  """[S, P, F], the pages of each prompt in order; what follows is no page."""
  width = size(int(store.counts.max()))
  number = np.arange(width)
  return np.where(number < store.counts[..., None],
                  store.starts[..., None] + number, 0)


def first_view(shards: int, num_slots: int, num_rows: int) -> View:
  """Nothing has begun, and there are no pages."""
  return View(np.full((shards, num_slots), num_rows),
              np.zeros((shards, num_slots), int), np.zeros(shards, int),
              np.zeros((shards, 0), int))


def layout(view: View, num_rows: int, page_size: int,
           ahead: int) -> Layout | None:
  """Slots and pages for what is live and what starts; None = as they are.

  Args:
    view: where the shards stand.
    num_rows: B.
    page_size: W.
    ahead: steps for which there shall be pages, `AHEAD` if the run may end.
  """
  live = view.row < num_rows
  num_live, num_slots = live.sum(axis=1), live.shape[1]
  waiting = num_rows - view.next
  num_pages = view.owner.shape[1]
  slots = num_slots
  while not waiting.any() and num_live.max() <= slots // _FEWER >= _FEWEST:
    slots //= _FEWER

  left = page_size - view.held % page_size
  # A slot at a page's first token lacks that page.
  soon = live & ((left == page_size) | (left <= ahead))
  fresh = np.minimum(num_slots - num_live, waiting)
  used = (view.owner < num_slots).sum(axis=1)
  need = int((used + soon.sum(axis=1) + fresh).max())
  if slots == num_slots and need <= num_pages:
    return None
  # Live slots and pages first, in the order they have.
  order = np.argsort(~live, axis=1, kind='stable')[:, :slots]
  order = np.where(np.arange(slots)[None] < num_live[:, None], order,
                   num_slots)
  pages = np.full((len(order), size(need)), num_pages)
  for shard, owner in enumerate(view.owner):
    held = np.flatnonzero(owner < num_slots)
    pages[shard, :len(held)] = held
  return Layout(order, pages)


def ready(view: View, old: Ready | None, store: Store, group_size: int,
          num_rows: int, fewer: bool, pooled: bool) -> Ready | None:
  """Prompts for what is live and what starts next; None = as they are.

  In a pool all are ready where they lie, and none is listed.

  Args:
    view: where the shards stand.
    old: what lies ready; None = nothing.
    store: the pages of all prompts.
    group_size: G.
    num_rows: B.
    fewer: whether fewer slots go on, for which fewer prompts may do.
    pooled: whether the pages lie in a pool.
  """
  if pooled:
    none = np.zeros((len(view.next), 1), int)
    return None if old else Ready(none, none, none, none,
                                  np.full(len(view.next), num_rows))
  live = view.row < num_rows
  idle = live.shape[1] - live.sum(axis=1)
  waiting = num_rows - view.next
  if old is not None and not fewer:
    # Enough if a good part of the slots can be refilled.
    room = np.minimum(idle + live.shape[1] // 4, waiting)
    if np.all(old.end - view.next >= room):
      return None
  prompts = [np.unique(row[at] // group_size)
             for row, at in zip(view.row, live, strict=True)]
  ahead = np.minimum(view.next + idle + max(live.shape[1] // 2, 1), num_rows)
  wanted = [np.union1d(here, np.arange(first // group_size,
                                       -(-last // group_size)))
            for here, first, last in zip(prompts, view.next, ahead,
                                         strict=True)]
  count = size(max(len(found) for found in wanted))
  pages = size(max(int(counts[found].sum()) for counts, found in
                   zip(store.counts, wanted, strict=True)))
  if old is not None and not fewer:
    count = max(count, old.ids.shape[1])
    pages = max(pages, old.place.shape[1])
  shape = (len(wanted), count)
  ids = np.full(shape, store.counts.shape[1])
  place, number = np.zeros((2, len(wanted), pages), int)
  # Behind every prompt's last page.
  number[:] = 1 + store.counts.max()
  source = np.zeros_like(place)
  for shard, found in enumerate(wanted):
    ids[shard, :len(found)] = found
    counts = store.counts[shard, found]
    total = counts.sum()
    place[shard, :total] = np.repeat(np.arange(len(found)), counts)
    number[shard, :total] = np.arange(total) - np.repeat(
        np.cumsum(counts) - counts, counts)
    source[shard, :total] = number[shard, :total] + np.repeat(
        store.starts[shard, found], counts)
  end = np.minimum(-(-ahead // group_size) * group_size, num_rows)
  return Ready(ids, place, number, source, end)


def finished(before: View, after: View, num_rows: int) -> list[np.ndarray]:
  """The completions of each shard that have ended between two looks."""
  found = []
  for shard in range(len(after.next)):
    live = before.row[shard][before.row[shard] < num_rows]
    begun = np.arange(before.next[shard], after.next[shard])
    found.append(np.setdiff1d(np.concatenate([live, begun]),
                              after.row[shard]))
  return found
