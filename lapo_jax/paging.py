# SPDX-License-Identifier: Apache-2.0
"""Keys and values in pages, and attention over the pages that are live.

A page holds the keys and values of W successive tokens. A prompt's pages are
written once, when it is prefilled, and read once a step for all the slots
that decode its group; a completion's pages belong to one slot. A step reads
the pages there are, whatever row they belong to: its cost follows the tokens
that are live, not the longest row.

A model sees neither: it hands queries, keys and values to `cache.attend`.

N slots, Q pages of completions, R pages of prompts, A active prompts, G
completions of a prompt, K key/value heads, r = H/K queries a key head, E head
width.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lapo_jax import attention, sharding

# Finite, so that a page without a single real token gives no NaN.
_MASKED = -1e30
_INT8_MAX = 127.0


@flax.struct.dataclass
class Pages:
  """Pages of one layer's keys or values.

  Attributes:
    data: [Q, K, E, W] for keys, [Q, K, W, E] for values: the operands of
      their products, as they lie. In the cache's dtype or int8.
    scales: float32 [Q, K, W], what an int8 token is multiplied by; None for
      other dtypes.
  """

  data: jax.Array
  scales: jax.Array | None


def empty(num_pages: int, size: int, shape: tuple[int, int, int],
          dtype: Any) -> tuple:
  """Per layer (keys, values), pages of zeros.

  Args:
    num_pages: Q.
    size: W.
    shape: layers, key/value heads, head width.
    dtype: of the cache.
  """
  num_layers, kv_heads, head_dim = shape

  def pages(*tail):
    scales = None
    if dtype == jnp.int8:
      scales = jnp.zeros((num_pages, kv_heads, size), jnp.float32)
    return Pages(jnp.zeros((num_pages, kv_heads, *tail), dtype), scales)

  return tuple((pages(head_dim, size), pages(size, head_dim))
               for _ in range(num_layers))


def token_bytes(num_layers: int, kv_heads: int, head_dim: int,
                dtype: Any) -> int:
  """Bytes of one token's keys and values in all layers."""
  dtype = jnp.dtype(dtype)
  scale = 4 if dtype == jnp.int8 else 0
  return 2 * num_layers * kv_heads * (head_dim * dtype.itemsize + scale)


@flax.struct.dataclass
class Prefill:
  """Runs whole prompts, and keeps their keys and values.

  Attributes:
    segments: int32 [B, S], 1 on real tokens, 0 behind them.
    kept: per layer (keys, values), [B, S, K, E] each.
    backend: of `attention.causal`.
    head_axis: of the mesh, over which heads lie; None = one device has all.
  """

  segments: jax.Array
  kept: tuple = ()
  backend: str | None = flax.struct.field(pytree_node=False, default=None)
  head_axis: str | None = flax.struct.field(pytree_node=False, default=None)

  def attend(self, queries: Float[Array, 'B S H E'],
             keys: Float[Array, 'B S K E'], values: Float[Array, 'B S K E']
             ) -> tuple[Float[Array, 'B S H E'], 'Prefill']:
    """Causal attention of one layer, the next one."""
    attend = lambda *inputs: (attention.causal(*inputs, backend=self.backend),)
    mixed, = sharding.along(self.head_axis, attend, (2, 2, 2, None), (2,))(
        queries, keys, values, self.segments)
    return mixed, self.replace(kept=(*self.kept, (keys, values)))


@flax.struct.dataclass
class Step:
  """Where the tokens of one decoding step lie; the same for every layer.

  Attributes:
    page: int32 [N], the page that each slot's token goes to; Q = none.
    offset: int32 [N], its place in the page.
    owner: int32 [Q], the slot of each completion page; N = none.
    valid: bool [Q, W], the real tokens, the new ones included.
    readers: int32 [R, G], the slots that read a prompt page; N = none.
    prompt_valid: bool [R, W].
  """

  page: jax.Array
  offset: jax.Array
  owner: jax.Array
  valid: jax.Array
  readers: jax.Array
  prompt_valid: jax.Array


@flax.struct.dataclass
class Decode:
  """Runs one token of every slot over the pages.

  Attributes:
    step: see `Step`.
    pages: per layer (keys, values), `Pages` each, of completions.
    prompts: likewise, of prompts.
    layer: which of them is next.
  """

  step: Step
  pages: tuple
  prompts: tuple
  layer: int = flax.struct.field(pytree_node=False, default=0)

  def attend(self, queries: Float[Array, 'N 1 H E'],
             keys: Float[Array, 'N 1 K E'], values: Float[Array, 'N 1 K E']
             ) -> tuple[Float[Array, 'N 1 H E'], 'Decode']:
    """Writes one layer's keys and values, and attends to the live pages."""
    step = self.step
    own_keys, own_values = self.pages[self.layer]
    own_keys = write(own_keys, step, keys[:, 0], True)
    own_values = write(own_values, step, values[:, 0], False)
    mixed = attend(queries[:, 0], (own_keys, own_values),
                   self.prompts[self.layer], step)
    pages = (*self.pages[:self.layer], (own_keys, own_values),
             *self.pages[self.layer + 1:])
    return mixed[:, None], self.replace(pages=pages, layer=self.layer + 1)


def take(layers: tuple, ids: Int[Array, 'Q']) -> tuple:
  """The pages of these ids; an id beyond the last repeats the last."""
  return jax.tree.map(lambda x: x.at[ids].get(mode='clip'), layers)


def fill(layers: tuple, ids: Int[Array, 'B J'], kept: tuple) -> tuple:
  """Writes whole pages: token s of row b to page ids[b, s // W].

  An id beyond the last page drops what would go there. `kept` is what
  `Prefill` keeps.
  """
  return tuple(
      (_fill(keys, ids, new_keys, True), _fill(values, ids, new_values, False))
      for (keys, values), (new_keys, new_values) in zip(layers, kept,
                                                        strict=True))


