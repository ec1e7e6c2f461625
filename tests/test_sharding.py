# SPDX-License-Identifier: Apache-2.0
"""Where arrays lie: on eight devices, and back on the host."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import numpy as np
import optax
import pytest

from lapo_jax import sharding

RULES = ((r'.*kernel', PartitionSpec('fsdp', 'tensor')),
         (r'.*scale', PartitionSpec()))


@pytest.fixture(scope='module')
def mesh():
  return sharding.make_mesh(data=2, fsdp=2, tensor=2)


def shape(*sizes):
  return jax.ShapeDtypeStruct(sizes, jnp.float32)


@pytest.mark.parametrize('asked,sizes', [
    (dict(), (1, 8, 1, 1)),
    (dict(data=-1, fsdp=1), (8, 1, 1, 1)),
    (dict(data=2, fsdp=-1, tensor=2), (2, 2, 1, 2)),
    (dict(data=1, fsdp=2, tensor=4), (1, 2, 1, 4)),
    (dict(fsdp=8, tensor=-1), (1, 8, 1, 1)),
    (dict(fsdp=2, sequence=-1, tensor=2), (1, 2, 2, 2)),
])
def test_one_axis_takes_what_is_left(asked, sizes):
  mesh = sharding.make_mesh(**asked)
  assert tuple(mesh.shape[axis] for axis in sharding.AXES) == sizes
  assert sharding.batch_devices(mesh) == sizes[0] * sizes[1]
  assert sharding.sampling_devices(mesh) == math.prod(sizes[:3])
  # Explicit axes would ask every operation for its output's sharding.
  assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}


@pytest.mark.parametrize('asked', [
    dict(data=3), dict(data=2, fsdp=2, tensor=1), dict(data=-1, fsdp=-1),
    dict(data=16), dict(data=0), dict(data=-2, fsdp=-4),
], ids=str)
def test_axes_that_do_not_fit_are_told_with_their_numbers(asked):
  with pytest.raises(ValueError) as caught:
    sharding.make_mesh(**asked)
  message = str(caught.value)
  for axis, size in asked.items():
    assert f"'{axis}': {size}" in message
  assert 'does not fit 8 devices' in message


def test_a_mesh_can_take_some_devices():
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  assert mesh.size == 1 and sharding.batch_devices(mesh) == 1


@dataclasses.dataclass(frozen=True)
class Chip:
  """What a mesh asks of a TPU's device."""

  id: int
  slice_index: int
  coords: tuple[int, int, int]
  core_on_chip: int = 0
  process_index: int = 0
  platform: str = 'tpu'
  device_kind: str = 'TPU v5 lite'


# Two slices of 4 x 2 chips, the second one first.
SLICES = [Chip(8 * i + 4 * y + x, i, (x, y, 0))
          for i in (1, 0) for y in range(2) for x in range(4)]


@pytest.mark.parametrize('axes', [
    dict(data=2), dict(data=4, fsdp=2, tensor=2),
    dict(data=-1, fsdp=1, sequence=4, tensor=2)], ids=str)
