# SPDX-License-Identifier: Apache-2.0
"""Log-probs of tokens, without the logits of all of them.

  log π(token) = (h·W)[token] / τ − log Σ_v exp((h·W)[v] / τ)

At V = 152 thousand the logits of one row of 8,192 slots are 5 GB in float32.
Here they are made for some tokens at a time, and made again for the gradient.

On a mesh each device does this for the tokens and the part of the vocabulary
that lie with it; the sums over the vocabulary are three numbers a token. The
table's gradient is summed over the devices once, after the last token.

Shapes: B rows, T slots, D width, V vocabulary; N tokens of a device.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

# Logits that a device holds at a time: 256 MiB, 441 tokens of 152 thousand.
_LOGITS = 1 << 26


def token_logprobs(
    hidden: Float[Array, 'B T D'], table: Float[Array, 'D V'],
    tokens: Int[Array, 'B T'], *, temperature: float = 1.0,
    place: NamedSharding | None = None, most_logits: int = _LOGITS,
) -> tuple[Float[Array, 'B T'], Float[Array, 'B T']]:
  """log softmax(hidden·table / τ)[token] and the entropies in nats, float32.

  Products are those of the hidden states' dtype, summed in float32; the
  table's gradient is summed in float32 too. The entropies have no gradient.

  Args:
    hidden: the states that predict the tokens.
    table: in any float dtype; its gradient has the same.
    tokens: below V.
    temperature: τ > 0.
    place: how [B, T] lies on a mesh, rows over its first axes, slots over its
      second; the vocabulary lies over the axes that are left, if they divide
      it. None = one device.
    most_logits: that a device holds at a time, or one token's. Where all fit,
      the gradient reads them; else it makes them again.

  Raises:
    ValueError: rows that the mesh's devices do not divide.
  """
  how = _how(table.shape[1], float(temperature), place, most_logits)
  rows, parts = len(tokens), how.size(how.slots)
  if rows % how.size(how.rows):
    raise ValueError(
        f'{rows} rows do not divide by the {how.size(how.rows)} devices of '
        f'the mesh axes {how.rows}: expected a multiple.')
  slots = tokens.shape[1]
  filler = ((0, 0), (0, -slots % parts))
  found = _chosen(how, jnp.pad(hidden, (*filler, (0, 0))), table,
                  jnp.pad(tokens, filler))
  return tuple(x[:, :slots] for x in found)


class _How(NamedTuple):
  """What does not depend on the numbers; the axes are the mesh's."""

  temperature: float
  most_logits: int
  mesh: jax.sharding.Mesh | None = None
  rows: tuple[str, ...] = ()
  slots: tuple[str, ...] = ()
  vocabulary: tuple[str, ...] = ()

  def size(self, axes):
    return math.prod(self.mesh.shape[axis] for axis in axes)

  def over_mesh(self, function, *kinds):
    """The function on every device; kinds of its arguments | its results."""
    if self.mesh is None:
      return function
    specs = {'tokens': PartitionSpec(self.rows, self.slots),
             'table': PartitionSpec(None, self.vocabulary),
             'logits': PartitionSpec(self.rows, self.slots, self.vocabulary)}
    inputs, outputs = ([specs[kind] for kind in side.split()]
                       for side in kinds)
    return jax.shard_map(function, mesh=self.mesh, in_specs=tuple(inputs),
                         out_specs=tuple(outputs), check_vma=False)


def _how(vocab_size, temperature, place, most_logits):
  if place is None or place.mesh.size == 1:
    return _How(temperature, most_logits)
  names = lambda axes: (axes if isinstance(axes, tuple) else
                        (axes,) if axes else ())
  rows, slots = map(names, (*place.spec, None, None)[:2])
  left = tuple(axis for axis in place.mesh.axis_names
               if axis not in rows + slots)
  how = _How(temperature, most_logits, place.mesh, rows, slots, left)
  return (how if vocab_size % how.size(left) == 0 else
          how._replace(vocabulary=()))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chosen(how, hidden, table, tokens):
  return _chosen_forward(how, hidden, table, tokens)[0]


def _chosen_forward(how, hidden, table, tokens):
  own = table.astype(hidden.dtype)
  forward = how.over_mesh(
      functools.partial(_forward, how), 'tokens table tokens',
      'tokens tokens tokens logits')
  logprobs, entropies, totals, logits = forward(hidden, own, tokens)
  return (logprobs, entropies), (hidden, table, tokens, totals, logits)