def _fill(pages: Pages, ids: Int[Array, 'B J'],
          tokens: Float[Array, 'B S K E'], keys: bool) -> Pages:
  """`fill` of one layer's keys or values."""
  rows, slots, kv_heads, head_dim = tokens.shape
  size = slots // ids.shape[1]
  tokens, scales = _quantize(tokens, pages)
  cut = tokens.reshape(rows * ids.shape[1], size, kv_heads, head_dim)
  cut = cut.transpose(0, 2, 3, 1) if keys else cut.transpose(0, 2, 1, 3)
  put = lambda into, what: into.at[ids.reshape(-1)].set(what, mode='drop')
  if scales is not None:
    scales = scales.reshape(-1, size, kv_heads).transpose(0, 2, 1)
    scales = put(pages.scales, scales)
  return Pages(put(pages.data, cut), scales)


def write(pages: Pages, step: Step, tokens: Float[Array, 'N K E'],
          keys: bool) -> Pages:
  """Writes one token a slot."""
  tokens, scales = _quantize(tokens, pages)
  at = ((step.page, slice(None), slice(None), step.offset) if keys else
        (step.page, slice(None), step.offset))
  data = pages.data.at[at].set(tokens, mode='drop')
  if scales is not None:
    scales = pages.scales.at[step.page, :, step.offset].set(scales,
                                                            mode='drop')
  return Pages(data, scales)


def attend(queries: Float[Array, 'N H E'], completions: tuple[Pages, Pages],
           prompts: tuple[Pages, Pages], step: Step) -> Float[Array, 'N H E']:
  """softmax(q·kᵀ/√E)·v of each slot over its pages and its prompt's.

  Pages are done side by side, each with the queries of its readers, and the
  parts of a slot are added up: exp(s − m) with the slot's own maximum m.
  """
  num_slots, heads, width = queries.shape
  kv_heads = completions[0].data.shape[1]
  grouped = (queries * width**-0.5).reshape(num_slots, kv_heads, -1, width)
  pick = lambda x, ids: x.at[ids].get(mode='clip')

  own = _part(pick(grouped, step.owner), completions, step.valid)
  # A prompt's page has G readers side by side: [R, K, G·r, E] queries.
  readers = pick(grouped, step.readers).transpose(0, 2, 1, 3, 4)
  shape = readers.shape
  shared = _part(readers.reshape(*shape[:2], -1, width), prompts,
                 step.prompt_valid)
  reader_first = lambda x: x.reshape(*shape[:-1], -1).transpose(
      0, 2, 1, 3, 4).reshape(-1, kv_heads, shape[3], x.shape[-1])
  peaks, masses, mixed = (jnp.concatenate([x, reader_first(y)])
                          for x, y in zip(own, shared, strict=True))

  # Each page has its own maximum so far; now they meet.
  ids = jnp.concatenate([step.owner, step.readers.reshape(-1)])
  most = jax.ops.segment_max(peaks, ids, num_slots + 1)
  scale = jnp.exp(peaks - pick(most, ids))
  total = lambda x: jax.ops.segment_sum(x * scale, ids,
                                        num_slots + 1)[:num_slots]
  mixed = total(mixed) / jnp.maximum(total(masses), 1e-30)
  return mixed.reshape(num_slots, heads, width).astype(queries.dtype)


def _part(queries: Float[Array, 'Q K M E'], pages: tuple[Pages, Pages],
          valid: Bool[Array, 'Q W']) -> tuple[Array, Array, Array]:
  """(m, Σ exp(s − m), Σ exp(s − m)·v) of each page; s = q·kᵀ, m = max s."""
  scores = _scores(queries, pages[0], valid)
  peaks = jnp.max(scores, axis=-1, keepdims=True)
  # Bounded: a CPU takes ten times as long over exp(−1e30).
  weights = jnp.exp(jnp.maximum(scores - peaks, -80.0))
  return (peaks, jnp.sum(weights, axis=-1, keepdims=True),
          _mix(weights, pages[1]))


def _scores(queries: Float[Array, 'Q K M E'], keys: Pages,
            valid: Bool[Array, 'Q W']) -> Float[Array, 'Q K M W']:
  """q·kᵀ, float32."""
  data = keys.data.astype(queries.dtype)
  scores = jnp.einsum('qkme,qkew->qkmw', queries, data,
                      preferred_element_type=jnp.float32)
  if keys.scales is not None:
    scores = scores * keys.scales[:, :, None]
  return jnp.where(valid[:, None, None], scores, _MASKED)


def _mix(weights: Float[Array, 'Q K M W'],
         values: Pages) -> Float[Array, 'Q K M E']:
  """weights·v, float32."""
  if values.scales is not None:
    weights = weights * values.scales[:, :, None]
    return jnp.einsum('qkmw,qkwe->qkme', weights,
                      values.data.astype(weights.dtype))
  return jnp.einsum('qkmw,qkwe->qkme', weights.astype(values.data.dtype),
                    values.data, preferred_element_type=jnp.float32)


def _quantize(tokens: Float[Array, '*A E'], pages: Pages
              ) -> tuple[Array, Float[Array, '*A'] | None]:
  """The tokens as the pages hold them; int8 with one scale a token and head."""
  if pages.scales is None:
    return tokens.astype(pages.data.dtype), None
  tokens = tokens.astype(jnp.float32)
  scales = jnp.max(jnp.abs(tokens), axis=-1) / _INT8_MAX
  whole = jnp.round(tokens / jnp.maximum(scales, 1e-30)[..., None])
  return whole.astype(jnp.int8), scales
