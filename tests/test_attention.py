# SPDX-License-Identifier: Apache-2.0
"""Attention is its formula; every backend's kernel means the same.

Kernels run on the CPU in Pallas's interpreter, and are compiled for machines
that are not here. Tolerances are shares of the largest number in an array, or
of 1: 1e-5 in float32, 2e-2 in bfloat16, whose rounding is 4e-3.
"""

import functools
import importlib.util
import math
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lapo_jax import attention, sharding

_TOLERANCE = {'float32': 1e-5, 'bfloat16': 2e-2}

causal = jax.jit(attention.causal, static_argnames='backend')


@pytest.fixture
def interpreted(monkeypatch):
  """Pallas kernels run on the CPU.

  JAX keeps traces by shape: what is compiled here without this fixture needs
  shapes of its own.
  """
  from jax.experimental import pallas
  compiled = pallas.pallas_call
  monkeypatch.setattr(pallas, 'pallas_call', lambda *args, **settings: compiled(
      *args, **{**settings, 'interpret': True}))


def normal(rng, *shape, dtype='float32'):
  return jnp.asarray(rng.normal(size=shape), dtype)


def lay(kind, slots):
  """Two rows of segments."""
  ids = np.zeros((2, slots), np.int32)
  third = slots // 3
  if kind == 'whole':
    ids[:] = 1
  elif kind == 'left':
    ids[0, third:], ids[1, 5:] = 1, 1
  elif kind == 'right':
    ids[0, :third], ids[1, :-2] = 1, 1
  elif kind == 'both':
    ids[0, third:-third], ids[1, 4:-3] = 1, 1
  elif kind == 'several':
    ids[0, 2:third], ids[0, third:-4] = 1, 2
    ids[1] = 3 - np.arange(slots) // (third + 1)
  return jnp.asarray(ids)


def close(got, expected, dtype):
  got, expected = (np.asarray(x, np.float64) for x in (got, expected))
  tolerance = _TOLERANCE[dtype] * max(1.0, np.abs(expected).max())
  np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance)


def rows(heads, kv_heads, width, kind, slots, dtype):
  """Queries, keys, values, segments, and a weight of each real output."""
  rng = np.random.default_rng(slots)
  segments = lay(kind, slots)
  weights = normal(rng, 2, slots, heads, width) * (segments > 0)[..., None,
                                                                 None]
  return (normal(rng, 2, slots, heads, width, dtype=dtype),
          normal(rng, 2, slots, kv_heads, width, dtype=dtype),
          normal(rng, 2, slots, kv_heads, width, dtype=dtype),
          segments, weights)


@functools.partial(jax.jit, static_argnames=('backend', 'place'))
def outputs_and_gradients(queries, keys, values, segments, weights, backend,
                          place=None):
  """Outputs, and what the weighted sum of them says of q, k and v."""
  whole = attention.Whole(segments, place, backend)
  mix = lambda *qkv: whole.attend(*qkv)[0].astype(jnp.float32)
  mixed, back = jax.vjp(mix, queries, keys, values)
  return mixed, *back(weights)