def test_between_slices_there_is_data_alone(axes):
  mesh = sharding.make_mesh(**axes, devices=SLICES)
  copies = mesh.shape['data'] // 2
  for number, chips in enumerate(mesh.devices):
    assert {chip.slice_index for chip in chips.flat} == {number // copies}


def test_slices_without_a_copy_of_their_own_are_told():
  with pytest.raises(ValueError, match="'data': 1.* 1 copies .* 2 slices: "
                                       'expected .* multiple of 2'):
    sharding.make_mesh(devices=SLICES)
  # One slice needs none.
  assert sharding.make_mesh(devices=SLICES[:8]).shape['fsdp'] == 8


def test_a_container_has_what_it_may_have(mesh, monkeypatch, tmp_path):
  limit = tmp_path / 'memory.max'
  monkeypatch.setattr(sharding, '_CONTAINER', limit)
  whole = sharding.device_memory(mesh)
  limit.write_text('max\n')
  assert sharding.device_memory(mesh) == whole
  limit.write_text(f'{1 << 30}\n')
  assert sharding.device_memory(mesh) == (1 << 30) // mesh.size


def test_an_axis_that_does_not_divide_is_left_whole(mesh):
  placed = sharding.partition(RULES, {
      'a': {'kernel': shape(4, 6)}, 'b': {'kernel': shape(3, 6)},
      'c': {'kernel': shape(4, 5)}, 'd': {'kernel': shape(3, 5)},
      'e': {'scale': shape(4)}}, mesh)
  specs = {name: leaf.spec for name, inner in placed.items()
           for leaf in inner.values()}
  assert specs == {
      'a': PartitionSpec('fsdp', 'tensor'), 'b': PartitionSpec(None, 'tensor'),
      'c': PartitionSpec('fsdp', None), 'd': PartitionSpec(None, None),
      'e': PartitionSpec()}


def test_the_first_rule_that_matches_the_whole_path_counts(mesh):
  rules = ((r'a/kernel', PartitionSpec('tensor')), *RULES)
  placed = sharding.partition(rules, {
      'a': {'kernel': shape(4, 4)}, 'aa': {'kernel': shape(4, 4)}}, mesh)
  assert placed['a']['kernel'].spec == PartitionSpec('tensor')
  assert placed['aa']['kernel'].spec == PartitionSpec('fsdp', 'tensor')


def test_a_parameter_without_a_rule_is_named(mesh):
  with pytest.raises(ValueError, match='covers the parameter a/gate: add one'):
    sharding.partition(RULES, {'a': {'gate': shape(4, 4)}}, mesh)


def test_moments_lie_as_their_parameters(mesh):
  shapes = {'a': {'kernel': shape(4, 6), 'scale': shape(4)}}
  placed = sharding.partition(RULES, shapes, mesh)
  optimizer = optax.chain(optax.clip_by_global_norm(1.0),
                          optax.adamw(lambda count: 0.1 * count))
  opt_shapes = jax.eval_shape(optimizer.init, shapes)
  opt_places = sharding.partition_like(placed, opt_shapes, mesh)
  assert jax.tree.structure(opt_places) == jax.tree.structure(opt_shapes)
  adam = opt_places[1][0]
  for moment in (adam.mu, adam.nu):
    assert moment['a']['kernel'].spec == PartitionSpec('fsdp', 'tensor')
    assert moment['a']['scale'].spec == PartitionSpec()
  assert adam.count.spec == PartitionSpec()
  # And they can be made where they lie.
  state = jax.jit(optimizer.init, out_shardings=opt_places)(
      sharding.to_global(jax.tree.map(lambda s: np.ones(s.shape, s.dtype),
                                      shapes), placed))
  assert state[1][0].mu['a']['kernel'].sharding.spec == PartitionSpec(
      'fsdp', 'tensor')


def test_sampling_drops_fsdp_alone(mesh):
  placed = sharding.partition(RULES, {
      'a': {'kernel': shape(4, 6), 'scale': shape(4)}}, mesh)
  placed = sharding.for_sampling(placed)
  assert placed['a']['kernel'].spec == PartitionSpec(None, 'tensor')
  assert placed['a']['scale'].spec == PartitionSpec()
  assert placed['a']['kernel'].mesh is mesh


def test_what_fsdp_cuts_is_cut_over_a_row_s_devices_too():
  mesh = sharding.make_mesh(fsdp=2, sequence=2, tensor=2)
  placed = sharding.partition(RULES, {
      name: {'kernel': shape(size, 6)} for name, size in
      (('both', 8), ('fsdp', 6), ('none', 5))}, mesh)
  specs = {name: leaf['kernel'].spec for name, leaf in placed.items()}
  assert specs == {'both': PartitionSpec(('fsdp', 'sequence'), 'tensor'),
                   'fsdp': PartitionSpec('fsdp', 'tensor'),
                   'none': PartitionSpec(None, 'tensor')}
  for leaf in jax.tree.leaves(sharding.for_sampling(placed)):
    assert leaf.spec == PartitionSpec(None, 'tensor')


def test_a_row_s_devices_share_its_slots_and_sample_rows_of_their_own(mesh):
  cut = sharding.make_mesh(data=2, fsdp=1, sequence=2, tensor=2)
  part = lambda place: place.shard_shape((8, 6))
  assert part(sharding.batch(cut)) == (4, 6)
  assert part(sharding.slots(cut)) == (4, 3)
  assert part(sharding.sampling_batch(cut)) == (2, 6)
  # Without such devices all three are one.
  assert {part(sharding.batch(mesh)), part(sharding.slots(mesh)),
          part(sharding.sampling_batch(mesh))} == {(2, 6)}


@pytest.mark.parametrize('axes', [
    dict(data=8), dict(fsdp=8), dict(data=2, fsdp=2, tensor=2),
    dict(fsdp=1, tensor=8)], ids=str)
def test_rows_go_to_the_devices_and_come_back_once(axes):
  mesh = sharding.make_mesh(**axes)
  array = np.arange(48, dtype=np.int32).reshape(16, 3)
  there = sharding.to_global(array, sharding.batch(mesh))
  assert there.addressable_shards[0].data.shape[0] == 16 // (
      sharding.batch_devices(mesh))
  numbers, rows = sharding.local_rows(there)
  np.testing.assert_array_equal(numbers, np.arange(16))
  np.testing.assert_array_equal(rows, array)
  # One number of each row, known to this host alone.
  whole = sharding.from_hosts(numbers, rows[:, 1].astype(np.float32), 16)
  np.testing.assert_array_equal(whole, array[:, 1])
  assert whole.dtype == np.float32


def test_rows_come_with_their_numbers_whatever_their_order(mesh):
  values = np.array([[3.0, 1.0], [4.0, 1.0], [5.0, 9.0]])
  whole = sharding.from_hosts(np.array([2, 0, 1]), values, 3)
  np.testing.assert_array_equal(whole, [[4.0, 1.0], [5.0, 9.0], [3.0, 1.0]])


def test_trees_go_by_one_sharding_or_by_a_tree_of_them(mesh):
  tree = {'a': np.zeros((8, 2)), 'b': np.float32(3.0)}
  once = sharding.to_global(tree, sharding.replicated(mesh))
  assert {x.sharding.spec for x in jax.tree.leaves(once)} == {PartitionSpec()}
  mixed = sharding.to_global(tree, {'a': sharding.batch(mesh),
                                    'b': sharding.replicated(mesh)})
  assert mixed['a'].addressable_shards[0].data.shape == (2, 2)
  assert float(mixed['b']) == 3.0
