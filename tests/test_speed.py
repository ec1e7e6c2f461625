# SPDX-License-Identifier: Apache-2.0
"""What the speed bench counts is what the update computes."""

import math

import jax
import numpy as np
import pytest

from experiments.speed import linear, points, steps
from experiments.speed.peers import bare, update_ours
from lapo_jax import sharding
from lapo_jax.models import qwen2


def operations(jaxpr):
  """Of all matrix products in a program, loops counted as often as they run."""
  total = 0
  for equation in jaxpr.eqns:
    if equation.primitive.name == 'dot_general':
      left, right = (x.aval.shape for x in equation.invars)
      (contracted, _), _ = equation.params['dimension_numbers']
      inner = math.prod(left[i] for i in contracted)
      total += 2 * inner * math.prod(equation.outvars[0].aval.shape)
    inside = sum(operations(getattr(part, 'jaxpr', part))
                 for part in jax.tree.leaves(list(equation.params.values()))
                 if hasattr(getattr(part, 'jaxpr', part), 'eqns'))
    total += inside * equation.params.get('length', 1)
  return total


def test_the_update_does_the_products_that_are_counted():
  work = steps.make_work(whole=False)
  params = qwen2.init_shapes(qwen2.Model(**steps.FIELDS))
  state = jax.eval_shape(update_ours.make_state, params)
  update = update_ours.make_update(qwen2.Model(**steps.FIELDS), 64)
  program = jax.make_jaxpr(update)(state, update_ours.make_batch(work))
  counted = steps.products()
  assert operations(program.jaxpr) == sum(counted.values())
  # Of 160 slots two bands: three quarters of all pairs.
  assert counted == {'weights': 206158430208.0, 'attention': 30198988800.0}


@pytest.mark.parametrize('power', [0.5, 1.0, 2.0])
def test_an_exponent_is_that_of_a_power(power):
  lengths = np.array([1024, 2048, 4096, 8192])
  assert linear.exponent(lengths, 3e-4 * lengths**power) == pytest.approx(
      power, abs=1e-9)


def test_a_batch_survives_its_file(tmp_path):
  work = steps.make_work(whole=True)
  steps.save(work, tmp_path / 'work.npz')
  found = steps.load(tmp_path / 'work.npz')
  assert found.whole is True
  jax.tree.map(np.testing.assert_array_equal, found, work)


@pytest.mark.parametrize('axes', [
    {}, dict(data=2), dict(tensor=2), dict(data=2, tensor=2)], ids=str)
def test_devices_share_the_bare_products(axes):
  rows, depth = 8, 3
  layers = [((64, 128), (64, 64), (64, 384), (192, 64))] * 2
  unembedding = (64, 96)
  count = math.prod(axes.values())
  mesh = sharding.make_mesh(fsdp=1, devices=jax.devices()[:count], **axes)
  loop, _ = bare.make_loop(mesh, len(layers), depth)
  shape = lambda size: jax.ShapeDtypeStruct(size, np.float32)
  program = jax.make_jaxpr(loop)(
      [tuple(map(shape, layer)) for layer in layers], shape(unembedding),
      shape((rows, 64)))
  each = sum(math.prod(size) for layer in layers for size in layer)
  assert operations(program.jaxpr) * count == (
      2 * rows * depth * (each + math.prod(unembedding)))


@pytest.mark.parametrize('name', sorted(points.POINTS))
def test_a_point_survives_its_file(tmp_path, name):
  work = points.make_work(points.POINTS[name], num_slots=16, devices=2)
  points.save(work, tmp_path / 'work.npz')
  found = points.load(tmp_path / 'work.npz')
  jax.tree.map(np.testing.assert_array_equal, found, work)
  assert {found.data, found.tensor} == {1, 2}