def _chosen_backward(how, kept, cotangents):
  hidden, table, tokens, totals, logits = kept
  backward = how.over_mesh(
      functools.partial(_backward, how),
      'tokens table tokens tokens logits tokens', 'tokens table')
  d_hidden, d_table = backward(hidden, table.astype(hidden.dtype), tokens,
                               totals, logits, cotangents[0])
  return d_hidden, d_table.astype(table.dtype), None


_chosen.defvjp(_chosen_forward, _chosen_backward)


def _forward(how, hidden, table, tokens):
  """(log-probs, entropies, log Σ exp, logits or None) of a device's tokens."""

  def of(part):
    logits = _logits(how, part[0], table)
    peak = jax.lax.pmax(jnp.max(logits, axis=-1), how.vocabulary)
    shifted = logits - peak[:, None]
    weights = jnp.exp(shifted)
    chosen = jnp.where(_is_token(how, part[1], logits), shifted, 0.0)
    # A sum for each: to look a logit up would gather those of other devices.
    mass, moment, found = jax.lax.psum(tuple(
        jnp.sum(x, axis=-1) for x in (weights, weights * shifted, chosen)),
        how.vocabulary)
    total = jnp.log(mass)
    return found - total, total - moment / mass, peak + total, logits

  parts = _cut(how, table, hidden, tokens)
  if len(parts[0]) > 1:
    found, logits = jax.lax.map(lambda part: of(part)[:3], parts), None
  else:
    *found, logits = of([x[0] for x in parts])
    logits = logits.reshape(*tokens.shape, -1)
  return *(_uncut(x, tokens.shape) for x in found), logits


def _backward(how, hidden, table, tokens, totals, logits, cotangents):
  """Gradients of Σ cotangent · log-prob: d logits = (1[token] − π) · cot / τ.
  """

  def of(part, logits=None):
    hidden, tokens, totals, cotangents = part
    if logits is None:
      logits = _logits(how, hidden, table)
    pull = _is_token(how, tokens, logits) - jnp.exp(logits - totals[:, None])
    pull = pull * (cotangents / how.temperature)[:, None]
    pull = pull.astype(hidden.dtype)
    return (_product('nv,dv->nd', pull, table),
            _product('nd,nv->dv', hidden, pull))

  def add(total, part):
    d_hidden, d_table = of(part)
    return total + d_table, d_hidden

  parts = _cut(how, table, hidden, tokens, totals, cotangents)
  if logits is None:
    nothing = jnp.zeros(table.shape, jnp.float32)
    d_table, d_hidden = jax.lax.scan(add, nothing, parts)
  else:
    d_hidden, d_table = of([x[0] for x in parts],
                           logits.reshape(-1, logits.shape[-1]))
  d_hidden = jax.lax.psum(_uncut(d_hidden, hidden.shape), how.vocabulary)
  return (d_hidden.astype(hidden.dtype),
          jax.lax.psum(d_table, how.rows + how.slots))


def _product(axes, x, y):
  return jnp.einsum(axes, x, y, preferred_element_type=jnp.float32)


def _logits(how, hidden, table):
  return _product('nd,dv->nv', hidden, table) / how.temperature


def _is_token(how, tokens, logits):
  """[N, V]: which of a device's logits is the token's."""
  ids = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
  if how.vocabulary:
    ids += jax.lax.axis_index(how.vocabulary) * logits.shape[1]
  return ids == tokens[:, None]


def _cut(how, table, *arrays):
  """[B, T, …] -> [parts, N, …]; what fills the last part up is 0."""
  tokens = math.prod(arrays[0].shape[:2])
  most = max(1, how.most_logits // table.shape[1])
  parts = -(-tokens // most)
  size = -(-tokens // parts)

  def cut(x):
    flat = x.reshape(tokens, *x.shape[2:])
    widths = [(0, parts * size - tokens), *[(0, 0)] * (flat.ndim - 1)]
    return jnp.pad(flat, widths).reshape(parts, size, *flat.shape[1:])

  return [cut(x) for x in arrays]


def _uncut(x, shape):
  """What `_cut` did, undone; of one part, [N, …]."""
  tail = shape[2:]
  return x.reshape(-1, *tail)[:math.prod(shape[:2])].reshape(shape)
