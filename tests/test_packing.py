# SPDX-License-Identifier: Apache-2.0
"""Packed rows give the sums of rows as sampled; the plan wastes little."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_grpo import (
  ADVANTAGES,
  CAPTURE,
  LENGTHS,
  B,
  L,
  T,
  assert_near,
  distance,
  host,
  make_batch,
  make_rollout,
  make_state,
  put,
  shardings_of,
)

from lapo_jax import grpo, losses, packing, sharding


def lengths_of(rollout):
  """Tokens of each prompt and completion together."""
  return (np.asarray(rollout.prompt_mask).sum(-1) +
          np.asarray(rollout.completion_mask).sum(-1))


@pytest.fixture(scope='module')
def model(tiny_model):
  return tiny_model.clone(num_layers=1)


@pytest.fixture(scope='module')
def params(model, make_params):
  return jax.tree.map(jnp.asarray, make_params(model))


@pytest.fixture(scope='module')
def batch(model, params):
  """The batch with old and reference log-probs, 8 updates behind."""
  rng = np.random.default_rng(3)
  near = jnp.asarray(rng.normal(-4.2, 0.3, (B, T)), jnp.float32)
  return make_batch(aggregate='sequence').replace(
      old_logprobs=near, ref_logprobs=near - 0.1)


@pytest.fixture(scope='module')
def plan():
  return packing.plan(lengths_of(make_rollout()), most_slots=L + T,
                      microbatch_size=1)


@pytest.fixture(scope='module')
def whole(model, params, batch):
  """State and metrics of the batch as sampled."""
  update = grpo.make_update_fn(model, CAPTURE, temperature=1.0, kl_coef=0.1,
                               microbatch_size=B)
  state, metrics = update(make_state(params), batch)
  return host(state.opt_state), host(metrics)


# ---- The plan.


def test_rows_in_order_of_length_by_hand():
  found = packing.plan(np.array([3, 9, 16, 7, 5, 6]), most_slots=16,
                       microbatch_size=3)
  # 16 | 9 7 | 6 5 3: three rows are one microbatch, of which there are two
  # at least; rows 0, 2 and 4 are its.
  assert found.num_slots == 16 and found.num_rows == 6
  np.testing.assert_array_equal(found.rows, [4, 2, 0, 2, 4, 4])
  np.testing.assert_array_equal(found.starts, [11, 0, 0, 9, 6, 0])
  np.testing.assert_array_equal(found.numbers, [3, 1, 1, 2, 2, 1])
  with pytest.raises(ValueError, match='17 does not fit the cap of 16'):
    packing.plan(np.array([17]), most_slots=16, microbatch_size=1)


@pytest.mark.parametrize('devices', [1, 4])
def test_no_two_tokens_share_a_slot(devices):
  rng = np.random.default_rng(0)
  lengths = np.minimum(rng.lognormal(5.0, 0.9, 256).astype(int) + 20, 2000)
  found = packing.plan(lengths, most_slots=2048, microbatch_size=8,
                       num_devices=devices)
  per_device = len(lengths) // devices
  taken = np.zeros((devices, found.num_rows, found.num_slots), int)
  for b, length in enumerate(lengths):
    start = found.starts[b]
    assert start + length <= found.num_slots
    taken[b // per_device, found.rows[b], start:start + length] += 1
  assert taken.max() == 1 and taken.sum() == lengths.sum()
  # As the update cuts them, empty microbatches come last.
  size = 8 // devices
  by_microbatch = taken.reshape(devices, size, -1, found.num_slots)
  filled = by_microbatch.sum((0, 1, 3)) > 0
  assert np.all(filled[:-1] >= filled[1:])
  slots = filled.sum() * 8 * found.num_slots
  padded = len(lengths) * found.num_slots
  assert slots < 0.2 * padded and slots < 1.4 * lengths.sum()


# ---- The update.


def test_packed_is_unpacked(model, params, batch, plan, whole):
  packed = packing.make_pack_fn()(batch, plan)
  assert packed.rollout.segments.shape == (12, 13)
  assert np.count_nonzero(np.asarray(packed.rollout.segments).any(1)) == 11
  np.testing.assert_allclose(packed.weights.sum(), batch.weights.sum(),
                             rtol=1e-6)
  # Row 11 is empty: a microbatch that is skipped.
  update = grpo.make_update_fn(model, CAPTURE, temperature=1.0, kl_coef=0.1,
                               microbatch_size=1)
  state, metrics = update(make_state(params), packed)
  assert distance(state.opt_state, whole[0]) < 2e-6
  assert_near(metrics, whole[1])


def test_packed_scores_are_those_of_the_rows(model, params, batch, plan):
  score = grpo.make_score_fn(model, temperature=1.0, microbatch_size=1)
  packed = packing.make_pack_fn()(batch, plan)
  found = packing.make_unpack_fn()(score(params, packed.rollout),
                                   batch.rollout, plan)
  want = score(params, batch.rollout)
  np.testing.assert_allclose(found, want, atol=2e-6)
  # There and back, bit for bit.
  again = packing.make_unpack_fn()(packed.old_logprobs, batch.rollout, plan)
  np.testing.assert_array_equal(again, np.where(
      batch.rollout.completion_mask, batch.old_logprobs, 0))


def test_eight_devices_pack_their_own_rows(model, params, batch, whole):
  mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
  places = shardings_of(model, mesh)
  update = grpo.make_update_fn(model, CAPTURE, temperature=1.0, kl_coef=0.1,
                               microbatch_size=4, shardings=places)
  plan = packing.plan(lengths_of(batch.rollout), most_slots=L + T,
                      microbatch_size=4, num_devices=4)
  pack = packing.make_pack_fn(places[1])
  batch = sharding.to_global(host(batch), places[1])
  packed = pack(batch, plan)
  hlo = pack.lower(batch, plan).compile().as_text()
  for word in ('all-gather', 'all-to-all', 'all-reduce', 'permute('):
    assert word not in hlo
  state, metrics = update(put(make_state(params), places[0]), packed)
  assert distance(state.opt_state, whole[0]) < 2e-6
  assert_near(metrics, whole[1])


def test_losses_of_whole_completions_know_them_by_their_segments(batch, plan):
  packed = packing.make_pack_fn()(batch, plan)
  unpack = packing.make_unpack_fn()
  rng = np.random.default_rng(5)
  logprobs = jnp.asarray(rng.normal(-4.2, 0.3, (B, T)), jnp.float32)
  loss = lambda batch, logprobs, segments: losses.surrogate(
      logprobs, batch.old_logprobs, batch.advantages,
      batch.rollout.action_mask, segments, kind='gspo', clip_low=0.05,
      clip_high=0.05)
  # In the place of the reference, so that they are packed too.
  moved = packing.make_pack_fn()(batch.replace(ref_logprobs=logprobs),
                                 plan).ref_logprobs
  found = unpack(loss(packed, moved, packed.rollout.segments[:, 1:]),
                 batch.rollout, plan)
  np.testing.assert_allclose(found, loss(batch, logprobs, None), rtol=1e-5,
                             atol=1e-6)
  assert ADVANTAGES.size == len(LENGTHS) == B