def by_the_formula(queries, keys, values, segments, weights):
  """The same in numpy and float64, one row and head at a time."""
  arrays = [np.asarray(x, np.float64) for x in (queries, keys, values, weights)]
  queries, keys, values, weights = arrays
  segments = np.asarray(segments)
  outputs, *gradients = map(np.zeros_like, (queries, queries, keys, values))
  shared, scale = queries.shape[2] // keys.shape[2], queries.shape[3]**-0.5
  for b in range(queries.shape[0]):
    own = segments[b]
    mask = np.tril(own[:, None] == own[None, :]) & (own > 0)[:, None]
    for h in range(queries.shape[2]):
      q, k = queries[b, :, h], keys[b, :, h // shared]
      v, w = values[b, :, h // shared], weights[b, :, h]
      shares = np.where(mask, np.exp(q @ k.T * scale), 0.0)
      shares /= np.maximum(shares.sum(-1, keepdims=True), 1e-300)
      outputs[b, :, h] = shares @ v
      wanted = w @ v.T
      wanted = shares * (wanted - (wanted * shares).sum(-1, keepdims=True))
      gradients[0][b, :, h] = wanted @ k * scale
      gradients[1][b, :, h // shared] += wanted.T @ q * scale
      gradients[2][b, :, h // shared] += shares.T @ w
  return outputs, *gradients


def is_the_formula(inputs, backend, dtype, place=None):
  found = outputs_and_gradients(*inputs, backend, place)
  real = (np.asarray(inputs[3]) > 0)[..., None, None]
  for i, (got, expected) in enumerate(zip(found, by_the_formula(*inputs),
                                          strict=True)):
    got = np.asarray(got, np.float64)
    close(got if i else np.where(real, got, 0), expected, dtype)


@pytest.mark.parametrize('shape', [
    (4, 4, 16, 'left', 38), (7, 1, 32, 'both', 60), (6, 2, 16, 'several', 48),
    (2, 1, 16, 'whole', 1)], ids=str)
def test_causal_is_the_formula_in_value_and_gradient(shape):
  is_the_formula(rows(*shape, 'float32'), 'xla', 'float32')


def test_in_blocks_of_queries_too(monkeypatch):
  # Four blocks, the last filled up.
  monkeypatch.setattr(attention, '_SCORES', 75 * 20)
  is_the_formula(rows(2, 1, 8, 'several', 75, 'float32'), 'xla', 'float32')


# Of one shape, so that a backend is compiled once.
@pytest.mark.parametrize('kind', ['whole', 'left', 'right', 'both', 'several'])
@pytest.mark.parametrize('backend', ['xla', 'tpu', 'gpu'])
def test_every_backend_is_the_formula(interpreted, backend, kind):
  is_the_formula(rows(4, 2, 16, kind, 37, 'bfloat16'), backend, 'bfloat16')


def test_the_gpu_kernel_takes_several_blocks(interpreted):
  is_the_formula(rows(3, 1, 64, 'both', 130, 'bfloat16'), 'gpu', 'bfloat16')


@pytest.mark.parametrize('backend', ['xla', 'tpu', 'gpu'])
def test_padding_changes_nothing(interpreted, backend):
  queries, keys, values, segments, weights = rows(4, 2, 16, 'both', 37,
                                                  'bfloat16')
  clean = outputs_and_gradients(queries, keys, values, segments, weights,
                                backend, None)
  padding = (segments == 0)[..., None, None]
  dirty = [jnp.where(padding, 40.0, x).astype(x.dtype)
           for x in (queries, keys, values)]
  again = outputs_and_gradients(*dirty, segments, weights, backend, None)
  for i, (one, other) in enumerate(zip(clean, again, strict=True)):
    one, other = (np.asarray(x, np.float32) for x in (one, other))
    assert np.isfinite(other).all()
    np.testing.assert_array_equal(np.where(padding, 0, one),
                                  np.where(padding, 0, other))
    # No gradient comes from padding or goes to it.
    assert i == 0 or not np.where(padding, other, 0).any()


def test_a_segment_is_as_alone():
  queries, keys, values, segments, _ = rows(4, 2, 16, 'several', 60, 'float32')
  mixed = causal(queries, keys, values, segments)
  alone = slice(20, 56)
  assert set(np.asarray(segments[0, alone]).tolist()) == {2}
  cut = [x[:1, alone] for x in (queries, keys, values)]
  close(mixed[:1, alone],
        causal(*cut, jnp.ones((1, 36), jnp.int32)), 'float32')


def temporary_bytes(slots, place=None):
  """Of the gradient of one row."""
  array = jax.ShapeDtypeStruct((1, slots, 2, 8), jnp.float32)
  segments = jax.ShapeDtypeStruct((1, slots), jnp.int32)
  return outputs_and_gradients.lower(
      array, array, array, segments, array, 'xla',
      place).compile().memory_analysis().temp_size_in_bytes


def test_long_rows_never_hold_all_scores():
  assert temporary_bytes(4096) < 2 * 4096 * 4096 * 4 / 2


def spread(**axes):
  """How rows lie on a mesh of as many devices."""
  devices = jax.devices()[:math.prod(axes.values())]
  return sharding.slots(sharding.make_mesh(**{'fsdp': 1, **axes},
                                           devices=devices))


# Heads: one key head each; two devices to a key head; two devices have all
# three; no tensor axis.
@pytest.mark.parametrize('heads, kv_heads, kind, slots, axes', [
    (4, 2, 'several', 38, dict(data=2, sequence=2, tensor=2)),
    (4, 2, 'both', 37, dict(sequence=2, tensor=4)),
    (6, 3, 'left', 29, dict(fsdp=2, sequence=2, tensor=2)),
    (2, 1, 'right', 36, dict(sequence=8))], ids=str)
def test_a_mesh_changes_nothing(heads, kv_heads, kind, slots, axes):
  is_the_formula(rows(heads, kv_heads, 16, kind, slots, 'float32'), 'xla',
                 'float32', spread(**axes))


def test_the_tpu_kernel_runs_on_a_mesh(interpreted):
  # Two blocks of queries, one on each device, and of keys.
  inputs = rows(2, 1, 128, 'several', 130, 'float32')
  is_the_formula(inputs, 'tpu', 'float32', spread(sequence=2))


def test_rows_that_are_cut_hold_scores_of_their_own_queries_alone(monkeypatch):
  # A row that is whole: all its scores at once.
  monkeypatch.setattr(attention, '_BANDS', 1)
  whole = temporary_bytes(1024)
  assert whole > 2 * 1024 * 1024 * 4
  assert temporary_bytes(1024, spread(sequence=8)) < whole / 6


def test_bands_hold_their_scores_in_turn():
  # Those of two heads; side by side their gradients made it half as much again.
  assert temporary_bytes(2048) < 2 * 2048 * 2048 * 4


def test_rows_that_the_devices_do_not_divide_are_told():
  inputs = rows(2, 1, 8, 'left', 9, 'float32')
  with pytest.raises(ValueError, match="2 rows.* 8 devices.*'data', 'fsdp'"):
    outputs_and_gradients(*inputs, 'xla', spread(data=8))


def test_hidden_states_lie_as_their_tokens_do():
  place = spread(data=2, sequence=2, tensor=2)
  whole = attention.Whole(jnp.ones((2, 6), jnp.int32), place)
  laid = jax.jit(whole.lay)(jnp.zeros((2, 6, 4)))
  assert laid.sharding.shard_shape(laid.shape) == (1, 3, 4)
  assert whole.cuts_slots and not whole.replace(place=None).cuts_slots
  assert not whole.replace(place=spread(data=8)).cuts_slots


@pytest.mark.parametrize('backend, width, dtype', [
    ('tpu', 264, 'bfloat16'), ('gpu', 48, 'bfloat16'),
    ('gpu', 64, 'float32'), (None, 64, 'float32')])
def test_what_a_kernel_does_not_take_gets_the_xla_form(backend, width, dtype):
  # No interpreter here: a kernel could not run.
  queries, keys, values, segments, _ = rows(4, 2, width, 'left', 9, dtype)
  np.testing.assert_array_equal(
      causal(queries, keys, values, segments, backend=backend),
      causal(queries, keys, values, segments, backend='xla'))


def test_an_unknown_backend_is_told():
  inputs = rows(2, 1, 8, 'left', 9, 'float32')[:4]
  with pytest.raises(ValueError, match="xla, tpu, gpu.*not 'cuda'"):
    attention.causal(*inputs, backend='cuda')


@pytest.mark.parametrize('axes', [dict(), dict(data=2, tensor=4)], ids=str)
def test_gpu_kernels_lower_for_cuda(axes):
  inputs = rows(12, 4, 128, 'left', 300, 'bfloat16')
  traced = outputs_and_gradients.trace(*(
      jax.ShapeDtypeStruct(x.shape, x.dtype) for x in inputs), 'gpu',
                                       spread(**axes))
  text = traced.lower(lowering_platforms=('cuda',)).as_text()
  # Forward, and backward in two kernels.
  assert text.count('@__gpu$xla.gpu.triton(') == 3


# A step of gradient descent through one layer whose rows, slots and heads are
# cut; and attention alone, where rows and heads are.
_COMPILE = """
import jax, jax.numpy as jnp, sys
from jax.experimental import topologies
from lapo_jax import attention, sharding
from lapo_jax.models import qwen2

describe = lambda name, **settings: topologies.get_topology_desc(
    platform='tpu', topology_name=name, **settings).devices
chips = describe(sys.argv[1])

def step(place, kernels, hidden, segments):
  def loss(kernels):
    product = lambda name, x: x @ kernels[name]['kernel']
    split = lambda x: x.reshape(*x.shape[:2], -1, 128)
    mixed, _ = attention.Whole(segments, place).attend(*(
        split(product(name, hidden)) for name in ('query', 'key', 'value')))
    found = product('out', mixed.reshape(*hidden.shape[:2], -1))
    return jnp.mean(found.astype(jnp.float32)**2)
  return jax.tree.map(lambda x, y: x - y, kernels, jax.grad(loss)(kernels))

mesh = sharding.make_mesh(data=2, fsdp=2, sequence=2, tensor=2, devices=chips)
kernel = lambda *shape: {'kernel': jax.ShapeDtypeStruct(shape, jnp.bfloat16)}
kernels = {'query': kernel(256, 512), 'key': kernel(256, 256),
           'value': kernel(256, 256), 'out': kernel(512, 256)}
places = sharding.partition(qwen2.PARTITION_RULES, {'_': kernels}, mesh)['_']
place = sharding.slots(mesh)
text = jax.jit(
    lambda *inputs: step(place, *inputs), in_shardings=(places, place, place),
    out_shardings=places).lower(
        kernels, jax.ShapeDtypeStruct((8, 1280, 256), jnp.bfloat16),
        jax.ShapeDtypeStruct((8, 1280), jnp.int32)).compile().as_text()
assert text.count('tpu_custom_call') == 3, text.count('tpu_custom_call')
assert 'all-gather' in text and 'reduce-scatter' in text

mesh = sharding.make_mesh(data=8, fsdp=1, tensor=2, devices=chips)
place = sharding.slots(mesh)
four = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(
    *place.spec, 'tensor'))
array = lambda heads: jax.ShapeDtypeStruct((8, 640, heads, 128), jnp.bfloat16,
                                           sharding=four)
def total(queries, keys, values, segments):
  mixed, _ = attention.Whole(segments, place).attend(queries, keys, values)
  return mixed.astype(jnp.float32).sum()
text = jax.jit(jax.grad(total, (0, 1, 2))).lower(
    array(12), array(2), array(2),
    jax.ShapeDtypeStruct((8, 640), jnp.int32, sharding=place)
    ).compile().as_text()
assert text.count('tpu_custom_call') == 3, text.count('tpu_custom_call')
assert 'all-gather' not in text and 'all-reduce' not in text

slices = describe(sys.argv[1], num_slices=2)
mesh = sharding.make_mesh(data=2, fsdp=-1, sequence=4, devices=slices)
assert [{chip.slice_index for chip in half.flat} for half in mesh.devices] == [
    {0}, {1}]
"""


@pytest.mark.skipif(importlib.util.find_spec('libtpu') is None,
                    reason='compiling for a TPU needs libtpu')
@pytest.mark.parametrize('topology', ['v5e:4x4', 'v5p:2x2x4'])
def test_tpu_kernels_compile_on_sixteen_chips(topology):
  environment = dict(
      os.environ, JAX_PLATFORMS='cpu', TPU_SKIP_MDS_QUERY='1',
      ALLOW_MULTIPLE_LIBTPU_LOAD='true', TPU_WORKER_HOSTNAMES='localhost')
  done = subprocess.run([sys.executable, '-c', _COMPILE, topology],
                        cwd=pathlib.Path(__file__).parent.parent,
                        env=environment, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
