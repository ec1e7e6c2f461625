# SPDX-License-Identifier: Apache-2.0
"""How a batch's rows lie in the update: as sampled, by length, or packed.

The sums are the same. Rows as long as the longest completion are mostly
padding where lengths have a heavy tail: `experiments/speed` counts it.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
import numpy as np

from lapo_jax import grpo, ops, packing, sharding, types


class Layout(NamedTuple):
  """What `make` makes."""

  microbatch_size: int
  short_share: float
  packs: bool
  num_devices: int
  count: Callable
  split: Callable
  pack: Callable
  unpack: Callable

  def lengths(self, rollout: types.Rollout) -> np.ndarray:
    """int [B, 2] on every host: tokens of each prompt and completion."""
    return np.asarray(self.count(rollout))

  def score(self, score: Callable, batch: types.Batch,
            lengths: np.ndarray) -> jax.Array:
    """What `score` gives for the batch's rollout, float32 [B, T]."""
    if not self.packs:
      return score(batch.rollout)
    plan = self.plan(batch, lengths)
    packed = self.pack(batch, plan)
    return self.unpack(score(packed.rollout), batch.rollout, plan)

  def arrange(self, batch: types.Batch, lengths: np.ndarray
              ) -> types.Batch | tuple[types.Batch, types.Batch]:
    """The batch as the update takes it; `lengths` are its rows'."""
    if self.packs:
      return self.pack(batch, self.plan(batch, lengths))
    slots = batch.rollout.completion_mask.shape[1]
    size = self.microbatch_size
    # One microbatch at least stays long, or there would be none to scan over.
    num_short = min(int(self.short_share * len(lengths)) // size * size,
                    len(lengths) - size)
    if not num_short:
      return batch
    longest = int(np.sort(lengths[:, 1])[num_short - 1])
    short_slots = ops.bucket(longest, slots)
    if short_slots == slots:
      return batch
    return self.split(batch, num_short, short_slots)

  def plan(self, batch: types.Batch, lengths: np.ndarray) -> packing.Plan:
    """Where each completion of the batch lies when packed."""
    rollout = batch.rollout
    return packing.plan(
        lengths.sum(axis=1), microbatch_size=self.microbatch_size,
        most_slots=(rollout.prompt_mask.shape[1] +
                    rollout.completion_mask.shape[1]),
        num_devices=self.num_devices)


def make(*, microbatch_size: int, short_share: float, pack: bool,
         shardings: NamedSharding | None = None) -> Layout:
  """The layout that a config asks for.

  Args:
    microbatch_size: rows whose gradient is taken at once.
    short_share: of the completions, the shortest, that are cut to a length of
      their own; unless rows are packed.
    pack: whether a row holds several completions, see `packing`.
    shardings: of the batch; None on one device.
  """
  once, num_devices = None, 1
  if shardings is not None:
    once = sharding.replicated(shardings.mesh)
    num_devices = sharding.batch_devices(shardings.mesh)

  def count(rollout):
    return jnp.stack([jnp.sum(mask, axis=1, dtype=jnp.int32) for mask in (
        rollout.prompt_mask, rollout.completion_mask)], axis=1)

  return Layout(
      microbatch_size=microbatch_size, short_share=short_share, packs=pack,
      num_devices=num_devices, count=jax.jit(count, out_shardings=once),
      split=grpo.make_split_fn(shardings), pack=packing.make_pack_fn(shardings),
      unpack=packing.make_unpack_fn(shardings))
