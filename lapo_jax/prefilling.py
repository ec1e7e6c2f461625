# SPDX-License-Identifier: Apache-2.0
"""The sampler's device programs for prompts, each for one data shard.

`prefill` runs prompts through the model once and keeps their pages in a
store; `bring` copies those of the prompts whose completions are next, so that
a step reads no others. Where the pages lie in a pool (`pools`) nothing is
copied: the store is the pool's first part.

P prompts, A of them ready, R pages of those, W tokens a page, D model width.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from lapo_jax import forcing, paging, pools, slots, types


class Setup(NamedTuple):
  """What is fixed when the programs are made.

  Attributes:
    model: see `sampling`.
    group_size: G.
    eos_ids: the stop tokens.
    page_size: W.
    backend: of `attention.causal`.
    alone: whether a shard leaves its loop by itself.
    head_axis: of the mesh, over which a shard's heads lie; None = one device
      has them all, or the compiler cuts what it likes.
    pooled: whether keys and values lie in a pool.
    forced_words: what is written in place of drawn tokens; None = nothing is.
  """

  model: Any
  group_size: int
  eos_ids: Sequence[int]
  page_size: int
  backend: str | None
  alone: bool
  head_axis: str | None
  pooled: bool
  forced_words: forcing.Words | None


@flax.struct.dataclass
class Store:
  """The prompts, prefilled.

  Attributes:
    hidden: float [P, D], the model's state after each.
    pages: per layer (keys, values): `Pages`, or the pool.
  """

  hidden: types.Leaf
  pages: types.Leaf


@flax.struct.dataclass
class Active:
  """The prompts that lie ready, see `slots.Ready`.

  Attributes:
    pages: per layer (keys, values), `Pages` [R]; none with a pool.
    ids: int32 [A].
    place: int32 [R].
    number: int32 [R].
    end: int32 [1].
  """

  pages: types.Leaf
  ids: types.Leaf
  place: types.Leaf
  number: types.Leaf
  end: types.Leaf


def prefill(setup: Setup, params: Any, prompts: tuple[Array, Array],
            rows: Int[Array, 'R'], into: Int[Array, 'R J'],
            store: Store) -> Store:
  """Runs prompts through the model, and keeps their pages.

  Args:
    setup: what is fixed.
    params: of the model.
    prompts: tokens and mask of all of this shard, [P, L], left-padded.
    rows: which of them; P = none.
    into: the pages in the store for each J·W tokens; one that there is not =
      none.
    store: takes them.
  """
  size = setup.page_size
  here = jax.tree.map(lambda x: x.at[rows].get(mode='clip'),
                      prompts)
  num_tokens = jnp.sum(here[1], axis=1, dtype=jnp.int32)
  # To the left: pages begin with a prompt's first token.
  places = jnp.arange(into.shape[1] * size)[None]
  slots_ = here[0].shape[1]
  source = jnp.minimum(places + slots_ - num_tokens[:, None], slots_ - 1)
  tokens = jnp.take_along_axis(here[0], source, axis=1)
  real = places < num_tokens[:, None]
  hidden, cache = setup.model.apply(
      {'params': params}, tokens, jnp.broadcast_to(places, tokens.shape),
      cache=paging.Prefill(real.astype(jnp.int32), backend=setup.backend,
                           head_axis=setup.head_axis))
  last = jnp.take_along_axis(hidden, num_tokens[:, None, None] - 1, axis=1)
  form = pools if setup.pooled else paging
  return Store(
      store.hidden.at[rows].set(last[:, 0].astype(store.hidden.dtype),
                                mode='drop'),
      form.fill(store.pages, into, cache.kept))


def bring(store: Store, ready: slots.Ready) -> Active:
  """Copies the pages of the prompts that shall lie ready."""
  return Active(paging.take(store.pages, ready.source), ready.ids, ready.place,
                ready.number, ready.end)
