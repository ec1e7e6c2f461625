# SPDX-License-Identifier: Apache-2.0
"""Attention is its formula; every backend's kernel means the same.

Kernels run on the CPU in Pallas's interpreter, and are compiled for machines
that are not here. Tolerances are shares of the largest number in an array, or
of 1: 1e-5 in float32, 2e-2 in bfloat16, whose rounding is 4e-3.
"""

import functools
import importlib.util
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lapo_jax import attention

_TOLERANCE = {'float32': 1e-5, 'bfloat16': 2e-2}

causal = jax.jit(attention.causal, static_argnames='backend')
paged = jax.jit(attention.paged, static_argnames='backend')


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


@functools.partial(jax.jit, static_argnames='backend')
def outputs_and_gradients(queries, keys, values, segments, weights, backend):
  """Outputs on real tokens, and what their weighted sum says of q, k and v."""
  def mix(*qkv):
    mixed = attention.causal(*qkv, segments, backend=backend)
    return mixed.astype(jnp.float32)
  mixed, back = jax.vjp(mix, queries, keys, values)
  return jnp.where((segments > 0)[..., None, None], mixed, 0), *back(weights)


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


@pytest.mark.parametrize('dtype', _TOLERANCE)
@pytest.mark.parametrize('shape', [
    (4, 4, 16, 'left', 37), (4, 2, 32, 'right', 130), (7, 1, 64, 'both', 201),
    (12, 2, 16, 'several', 96), (2, 1, 16, 'whole', 1),
    (2, 1, 8, 'several', 1100)], ids=str)
def test_causal_is_the_formula_in_value_and_gradient(shape, dtype):
  inputs = rows(*shape, dtype)
  for got, expected in zip(outputs_and_gradients(*inputs, 'xla'),
                           by_the_formula(*inputs), strict=True):
    close(got, expected, dtype)


@pytest.mark.parametrize('backend, dtype, shape', [
    ('tpu', 'float32', (7, 1, 64, 'both', 201)),
    ('tpu', 'float32', (2, 1, 16, 'several', 530)),
    ('tpu', 'bfloat16', (4, 4, 16, 'left', 37)),
    ('tpu', 'bfloat16', (12, 2, 128, 'several', 130)),
    ('gpu', 'bfloat16', (4, 4, 16, 'left', 37)),
    ('gpu', 'bfloat16', (7, 1, 64, 'both', 201)),
    ('gpu', 'bfloat16', (12, 2, 128, 'several', 130)),
    ('gpu', 'bfloat16', (2, 1, 16, 'whole', 1))], ids=str)
def test_causal_kernels_equal_the_xla_form(interpreted, backend, dtype, shape):
  inputs = rows(*shape, dtype)
  for got, expected in zip(outputs_and_gradients(*inputs, backend),
                           outputs_and_gradients(*inputs, 'xla'), strict=True):
    close(got, expected, dtype)


@pytest.mark.parametrize('backend', ['xla', 'tpu', 'gpu'])
def test_padding_changes_nothing(interpreted, backend):
  queries, keys, values, segments, weights = rows(4, 2, 16, 'both', 50,
                                                  'bfloat16')
  clean = outputs_and_gradients(queries, keys, values, segments, weights,
                                backend)
  padding = (segments == 0)[..., None, None]
  dirty = [jnp.where(padding, 40.0, x).astype(x.dtype)
           for x in (queries, keys, values)]
  again = outputs_and_gradients(*dirty, segments, weights, backend)
  for one, other in zip(clean, again, strict=True):
    assert np.isfinite(np.asarray(other, np.float32)).all()
    np.testing.assert_array_equal(one, other)
  for gradient in again[1:]:
    assert not np.asarray(jnp.where(padding, gradient, 0)).any()
  mixed = causal(*dirty, segments, backend=backend)
  assert np.isfinite(np.asarray(mixed, np.float32)).all()


def test_a_segment_is_as_alone():
  queries, keys, values, segments, _ = rows(4, 2, 16, 'several', 60, 'float32')
  mixed = causal(queries, keys, values, segments)
  alone = slice(20, 56)
  assert set(np.asarray(segments[0, alone]).tolist()) == {2}
  cut = [x[:1, alone] for x in (queries, keys, values)]
  close(mixed[:1, alone],
        causal(*cut, jnp.ones((1, 36), jnp.int32)), 'float32')


