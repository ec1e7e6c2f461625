# SPDX-License-Identifier: Apache-2.0
"""Attention over whole rows and over pages of a cache, by backend.

Each function has one meaning, that of its XLA form, which runs everywhere.
On TPUs and GPUs kernels that come with JAX compute the same without holding
scores in memory; their results differ by rounding. Shapes that a kernel does
not take get the XLA form, see each function.

The compiler partitions the XLA form, never a kernel. For kernels on several
devices call these inside `jax.shard_map(..., check_vma=False)`, rows split over
one mesh axis, query heads and key heads alike over another: no row and no key
head needs its neighbours.

Shapes: B rows, S slots, H query heads, K key heads, E head width; N rows that
decode, J pages a row, W tokens a page.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
import numpy as np

_BACKENDS = ('xla', 'tpu', 'gpu')

# Finite, so that a row without a single key gives no NaN.
_MASKED = -1e30
# Scores per row and head that the XLA form holds at a time: 1,024 slots whole.
_SCORES = 1 << 20
# Slots or tokens in a block of the TPU's kernels, and the lanes it is made of.
_BLOCK, _LANES = 512, 128
# Page numbers and lengths that one TPU kernel keeps, in ¾ of its 1 MiB.
_ENTRIES = 3 << 16
# Slots or tokens in a block of the GPU's kernels, and parts of a row that it
# decodes side by side.
_GPU_BLOCK, _GPU_SPLITS = 128, 8


def causal(queries: Float[Array, 'B S H E'], keys: Float[Array, 'B S K E'],
           values: Float[Array, 'B S K E'], segments: Int[Array, 'B S'], *,
           backend: str | None = None) -> Float[Array, 'B S H E']:
  """softmax(q·kᵀ/√E)·v: a token sees its own segment in slots ≤ its own.

  Each key head serves H/K query heads. Segment 0 is padding: it sees and is
  seen by padding alone, so its outputs are finite, and mean nothing.

  XLA: scores in float32, in blocks of queries that the backward pass computes
  again, so that [B, H, S, S] is never held when S > 1,024.
  TPU: splash attention, S padded to whole blocks of at most 512 slots. Needs
  bfloat16 or float32 and E ≤ 256.
  GPU: JAX's Pallas flash attention, S padded to whole blocks of 128 slots and
  key heads repeated. Needs bfloat16 and E 16, 32, 64 or 128. (cuDNN takes
  segments as a bias only, [B, 1, S, S], with a gradient as large.)

  Args:
    segments: the segment of each token; 0 on padding, wherever it lies.
    backend: 'xla', 'tpu' or 'gpu'; None takes that of `jax.default_backend()`
      when the caller is traced.

  Raises:
    ValueError: if the backend is none of these.
  """
  width, dtype = queries.shape[-1], queries.dtype
  backend = _chosen(backend)
  if backend == 'tpu' and width <= 256 and dtype in (jnp.bfloat16, jnp.float32):
    return _splash(queries, keys, values, segments)
  if backend == 'gpu' and _gpu_takes(width, dtype):
    return _flash(queries, keys, values, segments)
  return _blocks(queries, keys, values, segments)


def paged(queries: Float[Array, 'N H E'],
          key_pages: Float[Array, 'K pages W E'],
          value_pages: Float[Array, 'K pages W E'],
          lengths: Int[Array, 'N'], table: Int[Array, 'N J'], *,
          backend: str | None = None) -> Float[Array, 'N H E']:
  """softmax(q·kᵀ/√E)·v over the first lengths[n] tokens of pages table[n].

  Each key head serves H/K query heads. A length of 0 gives zeros. Entries of
  the table past a row's last page may hold anything, pages only finite
  numbers. Only the XLA form has a gradient.

  XLA: gathers the J pages of each row; scores in float32.
  TPU: JAX's paged attention, in blocks of about 512 tokens. Needs bfloat16
  pages (it rounds others to that), E a multiple of 128 and W of 16.
  GPU: JAX's Pallas paged attention. Needs bfloat16 queries and pages, E 16,
  32, 64 or 128, and W a power of two up to 128.

  Args:
    table: the pages of each row, in order of their tokens.
    backend: as in `causal`.

  Raises:
    ValueError: if the backend is none of these.
  """
  tokens, width = key_pages.shape[2:]
  backend = _chosen(backend)
  # Kernels also fetch pages past the last, if only to mask their scores.
  table = jnp.clip(table, 0, key_pages.shape[1] - 1)
  inputs = queries, key_pages, value_pages, lengths, table
  if (backend == 'tpu' and key_pages.dtype == jnp.bfloat16
      and width % _LANES == 0 and tokens % 16 == 0):
    return _paged_tpu(*inputs)
  if (backend == 'gpu' and queries.dtype == key_pages.dtype
      and _gpu_takes(width, queries.dtype) and _GPU_BLOCK % tokens == 0):
    return _paged_gpu(*inputs)
  return _paged_xla(*inputs)


def _chosen(backend):
  if backend is None:
    platform = jax.default_backend()
    return platform if platform in _BACKENDS else 'xla'
  if backend not in _BACKENDS:
    raise ValueError(
        f'backend is one of {", ".join(_BACKENDS)}, or None for the one that '
        f'JAX runs on, not {backend!r}')
  return backend


def _gpu_takes(width, dtype):
  # Triton wants powers of two; a block's share of memory ends at 128.
  return dtype == jnp.bfloat16 and width in (16, 32, 64, 128)


def _up(x, multiple):
  return -(-x // multiple) * multiple


def _pad_slots(x, slots):
  """[B, S, ...] -> [B, slots, ...], zeros at the end."""
  widths = [(0, 0)] * x.ndim
  widths[1] = (0, slots - x.shape[1])
  return jnp.pad(x, widths)


def _attend(queries: Float[Array, 'B S H E'], keys: Float[Array, 'B K C E'],
            values: Float[Array, 'B K C E'],
            mask: Bool[Array, 'B S C']) -> Float[Array, 'B S H E']:
  """Attention to the C slots where the mask is true, scores held whole."""
  batch, slots, heads, width = queries.shape
  kv_heads = keys.shape[1]
  shared = heads // kv_heads
  # Matrix products over leading batch axes, [B, K, H/K · S, E] by [B, K, C, E]:
  # the form that every backend has a fast routine for.
  rows = queries.transpose(0, 2, 1, 3).reshape(batch, kv_heads, -1, width)
  scores = jnp.einsum('bkre,bkce->bkrc', rows, keys,
                      preferred_element_type=jnp.float32) * width**-0.5
  scores = scores.reshape(batch, kv_heads, shared, slots, -1)
  scores = jnp.where(mask[:, None, None], scores, _MASKED)
  weights = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
  mixed = jnp.einsum('bkrc,bkce->bkre',
                     weights.reshape(batch, kv_heads, shared * slots, -1),
                     values)
  return mixed.reshape(batch, heads, slots, width).transpose(0, 2, 1, 3)


def _blocks(queries, keys, values, segments):
  batch, slots = segments.shape
  heads_first = lambda x: x.transpose(0, 2, 1, 3)
  keys, values = heads_first(keys), heads_first(values)
  key_slots = jnp.arange(slots)

  def attend(block):
    own, own_segments, own_slots = block
    seen = key_slots[None, :] <= own_slots[:, None]
    same = own_segments[:, :, None] == segments[:, None, :]
    return _attend(own, keys, values, seen[None] & same)

  count = -(-slots * slots // _SCORES)
  if count == 1:
    return attend((queries, segments, key_slots))
  size = -(-slots // count)
  split = lambda x: _pad_slots(x, count * size).reshape(
      batch, count, size, *x.shape[2:]).swapaxes(0, 1)
  mixed = jax.lax.map(jax.checkpoint(attend), (
      split(queries), split(segments),
      jnp.arange(count * size).reshape(count, size)))
  return mixed.swapaxes(0, 1).reshape(
      batch, count * size, *queries.shape[2:])[:, :slots]


def _splash(queries, keys, values, segments):
  from jax.experimental.pallas.ops.tpu import splash_attention
  slots, heads, width = queries.shape[1:]
  # Blocks of one size that fill S almost: 640 slots are two of 384, not of 512.
  count = -(-slots // _BLOCK)
  size = _up(-(-slots // count), _LANES)
  kernel = _splash_kernel(heads, count * size, size)

  def attend(queries, keys, values, segments):
    ids = splash_attention.SegmentIds(segments, segments)
    return kernel(queries, keys, values, ids)

  heads_first = lambda x: _pad_slots(x, count * size).transpose(0, 2, 1, 3)
  mixed = jax.vmap(attend)(
      heads_first(queries * width**-0.5), heads_first(keys),
      heads_first(values), _pad_slots(segments, count * size))
  return mixed.transpose(0, 2, 1, 3)[:, :slots]


@functools.lru_cache(maxsize=32)
def _splash_kernel(heads, slots, block):
  """Built once per shape: a model's layers then share one trace of it."""
  from jax.experimental.pallas.ops.tpu import splash_attention
  sizes = splash_attention.BlockSizes(
      block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block,
      block_q_dq=block, block_kv_dq=block)
  mask = splash_attention.MultiHeadMask(
      [splash_attention.CausalMask((slots, slots))] * heads)
  # What is kept must not belong to the trace that asked first.
  with jax.ensure_compile_time_eval():
    kernel = splash_attention.make_splash_mha(
        mask, block_sizes=sizes, head_shards=1, q_seq_shards=1)
  return jax.tree.map(np.asarray, kernel)


