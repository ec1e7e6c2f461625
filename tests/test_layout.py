# SPDX-License-Identifier: Apache-2.0
"""Which rows the update gets, and where the reference waits meanwhile."""

import jax
import numpy as np
import pytest
from test_grpo import LENGTHS, L, T, host, make_batch, make_rollout
from toys import config as toy_config

from lapo_jax import layout, sharding
from lapo_jax import programs as programs_lib
from lapo_jax.models import qwen2


@pytest.fixture
def batch():
  rollout = make_rollout()
  return make_batch(rollout).replace(old_logprobs=rollout.sampler_logprobs)


def laid(**settings):
  return layout.make(**{'microbatch_size': 4, 'short_share': 0.0,
                        'pack': False, **settings})


def test_lengths_are_those_of_prompts_and_completions(batch):
  found = laid().lengths(batch.rollout)
  np.testing.assert_array_equal(found[:, 1], LENGTHS)
  np.testing.assert_array_equal(found[:, 0], batch.rollout.prompt_mask.sum(-1))


def test_rows_are_split_only_where_that_spares_slots(batch):
  lengths = laid().lengths(batch.rollout)
  assert laid().arrange(batch, lengths) is batch
  # A bucket has 16 slots at least: all of these.
  assert laid(short_share=0.5).arrange(batch, lengths) is batch
  wide = make_batch(make_rollout(slots=32))
  short, long = laid(short_share=0.7).arrange(wide, lengths)
  # Of 11.2 rows two whole microbatches.
  assert short.weights.shape == (8, 16) and long.weights.shape == (8, 32)
  # Where all are short one microbatch stays long: none is no program's shape.
  short, long = laid(short_share=1.0).arrange(wide, lengths)
  assert short.weights.shape == (12, 16) and long.weights.shape == (4, 32)
  assert laid(short_share=1.0, microbatch_size=16).arrange(wide,
                                                           lengths) is wide


def test_packed_rows_are_scored_and_come_back(batch):
  packs = laid(pack=True, short_share=0.7)
  lengths = packs.lengths(batch.rollout)
  rows = packs.arrange(batch, lengths).rollout
  assert rows.segments.shape[1] == L + T
  assert rows.segments.shape[0] < len(LENGTHS)
  found = packs.score(lambda rollout: rollout.sampler_logprobs, batch, lengths)
  np.testing.assert_array_equal(found, batch.rollout.sampler_logprobs)


def test_the_reference_waits_with_the_host(tiny_model, tiny_params):
  config = toy_config.get_config()
  config.updates.offload_reference = True
  mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
  programs = programs_lib.make(config, tiny_model, mesh, eos_ids=(1,), pad_id=0,
                            reward_shapes=())
  places = sharding.partition(qwen2.PARTITION_RULES,
                              qwen2.init_shapes(tiny_model), mesh)
  params = jax.device_put(host(tiny_params), places)
  waiting = programs.put_away(params)
  back = programs.bring(waiting)
  for old, away, new, place in zip(*map(jax.tree.leaves, (
      params, waiting, back, places)), strict=True):
    assert away.sharding.memory_kind == 'pinned_host'
    assert away.sharding.spec == place.spec
    assert new.sharding == place
    np.testing.assert_array_equal(new, old)
