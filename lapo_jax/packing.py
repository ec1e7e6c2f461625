# SPDX-License-Identifier: Apache-2.0
"""Several prompts and completions in one row of the update.

Sampled rows are as long as the longest: [ pad … prompt | completion … pad ].
Packed rows hold prompt after prompt, each with its completion, which attention
keeps apart by their segments. Sums over tokens are those of the rows as
sampled; what is spared is padding.

The host plans from the lengths alone, the longest first, each into the first
row that has room (first-fit decreasing). A row holds completions of one
device's rows only, so that packing moves nothing between devices.

A packed `types.Batch` has one prompt slot and S − 1 completion slots, of which
`completion_mask` says what is completion; advantages are one a token.
"""

from collections.abc import Callable
import functools

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jaxtyping import Int
import numpy as np

from lapo_jax import ops, types


@flax.struct.dataclass
class Plan:
  """Where each of B completions, its prompt before it, shall lie.

  Attributes:
    rows: int32 [B], its row, counted within its device's.
    starts: int32 [B], the slot of its prompt's first token.
    numbers: int32 [B], its segment in the row, from 1.
    num_rows: of each device.
    num_slots: of each row.
  """

  rows: types.Leaf
  starts: types.Leaf
  numbers: types.Leaf
  num_rows: int = flax.struct.field(pytree_node=False)
  num_slots: int = flax.struct.field(pytree_node=False)


def plan(lengths: Int[np.ndarray, 'B'], *, most_slots: int,
         microbatch_size: int, num_devices: int = 1) -> Plan:
  """First-fit decreasing, for each device's part of the completions.

  Rows have the least bucket of slots that holds the longest. Their number is
  that of the device with the most, in whole microbatches whose number is a
  bucket too: few shapes are compiled, and the update skips empty microbatches,
  which come last.

  Args:
    lengths: tokens of each prompt and completion together.
    most_slots: that a row may have.
    microbatch_size: rows whose gradient is taken at once, on all devices.
    num_devices: over which the batch is cut.

  Raises:
    ValueError: a length above the most slots.
  """
  num_slots = ops.bucket(int(lengths.max()), most_slots)
  parts = [_first_fit(part, num_slots)
           for part in np.split(lengths, num_devices)]
  size = microbatch_size // num_devices
  filled = max(int(rows.max()) + 1 for rows, _, _ in parts)
  microbatches = ops.bucket(-(-filled // size), len(lengths), least=2)
  rows, starts, numbers = (np.concatenate(x).astype(np.int32)
                           for x in zip(*parts, strict=True))
  # Microbatch j takes rows j, j + m, … of m · size: the first rows go to
  # microbatch 0.
  rows = rows % size * microbatches + rows // size
  return Plan(rows, starts, numbers, microbatches * size, num_slots)


def make_pack_fn(shardings: NamedSharding | None = None) -> Callable:
  """A jitted `(batch, plan) -> Batch` of packed rows.

  Args:
    shardings: of the batch; None on one device.
  """

  def pack(batch, plan):
    return _over_devices(_pack, shardings, plan)(batch, *_arrays(plan))

  return _jit(pack, shardings)


def make_unpack_fn(shardings: NamedSharding | None = None) -> Callable:
  """A jitted `(values, rollout, plan) -> float32 [B, T]` of packed values.

  The rollout is the one that was packed. Args as of `make_pack_fn`.
  """

  def unpack(values, rollout, plan):
    return _over_devices(_unpack, shardings, plan)(values, rollout,
                                                   *_arrays(plan))

  return _jit(unpack, shardings)


def _first_fit(lengths, num_slots):
  """(rows, starts, numbers) of sequences in rows of so many slots."""
  rows, starts, numbers = (np.zeros(len(lengths), np.int64) for _ in range(3))
  used, count = (np.zeros(len(lengths), np.int64) for _ in range(2))
  for i in np.argsort(-lengths, kind='stable'):
    row = int(np.argmax(used + lengths[i] <= num_slots))
    count[row] += 1
    rows[i], starts[i], numbers[i] = row, used[row], count[row]
    used[row] += lengths[i]
  return rows, starts, numbers


def _arrays(plan):
  return plan.rows, plan.starts, plan.numbers


def _over_devices(function, shardings, plan):
  """The function for each device's rows alone."""
  function = functools.partial(function, plan.num_rows, plan.num_slots)
  if shardings is None:
    return function
  return jax.shard_map(function, mesh=shardings.mesh, in_specs=shardings.spec,
                       out_specs=shardings.spec, check_vma=False)


def _jit(function, shardings):
  if shardings is None:
    return jax.jit(function)
  return jax.jit(function, out_shardings=shardings)


def _places(rollout, num_rows, num_slots, rows, starts):
  """[B, S]: the slot of each token among all rows' slots; padding's is past
  the last."""
  mask = jnp.concatenate([rollout.prompt_mask, rollout.completion_mask], axis=1)
  places = (rows * num_slots + starts)[:, None] + jnp.cumsum(
      mask, axis=1, dtype=jnp.int32) - 1
  return jnp.where(mask, places, num_rows * num_slots)


def _pack(num_rows, num_slots, batch, rows, starts, numbers):
  rollout = batch.rollout
  places = _places(rollout, num_rows, num_slots, rows, starts)
  num_prompt_slots = rollout.prompt_mask.shape[1]

  def lay(x):
    """[B, S] -> [rows, slots]."""
    empty = jnp.zeros(num_rows * num_slots, x.dtype)
    return empty.at[places].set(x, mode='drop').reshape(num_rows, num_slots)

  def lay_completions(x):
    if x is None:
      return None
    return lay(jnp.pad(x, ((0, 0), (num_prompt_slots, 0))))[:, 1:]

  spread = lambda x: jnp.broadcast_to(x[:, None], places.shape)
  tokens = lay(jnp.concatenate(
      [rollout.prompt_tokens, rollout.completion_tokens], axis=1))
  segments = lay(spread(numbers))
  return batch.replace(
      rollout=types.Rollout(
          prompt_tokens=tokens[:, :1], prompt_mask=segments[:, :1] > 0,
          completion_tokens=tokens[:, 1:],
          completion_mask=lay_completions(rollout.completion_mask),
          action_mask=lay_completions(rollout.action_mask),
          sampler_logprobs=lay_completions(rollout.sampler_logprobs),
          segments=segments),
      advantages=(lay_completions(batch.advantages)
                  if batch.advantages.ndim == 2 else
                  lay(spread(batch.advantages))[:, 1:]),
      old_logprobs=lay_completions(batch.old_logprobs),
      ref_logprobs=lay_completions(batch.ref_logprobs),
      weights=lay_completions(batch.weights))


def _unpack(num_rows, num_slots, values, rollout, rows, starts, numbers):
  del numbers
  places = _places(rollout, num_rows, num_slots, rows, starts)
  # A packed row's first slot is a prompt's, and has no value.
  flat = jnp.pad(values, ((0, 0), (1, 0))).ravel()
  own = places[:, rollout.prompt_mask.shape[1]:]
  return jnp.where(rollout.completion_mask, flat.at[own].get(mode='clip'), 0.0)
