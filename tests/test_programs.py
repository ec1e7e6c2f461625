# SPDX-License-Identifier: Apache-2.0
"""How many slots are decoded at once, where nobody says."""

import logging

import jax
import ml_collections
import pytest

from lapo_jax import paging, programs, sharding

GIB = 1 << 30


@pytest.fixture
def slots(tiny_model, caplog):
  """Slots by the axes of a mesh; what was logged is in caplog."""

  def slots(heads=2, **axes):
    settings = ml_collections.ConfigDict({
        'num_slots': 0, 'cache_share': 0.5, 'cache_dtype': '',
        'max_prompt_length': 100})
    count = 1
    for size in axes.values():
      count *= size
    mesh = sharding.make_mesh(**{'fsdp': 1, **axes},
                              devices=jax.devices()[:count])
    with caplog.at_level(logging.INFO, logger='absl'):
      return programs.num_slots(
          settings, tiny_model.clone(num_kv_heads=heads), mesh, cap=300,
          asked=64, memory=GIB)

  return slots


def test_slots_are_what_a_share_of_the_memory_holds_at_full_length(
    slots, caplog):
  # 2 pages of the prompt, 5 of the completion; 2 layers, 2 heads of width 8.
  one = 7 * 64 * 2 * 2 * 2 * 8 * 4
  assert one == 7 * 64 * paging.token_bytes(2, 2, 8, 'float32')
  assert slots() == GIB // 2 // one
  assert '64 of 64 completions are decoded at once' in caplog.text
  assert slots(data=2, fsdp=2) == 4 * slots()


def test_a_tensor_axis_makes_room_where_it_cuts_the_heads(slots, caplog):
  assert slots(tensor=2) == 2 * slots()
  assert 'divide' not in caplog.text
  # One head: each device of the axis holds it.
  assert slots(heads=1, tensor=2) == slots(heads=1)
  assert slots(heads=1, data=2, tensor=4) == 2 * slots(heads=1)
  assert 'mesh.tensor 4 does not divide the 1 key heads' in caplog.text


def test_what_is_asked_for_is_taken(tiny_model):
  settings = ml_collections.ConfigDict({'num_slots': 7})
  mesh = sharding.make_mesh()
  assert programs.num_slots(settings, tiny_model, mesh, cap=1, asked=1) == 7