def test_long_rows_never_hold_all_scores():
  spec = jax.ShapeDtypeStruct((1, 4096, 2, 8), jnp.float32)
  segments = jax.ShapeDtypeStruct((1, 4096), jnp.int32)
  total = lambda *inputs: attention.causal(*inputs, backend='xla').sum()
  program = jax.jit(jax.grad(total, (0, 1, 2))).lower(
      spec, spec, spec, segments).compile()
  held = program.memory_analysis().temp_size_in_bytes
  assert held < 2 * 4096 * 4096 * 4 / 2


def pages(heads, kv_heads, width, tokens, columns, dtype):
  """Rows of length 0, one token, whole pages, and anything between."""
  rng = np.random.default_rng(tokens)
  full = columns * tokens
  lengths = np.array([0, 1, tokens, full, full - 1, full // 2 + 1], np.int32)
  table = rng.permutation(6 * columns + 3)[:6 * columns].reshape(6, columns)
  # Past the last page anything may stand.
  unused = np.arange(columns)[None] >= -(-lengths // tokens)[:, None]
  table = np.where(unused, rng.integers(-9, 10**6, table.shape), table)
  stored = lambda: normal(rng, kv_heads, 6 * columns + 3, tokens, width,
                          dtype=dtype)
  return (normal(rng, 6, heads, width, dtype=dtype), stored(), stored(),
          jnp.asarray(lengths), jnp.asarray(table, jnp.int32))


def paged_by_the_formula(queries, key_pages, value_pages, lengths, table):
  queries, key_pages, value_pages = (
      np.asarray(x, np.float64) for x in (queries, key_pages, value_pages))
  mixed = np.zeros_like(queries)
  shared, width = queries.shape[1] // key_pages.shape[0], queries.shape[2]
  for n, length in enumerate(np.asarray(lengths)):
    used = np.asarray(table)[n, :-(-length // key_pages.shape[2])]
    for h in range(queries.shape[1] if length else 0):
      keys, values = (x[h // shared, used].reshape(-1, width)[:length]
                      for x in (key_pages, value_pages))
      shares = np.exp(keys @ queries[n, h] / width**0.5)
      mixed[n, h] = shares @ values / shares.sum()
  return mixed


@pytest.mark.parametrize('dtype', _TOLERANCE)
@pytest.mark.parametrize('shape', [(4, 4, 16, 8, 3), (12, 2, 32, 5, 4),
                                   (14, 2, 8, 1, 7)], ids=str)
def test_paged_is_the_formula(shape, dtype):
  inputs = pages(*shape, dtype)
  mixed = paged(*inputs)
  close(mixed, paged_by_the_formula(*inputs), dtype)
  assert not np.asarray(mixed[0]).any()


@pytest.mark.parametrize('backend, shape', [
    ('tpu', (12, 2, 128, 64, 3)), ('tpu', (7, 1, 128, 128, 5)),
    ('tpu', (2, 2, 128, 256, 1)), ('gpu', (12, 2, 128, 64, 3)),
    ('gpu', (7, 1, 32, 16, 77)), ('gpu', (2, 2, 16, 128, 1))], ids=str)
def test_paged_kernels_equal_the_xla_form(interpreted, backend, shape):
  inputs = pages(*shape, 'bfloat16')
  mixed = paged(*inputs, backend=backend)
  close(mixed, paged(*inputs, backend='xla'), 'bfloat16')
  assert not np.asarray(mixed[0]).any()


def test_a_table_too_large_for_one_tpu_kernel_is_cut(interpreted, monkeypatch):
  inputs = pages(6, 1, 128, 128, 2, 'bfloat16')
  whole = attention.paged(*inputs, backend='tpu')
  monkeypatch.setattr(attention, '_ENTRIES', 4 * (2 + 1))
  np.testing.assert_array_equal(whole,
                                attention.paged(*inputs, backend='tpu'))


def test_paged_continues_causal():
  rng = np.random.default_rng(0)
  queries, keys, values = (normal(rng, 3, 20, heads, 16)
                           for heads in (6, 2, 2))
  lengths = jnp.array([20, 13, 5], jnp.int32)
  segments = (jnp.arange(20)[None] < lengths[:, None]).astype(jnp.int32)
  last = jnp.arange(3), lengths - 1
  expected = causal(queries, keys, values, segments)[last]
  # Row n's five pages of four tokens are pages 5n … 5n + 4.
  store = lambda x: x.transpose(2, 0, 1, 3).reshape(2, 15, 4, 16)
  mixed = paged(queries[last], store(keys), store(values), lengths,
                jnp.arange(15, dtype=jnp.int32).reshape(3, 5))
  close(mixed, expected, 'float32')


@pytest.mark.parametrize('backend, width, tokens, dtype', [
    ('tpu', 264, 16, 'bfloat16'), ('tpu', 264, 8, 'float32'),
    ('gpu', 48, 16, 'bfloat16'), ('gpu', 64, 24, 'float32'),
    (None, 64, 16, 'float32')])
def test_what_a_kernel_does_not_take_gets_the_xla_form(backend, width, tokens,
                                                       dtype):
  # No interpreter here: a kernel could not run.
  queries, keys, values, segments, _ = rows(4, 2, width, 'left', 9, dtype)
  np.testing.assert_array_equal(
      causal(queries, keys, values, segments, backend=backend),
      causal(queries, keys, values, segments, backend='xla'))
  inputs = pages(4, 2, width, tokens, 3, dtype)
  np.testing.assert_array_equal(paged(*inputs, backend=backend),
                                paged(*inputs, backend='xla'))


def test_an_unknown_backend_is_told():
  inputs = rows(2, 1, 8, 'left', 9, 'float32')[:4]
  with pytest.raises(ValueError, match="xla, tpu, gpu.*not 'cuda'"):
    attention.causal(*inputs, backend='cuda')
  with pytest.raises(ValueError, match="xla, tpu, gpu.*not 'cuda'"):
    attention.paged(*pages(2, 1, 8, 4, 2, 'float32'), backend='cuda')


def test_gpu_kernels_lower_for_cuda():
  like = lambda inputs: [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in inputs]
  def lowered(function, inputs):
    traced = jax.jit(function).trace(*like(inputs))
    return traced.lower(lowering_platforms=('cuda',)).as_text()
  inputs = rows(12, 2, 128, 'left', 300, 'bfloat16')
  text = lowered(functools.partial(outputs_and_gradients, backend='gpu'),
                 inputs)
  # Forward, and backward in two kernels.
  assert text.count('@__gpu$xla.gpu.triton(') == 3
  for tokens in (64, 128):
    inputs = pages(28, 4, 128, tokens, 10, 'bfloat16')
    text = lowered(functools.partial(attention.paged, backend='gpu'), inputs)
    assert text.count('@__gpu$xla.gpu.triton(') == 1


# Rows over one axis of four chips, heads over the other.
_COMPILE = """
import jax, jax.numpy as jnp, numpy as np, sys
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from lapo_jax import attention

chips = topologies.get_topology_desc(platform='tpu', topology_name=sys.argv[1])
mesh = Mesh(np.array(chips.devices).reshape(2, 2), ('data', 'model'))

def compiled(function, out_spec, arrays):
  specs = tuple(PartitionSpec(*spec) for _, _, spec in arrays)
  split = jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=out_spec,
                        check_vma=False)
  return jax.jit(split).lower(*(
      jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
      for (shape, dtype, _), spec in zip(arrays, specs, strict=True))).compile()

def backward(*inputs):
  total = lambda *x: attention.causal(*x, backend='tpu').astype(
      jnp.float32).sum()
  return jax.grad(total, (0, 1, 2))(*inputs)

four = ('data', None, 'model')
array = lambda heads: ((8, 640, heads, 128), jnp.bfloat16, four)
text = compiled(backward, PartitionSpec(*four), [
    array(12), array(2), array(2),
    ((8, 640), jnp.int32, ('data',))]).as_text()
assert text.count('tpu_custom_call') == 3, text.count('tpu_custom_call')
assert 'all-gather' not in text and 'all-reduce' not in text

for heads, kv_heads, tokens, columns in (12, 2, 64, 160), (28, 4, 128, 83):
  stored = ((kv_heads, 2048, tokens, 128), jnp.bfloat16, ('model', 'data'))
  text = compiled(
      lambda *x: attention.paged(*x, backend='tpu'),
      PartitionSpec('data', 'model'), [
          ((512, heads, 128), jnp.bfloat16, ('data', 'model')), stored, stored,
          ((512,), jnp.int32, ('data',)),
          ((512, columns), jnp.int32, ('data',))]).as_text()
  assert text.count('tpu_custom_call') == 1, text.count('tpu_custom_call')
"""


@pytest.mark.skipif(importlib.util.find_spec('libtpu') is None,
                    reason='compiling for a TPU needs libtpu')
@pytest.mark.parametrize('topology', ['v5e:2x2', 'v5p:2x2x1'])
def test_tpu_kernels_compile_on_four_chips(topology):
  environment = dict(
      os.environ, JAX_PLATFORMS='cpu', TPU_SKIP_MDS_QUERY='1',
      ALLOW_MULTIPLE_LIBTPU_LOAD='true', TPU_WORKER_HOSTNAMES='localhost')
  done = subprocess.run([sys.executable, '-c', _COMPILE, topology],
                        cwd=pathlib.Path(__file__).parent.parent,
                        env=environment, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
