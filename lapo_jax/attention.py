# SPDX-License-Identifier: Apache-2.0
"""Attention over whole rows, by backend.

Each function has one meaning, that of its XLA form, which runs everywhere.
On TPUs and GPUs kernels that come with JAX compute the same without holding
scores in memory; their results differ by rounding. Shapes that a kernel does
not take get the XLA form, see each function.

The compiler partitions the XLA form, never a kernel. On several devices call
these inside `jax.shard_map(..., check_vma=False)`, rows split over one mesh
axis, query heads and key heads alike over another: no row and no key head needs
its neighbours. `Whole` does so, and cuts long rows too.

Shapes: B rows, S slots, H query heads, K key heads, E head width.
"""

import functools
import math

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int
import numpy as np

_BACKENDS = ('xla', 'tpu', 'gpu')

# Finite, so that a row without a single key gives no NaN.
_MASKED = -1e30
# Scores per row and head that the XLA form holds at a time: 1,024 slots whole.
_SCORES = 1 << 20
# Bands of queries that a whole row is cut into there, and their least slots.
_BANDS, _BAND = 4, 64
# Slots in a block of the TPU's kernels, and the lanes it is made of.
_BLOCK, _LANES = 512, 128
# Slots in a block of the GPU's kernels.
_GPU_BLOCK = 128