def _flash(queries, keys, values, segments):
  from jax.experimental.pallas.ops.gpu import attention
  slots, heads, width = queries.shape[1:]
  pad = lambda x: _pad_slots(x, _up(slots, _GPU_BLOCK))
  repeat = lambda x: jnp.repeat(x, heads // x.shape[2], axis=2)
  mixed = attention.mha(pad(queries), pad(repeat(keys)), pad(repeat(values)),
                        pad(segments), sm_scale=width**-0.5, causal=True)
  return mixed[:, :slots]


def _paged_xla(queries, key_pages, value_pages, lengths, table):
  rows, width = table.shape[0], queries.shape[-1]
  # [K, N, J, W, E] -> [N, K, J · W, E]
  gather = lambda pages: pages[:, table].swapaxes(0, 1).reshape(
      rows, pages.shape[0], -1, width)
  keys, values = gather(key_pages), gather(value_pages)
  real = jnp.arange(keys.shape[2])[None, :] < lengths[:, None]
  mixed = _attend(queries[:, None], keys, values, real[:, None])[:, 0]
  return jnp.where(lengths[:, None, None] > 0, mixed, 0)


def _paged_tpu(queries, key_pages, value_pages, lengths, table):
  from jax.experimental.pallas.ops.tpu import paged_attention
  (rows, pages), tokens = table.shape, key_pages.shape[2]
  block = min(pages, max(1, _BLOCK // tokens))
  table = _pad_slots(table, _up(pages, block))
  # In float32, which the kernel turns queries into; it leaves scaling to us.
  scaled = queries.astype(jnp.float32) * queries.shape[-1]**-0.5
  part = max(1, _ENTRIES // (table.shape[1] + 1))
  mixed = [paged_attention.paged_attention(
      scaled[i:i + part], key_pages, value_pages, lengths[i:i + part],
      table[i:i + part], pages_per_compute_block=block)
           for i in range(0, rows, part)]
  return jnp.concatenate(mixed).astype(queries.dtype)


def _paged_gpu(queries, key_pages, value_pages, lengths, table):
  from jax.experimental.pallas.ops.gpu import paged_attention
  pages, tokens = table.shape[1], key_pages.shape[2]
  block = _GPU_BLOCK // tokens
  splits = min(_GPU_SPLITS, -(-pages // block))
  return paged_attention.paged_attention(
      queries * queries.shape[-1]**-0.5, key_pages, value_pages,
      _pad_slots(table, _up(pages, block * splits)), lengths,
      pages_per_compute_block=block, k_splits=splits)
