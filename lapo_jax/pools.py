# SPDX-License-Identifier: Apache-2.0
"""Keys and values of all rows in one pool of pages, with a table a row.

The form that a TPU's kernel takes, see `attend`: a row's tokens fill the pages
of its table, all but the last whole. So the whole pages of a prompt serve its
group as they lie, and the first page of a completion's own begins with a copy
of what its prompt has beyond them.

`paging` reads a prompt once for its group; here every row reads it, but no
page that it does not need. A token's keys and values lie together, [2K, E]: a
TPU then writes a token where it belongs, and moves no page for it.

N slots, J pages a row, W tokens a page, H query heads, K key/value heads, E
head width, L ≥ E what it takes in whole lanes: a TPU's memory holds no less.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lapo_jax import sharding

# Tokens in a block of the kernel, rows that it does side by side, and the
# lanes that it is made of.
_BLOCK, _ROWS, _LANES = 512, 8, 128
# Page numbers and lengths that one kernel keeps, in ¾ of its 1 MiB.
_ENTRIES = 3 << 16


def has_kernel(shape: tuple[int, int, int], dtype: Any,
               backend: str | None) -> bool:
  """Whether `attend` is a kernel there, so that pages should lie in a pool.

  Args:
    shape: layers, key/value heads of one device, head width.
    dtype: of keys and values.
    backend: 'xla', 'tpu' or 'gpu'; None = JAX's.
  """
  _, kv_heads, width = shape
  # A token's keys and values fill whole tiles of 1, 2, 4 or 8 sublanes.
  tiles = kv_heads if dtype == jnp.bfloat16 else 2 * kv_heads
  return ((backend or jax.default_backend()) == 'tpu'
          and dtype in (jnp.bfloat16, jnp.float32) and width <= 2 * _LANES
          and (tiles in (1, 2, 4) or tiles % 8 == 0))


def empty(num_pages: int, size: int, shape: tuple[int, int, int],
          dtype: Any) -> tuple:
  """Per layer, [pages, W, 2K, L] of zeros.

  Args:
    num_pages: how many.
    size: W.
    shape: layers, key/value heads, head width.
    dtype: of the cache.
  """
  num_layers, kv_heads, width = shape
  shape = num_pages, size, 2 * kv_heads, whole_lanes(width)
  return tuple(jnp.zeros(shape, dtype) for _ in range(num_layers))


def whole_lanes(width: int) -> int:
  """L, the numbers that `width` take in a TPU's memory."""
  return -(-width // _LANES) * _LANES


def fill(pool: tuple, ids: Int[Array, 'B J'], kept: tuple) -> tuple:
  """Writes whole pages: token s of row b to page ids[b, s // W].

  An id beyond the last page drops what would go there. `kept` is what
  `paging.Prefill` keeps.
  """
  put = lambda pages, layer: pages.at[ids.reshape(-1)].set(
      _join(*layer, pages).reshape(-1, *pages.shape[1:]), mode='drop')
  return tuple(map(put, pool, kept))


def take(pool: tuple, ids: Int[Array, 'Q']) -> tuple:
  """The pages of these ids; an id beyond the last repeats the last."""
  return jax.tree.map(lambda x: x.at[ids].get(mode='clip'), pool)


def copy(pool: tuple, count: Int[Array, ''], source: Int[Array, 'N'],
         into: Int[Array, 'N']) -> tuple:
  """Copies page source[i] to into[i] for i < count, one after the other."""

  def one(i, pool):
    move = lambda x: jax.lax.dynamic_update_slice_in_dim(
        x, jax.lax.dynamic_slice_in_dim(x, source[i], 1), into[i], 0)
    return jax.tree.map(move, pool)

  return jax.lax.fori_loop(0, count, one, pool)


@flax.struct.dataclass
class Decode:
  """Runs one token of every slot over the pages of its table.

  Attributes:
    page: int32 [N], the page that each slot's token goes to; beyond the last
      page of the pool = none.
    offset: int32 [N], its place in the page.
    lengths: int32 [N], tokens that the slot sees, the new one too; 0 = none.
    table: int32 [N, J], the slot's pages in order.
    pages: per layer, [pages, W, 2K, L].
    layer: which of them is next.
    head_axis: of the mesh, over which heads lie; None = one device has all.
  """

  page: jax.Array
  offset: jax.Array
  lengths: jax.Array
  table: jax.Array
  pages: tuple
  layer: int = flax.struct.field(pytree_node=False, default=0)
  head_axis: str | None = flax.struct.field(pytree_node=False, default=None)

  def attend(self, queries: Float[Array, 'N 1 H E'],
             keys: Float[Array, 'N 1 K E'], values: Float[Array, 'N 1 K E']
             ) -> tuple[Float[Array, 'N 1 H E'], 'Decode']:
    """Writes one layer's keys and values, and attends to each slot's pages."""

    def write_and_attend(queries, keys, values, pages, page, offset, lengths,
                         table):
      pages = pages.at[page, offset].set(
          _join(keys, values, pages)[:, 0], mode='drop')
      return attend(queries[:, 0], pages, lengths, table), pages

    mixed, pages = sharding.along(
        self.head_axis, write_and_attend, (2, 2, 2, 2, *4 * (None,)), (1, 2))(
            queries, keys, values, self.pages[self.layer], self.page,
            self.offset, self.lengths, self.table)
    pages = (*self.pages[:self.layer], pages, *self.pages[self.layer + 1:])
    return mixed[:, None], self.replace(pages=pages, layer=self.layer + 1)


def attend(queries: Float[Array, 'N H E'], pages: Float[Array, 'Q W K2 L'],
           lengths: Int[Array, 'N'], table: Int[Array, 'N J']
           ) -> Float[Array, 'N H E']:
  """softmax(q·kᵀ/√E)·v over the first lengths[n] tokens of pages table[n].

  Each key head serves H/K query heads. A length of 0 gives zeros. Entries of
  the table past a row's last page may hold anything. By JAX's ragged paged
  attention for TPUs, in blocks of about 512 tokens.

  Args:
    queries: of one token a slot.
    pages: heads 2k and 2k + 1 of a token are its keys and values of head k,
      zeros behind them.
    lengths: in tokens.
    table: the pages of each row, in order of their tokens.
  """
  from jax.experimental.pallas.ops.tpu import ragged_paged_attention
  (rows, columns), tokens, width = table.shape, pages.shape[1], queries.shape[2]
  queries = _widen(queries, pages)
  # Pages past the last are fetched too, if only to mask their scores, and a
  # row wants a token at least.
  table = jnp.clip(table, 0, pages.shape[0] - 1)
  held = jnp.maximum(lengths, 1)

  def one(start):
    cut = slice(start, start + part)
    count = table[cut].shape[0]
    return ragged_paged_attention.ragged_paged_attention(
        queries[cut], pages, held[cut], table[cut],
        jnp.arange(count + 1, dtype=jnp.int32), jnp.full(1, count, jnp.int32),
        sm_scale=width**-0.5,
        num_kv_pages_per_block=min(columns, max(1, _BLOCK // tokens)),
        num_queries_per_block=min(count, _ROWS))

  part = max(1, _ENTRIES // (columns + 2))
  mixed = jnp.concatenate([one(start) for start in range(0, rows, part)])
  mixed = mixed[..., :width]
  return jnp.where(lengths[:, None, None] > 0, mixed, 0).astype(queries.dtype)


def _join(keys: Float[Array, 'N S K E'], values: Float[Array, 'N S K E'],
          pages: Float[Array, 'Q W K2 L']) -> Float[Array, 'N S K2 L']:
  """Keys and values of each head in turn, as the pages hold them."""
  joined = jnp.stack([keys, values], axis=3).astype(pages.dtype)
  return _widen(joined.reshape(*keys.shape[:2], -1, keys.shape[3]), pages)


def _widen(x: Float[Array, '*A E'],
           pages: Float[Array, 'Q W K2 L']) -> Float[Array, '*A L']:
  """Zeros up to whole lanes."""
  more = pages.shape[-1] - x.shape[-1]
  return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, more)])