def causal(queries: Float[Array, 'B S H E'], keys: Float[Array, 'B S K E'],
           values: Float[Array, 'B S K E'], segments: Int[Array, 'B S'], *,
           backend: str | None = None) -> Float[Array, 'B S H E']:
  """softmax(q·kᵀ/√E)·v: a token sees its own segment in slots ≤ its own.

  Each key head serves H/K query heads. Segment 0 is padding: it sees and is
  seen by padding alone, so its outputs are finite, and mean nothing.

  XLA: scores in float32. Up to four bands of queries, each against the slots
  up to its own last: five eighths of all pairs. When S > 1,024 the backward
  pass computes them again, in blocks of at most 1,024 × 1,024 a head, so that
  [B, H, S, S] is never held.
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
  backend = _chosen(backend)
  if _tpu_takes(backend, queries):
    slots, block = _splash_slots(segments.shape[1])
    queries, keys, values, padded = (
        _pad_slots(x, slots) for x in (queries, keys, values, segments))
    return _splash(_splash_kernel(queries.shape[2], slots, block), queries,
                   keys, values, padded, padded)[:, :segments.shape[1]]
  if backend == 'gpu' and _gpu_takes(queries.shape[-1], queries.dtype):
    return _flash(queries, keys, values, segments)
  return _bands(queries, keys, values, segments)


@flax.struct.dataclass
class Whole:
  """Runs whole rows through a model: its `cache` when nothing is sampled.

  On a mesh each device attends for its own rows, slots and heads: for the
  queries of its slots it gathers the keys and values of the row, whose
  gradient is summed back, so that scores are held for a device's own queries
  alone. Later slots see more keys than earlier ones, and devices wait for the
  last. K key heads that the heads' devices do not divide, but are divided by,
  are cut so that a device has the one that its query heads share; if neither
  holds, each of them does all heads. S should divide by the devices of a row,
  on TPUs by 128 times as many: else the slots are moved, layer by layer, to
  make room for padding at the end.

  On GPUs rows that are cut get the XLA form.

  Attributes:
    segments: int32 [B, S], as in `causal`.
    place: how [B, S] lies on a mesh, rows over its first axes, slots over its
      second; heads lie over the axes that are left. None = one device.
    backend: as in `causal`, but None takes that of the mesh's devices.
  """

  segments: jax.Array
  place: NamedSharding | None = flax.struct.field(pytree_node=False,
                                                  default=None)
  backend: str | None = flax.struct.field(pytree_node=False, default=None)

  def attend(self, queries: Float[Array, 'B S H E'],
             keys: Float[Array, 'B S K E'], values: Float[Array, 'B S K E']
             ) -> tuple[Float[Array, 'B S H E'], 'Whole']:
    """`causal` of one layer, and itself for the next.

    Raises:
      ValueError: rows that the mesh's devices do not divide.
    """
    backend, place = self.backend, self.place
    if place is not None and backend is None:
      platform = place.mesh.devices.flat[0].platform
      backend = platform if platform in _BACKENDS else 'xla'
    inputs = queries, keys, values, self.segments
    if place is None or place.mesh.size == 1:
      return causal(*inputs, backend=backend), self
    return _over_mesh(*inputs, place, _chosen(backend)), self

  def lay(self, hidden: Float[Array, 'B S D']) -> Float[Array, 'B S D']:
    """Hidden states where their rows and slots lie.

    Of an embedding cut along D the compiler else goes on with hidden states
    that are.
    """
    if self.place is None:
      return hidden
    return jax.lax.with_sharding_constraint(hidden, self.place)

  @property
  def cuts_slots(self) -> bool:
    """Whether a row's slots lie on several devices.

    Rows and slots made one axis would then be gathered.
    """
    if self.place is None:
      return False
    axes = (*self.place.spec, None, None)[1]
    return math.prod(self.place.mesh.shape[a] for a in _names(axes)) > 1


def _chosen(backend):
  if backend is None:
    platform = jax.default_backend()
    return platform if platform in _BACKENDS else 'xla'
  if backend not in _BACKENDS:
    raise ValueError(
        f'backend is one of {", ".join(_BACKENDS)}, or None for the one that '
        f'JAX runs on, not {backend!r}')
  return backend


def _tpu_takes(backend, queries):
  return (backend == 'tpu' and queries.shape[-1] <= 256
          and queries.dtype in (jnp.bfloat16, jnp.float32))


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
  # Scaled and divided where there are E numbers a query, not C.
  scores = jnp.einsum('bkre,bkce->bkrc', rows * width**-0.5, keys,
                      preferred_element_type=jnp.float32)
  scores = scores.reshape(batch, kv_heads, shared, slots, -1)
  scores = scores + jnp.where(mask, 0.0, _MASKED)[:, None, None]
  peaks = jnp.max(scores, axis=-1, keepdims=True)
  weights = jnp.exp(scores - jax.lax.stop_gradient(peaks)).reshape(
      batch, kv_heads, shared * slots, -1)
  mixed = jnp.einsum('bkrc,bkce->bkre', weights.astype(values.dtype), values)
  mixed = mixed / jnp.sum(weights, axis=-1, keepdims=True)
  mixed = mixed.astype(values.dtype).reshape(batch, heads, slots, width)
  return mixed.transpose(0, 2, 1, 3)


def _over_mesh(queries, keys, values, segments, place, backend):
  """`causal` on every device of a mesh, see `Whole`."""
  mesh, (rows, cut) = place.mesh, (*place.spec, None, None)[:2]
  size = lambda axes: math.prod(mesh.shape[axis] for axis in _names(axes))
  if segments.shape[0] % size(rows):
    raise ValueError(
        f'{segments.shape[0]} rows do not divide by the {size(rows)} devices '
        f'of the mesh axes {_names(rows)}: expected a multiple.')
  left = tuple(axis for axis in mesh.axis_names
               if axis not in _names(rows) + _names(cut))
  (slots, heads), kv_heads = queries.shape[1:3], keys.shape[2]
  spread, parts = size(left), size(cut)
  # One key head on a device, that of all its query heads.
  picks = heads % spread == 0 and spread % kv_heads == 0
  key_axes = left if kv_heads % spread == 0 else None
  query_axes = left if picks else key_axes
  kernel, whole = None, _up(slots, parts)
  if parts > 1 and _tpu_takes(backend, queries):
    whole, block = _splash_slots(slots, parts)
    own_heads = heads if query_axes is None else heads // spread
    kernel = _splash_kernel(own_heads, whole, block, parts)

  def attend(kernel, queries, keys, values, segments):
    if picks and key_axes is None:
      head = jax.lax.axis_index(left) * kv_heads // spread
      keys, values = (jax.lax.dynamic_slice_in_dim(x, head, 1, axis=2)
                      for x in (keys, values))
    if parts == 1:
      return causal(queries, keys, values, segments, backend=backend)
    own = segments
    keys, values, segments = (jax.lax.all_gather(x, cut, axis=1, tiled=True)
                              for x in (keys, values, segments))
    if kernel is not None:
      return _splash(kernel, queries, keys, values, own, segments)
    return _blocks(queries, keys, values, own, segments,
                   jax.lax.axis_index(cut) * own.shape[1])

  kernel_spec = None
  if kernel is not None:
    kernel_spec = kernel.manual_sharding_spec(
        NamedSharding(mesh, PartitionSpec(None, cut)))
  lies = lambda axes: PartitionSpec(rows, cut, axes)
  mixed = jax.shard_map(
      attend, mesh=mesh, check_vma=False, out_specs=lies(query_axes),
      in_specs=(kernel_spec, lies(query_axes), lies(key_axes), lies(key_axes),
                PartitionSpec(rows, cut)),
  )(kernel, *(_pad_slots(x, whole) for x in (queries, keys, values, segments)))
  return mixed[:, :slots]


def _names(axes):
  """Mesh axes as one entry of a PartitionSpec has them, as a tuple."""
  return axes if isinstance(axes, tuple) else (axes,) if axes else ()


def _bands(queries, keys, values, segments):
  """Of whole rows: no band of queries meets the keys that follow it."""
  slots = segments.shape[1]
  count = min(max(slots // _BAND, 1), _BANDS)
  ends = [slots * (i + 1) // count for i in range(count)]
  return jnp.concatenate([
      _blocks(queries[:, start:end], keys[:, :end], values[:, :end],
              segments[:, start:end], segments[:, :end], start,
              slots**2 > _SCORES)
      for start, end in zip([0, *ends], ends, strict=False)], axis=1)


def _blocks(queries, keys, values, own, segments, start, again=False):
  """Of queries in slots `start` and on, whose segments are `own`.

  The backward pass computes scores `again` if asked, or if there are too many.
  Then it goes block by block: XLA would hold those of all bands side by side.
  """
  batch, slots = own.shape
  heads_first = lambda x: x.transpose(0, 2, 1, 3)
  keys, values = heads_first(keys), heads_first(values)
  key_slots = jnp.arange(segments.shape[1])

  def attend(block):
    own, own_segments, own_slots = block
    seen = key_slots[None, :] <= own_slots[:, None]
    same = own_segments[:, :, None] == segments[:, None, :]
    return _attend(own, keys, values, seen[None] & same)

  count = max(-(-slots * segments.shape[1] // _SCORES), 2 if again else 1)
  if count == 1:
    return attend((queries, own, start + jnp.arange(slots)))
  size = -(-slots // count)
  split = lambda x: _pad_slots(x, count * size).reshape(
      batch, count, size, *x.shape[2:]).swapaxes(0, 1)
  mixed = jax.lax.map(jax.checkpoint(attend), (
      split(queries), split(own),
      start + jnp.arange(count * size).reshape(count, size)))
  return mixed.swapaxes(0, 1).reshape(
      batch, count * size, *queries.shape[2:])[:, :slots]


def _splash_slots(slots, parts=1):
  """(slots with padding, slots a block): `parts` devices have whole blocks."""
  # Blocks of one size that fill S almost: 640 slots are two of 384, not of 512.
  count = -(-slots // (_BLOCK * parts))
  block = _up(-(-slots // (count * parts)), _LANES)
  return count * parts * block, block


def _splash(kernel, queries, keys, values, own, segments):
  """Of whole blocks; a device may have a part of the queries."""
  from jax.experimental.pallas.ops.tpu import splash_attention

  def attend(queries, keys, values, own, segments):
    ids = splash_attention.SegmentIds(own, segments)
    return kernel(queries, keys, values, ids)

  heads_first = lambda x: x.transpose(0, 2, 1, 3)
  mixed = jax.vmap(attend)(
      heads_first(queries * queries.shape[-1]**-0.5), heads_first(keys),
      heads_first(values), own, segments)
  return heads_first(mixed)


@functools.lru_cache(maxsize=32)
def _splash_kernel(heads, slots, block, parts=1):
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
        mask, block_sizes=sizes, head_shards=1, q_seq_shards=parts)
  return jax.tree.map(np.asarray, kernel)


def _flash(queries, keys, values, segments):
  from jax.experimental.pallas.ops.gpu import attention
  slots, heads, width = queries.shape[1:]
  pad = lambda x: _pad_slots(x, _up(slots, _GPU_BLOCK))
  repeat = lambda x: jnp.repeat(x, heads // x.shape[2], axis=2)
  mixed = attention.mha(pad(queries), pad(repeat(keys)), pad(repeat(values)),
                        pad(segments), sm_scale=width**-0.5, causal=True)
  return mixed[:, :slots]
