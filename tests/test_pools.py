# SPDX-License-Identifier: Apache-2.0
"""A pool holds what was written, and its kernel finds it by the tables.

The kernel runs on the CPU in Pallas's interpreter, and is compiled within the
sampler for machines that are not here.
"""

import importlib.util
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import numpy as np
import pytest
from toys import pooled

from lapo_jax import pools, sharding


@pytest.fixture
def interpreted(monkeypatch):
  """Pallas kernels run on the CPU."""
  from jax._src import literals
  from jax.experimental import pallas
  # JAX 0.10's interpreter takes every index for an array.
  monkeypatch.setattr(literals.TypedInt, 'shape', (), raising=False)
  compiled = pallas.pallas_call
  monkeypatch.setattr(pallas, 'pallas_call', lambda *args, **settings: compiled(
      *args, **{**settings, 'interpret': True}))


def make_case(heads, kv_heads, width, tokens, columns, dtype='bfloat16'):
  """Rows of length 0, one token, whole pages, and anything between."""
  rng = np.random.default_rng(tokens)
  full = columns * tokens
  lengths = np.array([0, 1, tokens, full, full - 1, full // 2 + 1], np.int32)
  table = rng.permutation(6 * columns + 3)[:6 * columns].reshape(6, columns)
  # Past the last page anything may stand.
  unused = np.arange(columns)[None] >= -(-lengths // tokens)[:, None]
  table = np.where(unused, rng.integers(-9, 10**6, table.shape), table)
  normal = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
  return (normal(6, heads, width),
          jnp.pad(normal(6 * columns + 3, tokens, 2 * kv_heads, width),
                  [*3 * [(0, 0)], (0, -width % 128)]),
          jnp.asarray(lengths), jnp.asarray(table, jnp.int32))


def formula(queries, pages, lengths, table):
  queries, pages = (np.asarray(x, np.float64) for x in (queries, pages))
  mixed = np.zeros_like(queries)
  shared, width = 2 * queries.shape[1] // pages.shape[2], queries.shape[2]
  pages = pages[..., :width]
  for n, length in enumerate(np.asarray(lengths)):
    used = np.asarray(table)[n, :-(-length // pages.shape[1])]
    for h in range(queries.shape[1] if length else 0):
      keys, values = (pages[used, :, 2 * (h // shared) + i].reshape(
          -1, width)[:length] for i in range(2))
      shares = np.exp(keys @ queries[n, h] / width**0.5)
      mixed[n, h] = shares @ values / shares.sum()
  return mixed


@pytest.mark.parametrize('shape', [(12, 2, 128, 64, 3),
                                   (7, 1, 128, 16, 5), (4, 2, 64, 16, 3)],
                         ids=str)
def test_the_kernel_is_the_formula(interpreted, shape):
  case = make_case(*shape)
  mixed = pools.attend(*case)
  np.testing.assert_allclose(np.asarray(mixed, np.float32), formula(*case),
                             atol=2e-2)
  assert not np.asarray(mixed[0]).any()
  # What stands in for it where tests sample from pools.
  np.testing.assert_allclose(np.asarray(pooled.attend(*case), np.float32),
                             formula(*case), atol=2e-2)


def test_devices_that_share_the_heads_have_the_kernel_too(interpreted):
  case = make_case(4, 2, 64, 16, 3)
  mesh = sharding.make_mesh(data=2, tensor=2, fsdp=1,
                            devices=jax.devices()[:4])
  rows = PartitionSpec('data')

  def attend(*inputs):
    own = sharding.along('tensor', lambda *x: (pools.attend(*x),),
                         (1, 2, None, None), (1,))
    return own(*inputs)[0]

  mixed = jax.jit(jax.shard_map(
      attend, mesh=mesh, in_specs=(rows, PartitionSpec(), rows, rows),
      out_specs=rows, axis_names=set(mesh.axis_names) - {'tensor'},
      check_vma=False))(*case)
  assert mixed.sharding.spec == PartitionSpec('data', 'tensor')
  np.testing.assert_allclose(np.asarray(mixed, np.float32), formula(*case),
                             atol=2e-2)


def test_a_table_too_large_for_one_kernel_is_cut(interpreted, monkeypatch):
  case = make_case(2, 1, 128, 16, 2)
  whole = pools.attend(*case)
  monkeypatch.setattr(pools, '_ENTRIES', 4 * (2 + 2))
  np.testing.assert_array_equal(whole, pools.attend(*case))


def test_pages_hold_what_was_written():
  rng = np.random.default_rng(0)
  kept = tuple(tuple(jnp.asarray(rng.normal(size=(2, 6, 2, 4)), jnp.float32)
                     for _ in range(2)) for _ in range(3))
  # Six pages of three tokens; a page that there is not takes nothing.
  ids = jnp.array([[4, 0], [2, 6]])
  pool = pools.fill(pools.empty(6, 3, (3, 2, 4), jnp.float32), ids, kept)
  for pages, (keys, values) in zip(pool, kept, strict=True):
    np.testing.assert_array_equal(pages[4, :, 0::2, :4], keys[0, :3])
    np.testing.assert_array_equal(pages[0, :, 1::2, :4], values[0, 3:])
    np.testing.assert_array_equal(pages[2, :, 1::2, :4], values[1, :3])
    assert pages.shape[3] == 128 and not np.asarray(pages[..., 4:]).any()
    assert not np.asarray(pages[jnp.array([1, 3, 5])]).any()
  moved = pools.copy(pool, jnp.int32(2), jnp.array([4, 2, 0]),
                     jnp.array([1, 5, 3]))
  np.testing.assert_array_equal(moved[1][1], pool[1][4])
  np.testing.assert_array_equal(moved[1][5], pool[1][2])
  assert not np.asarray(moved[1][3]).any()
  np.testing.assert_array_equal(pools.take(moved, jnp.array([5, 9]))[2],
                                moved[2][jnp.array([5, 5])])


def test_shapes_that_have_a_kernel():
  has = lambda heads, width, dtype, backend: pools.has_kernel(
      (28, heads, width), jnp.dtype(dtype), backend)
  assert has(2, 128, 'bfloat16', 'tpu') and has(8, 256, 'float32', 'tpu')
  assert has(2, 64, 'bfloat16', 'tpu') and not has(2, 128, 'int8', 'tpu')
  assert not has(2, 512, 'bfloat16', 'tpu')
  assert not has(3, 128, 'bfloat16', 'tpu')
  assert not has(2, 128, 'bfloat16', 'gpu') and not has(2, 128, 'bfloat16',
                                                        None)


# Decodes one layer of the 1.5B model's shape on four chips.
_COMPILE = """
import jax, jax.numpy as jnp, sys
from jax.experimental import topologies
from lapo_jax import sharding, shards, slots, types
from lapo_jax.models import qwen2

chips = topologies.get_topology_desc(platform='tpu', topology_name=sys.argv[1])
mesh = sharding.make_mesh(tensor=int(sys.argv[2]), devices=chips.devices)
batch, whole = sharding.batch(mesh), sharding.replicated(mesh)
model = qwen2.Model(vocab_size=512, width=256, num_layers=1, num_heads=12,
                    num_kv_heads=2, head_dim=int(sys.argv[3]), mlp_width=512,
                    dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
params = qwen2.init_shapes(model)
places = sharding.for_sampling(sharding.partition(qwen2.PARTITION_RULES, params,
                                                  mesh))
like = lambda tree, place: jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree)
array = lambda *shape, dtype=jnp.int32: jax.ShapeDtypeStruct(
    shape, dtype, sharding=batch)
params = jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(
    x.shape, x.dtype, sharding=place), params, places)
programs = shards.make(
    model, group_size=4, max_completion_length=200, eos_ids=(1,), pad_id=0,
    page_size=64,
    cache_dtype='', backend='tpu', shardings=(places, None, batch))
assert programs.pooled
prompts = types.Prompts(array(8, 150), array(8, 150, dtype=bool), None, None)
numbers = [array(32, dtype=x) for x in (*2 * ('float32',), *2 * ('int32',))]
prompts, job, kind, _ = jax.eval_shape(
    programs.begin, prompts, jax.eval_shape(lambda: jax.random.key(0)),
    *numbers)
prompts, job = like((prompts, job), batch)
with_pages = lambda tree: like(tree, batch).replace(
    pages=like(tree.pages, programs.pages))
store = with_pages(jax.eval_shape(
    lambda *x: programs.first_store(*x, 6 + 777), params, prompts))
prefill = programs.prefill.lower(params, prompts, array(8), array(8, 3), store)
assert prefill.as_text().count('@tpu_custom_call') == 1
prefill.compile()
job = job.replace(prompt_pages=array(8, 3))
state = like(jax.eval_shape(lambda x: programs.first_state(x, 8, 777, 8),
                            store.hidden), batch).replace(pages=store.pages)
store = store.replace(pages=())
active = with_pages(jax.eval_shape(programs.bring, store, slots.Ready(
    *5 * (array(4),))))
decode = programs.decode.lower(params, job, store.hidden, active,
                               like(kind, whole), state)
assert decode.as_text().count('@tpu_custom_call') == 1
# No step moves the pool, 51 MB or half of it.
temporary = decode.compile().memory_analysis().temp_size_in_bytes
assert temporary < 20e6, temporary
"""


@pytest.mark.skipif(importlib.util.find_spec('libtpu') is None,
                    reason='compiling for a TPU needs libtpu')
@pytest.mark.parametrize('topology, tensor, width', [
    ('v5e:2x2', 1, 128), ('v5p:2x2x1', 1, 128), ('v5e:2x2', 2, 128),
    ('v5e:2x2', 1, 64)])
def test_the_sampler_compiles_on_four_chips(topology, tensor, width):
  environment = dict(
      os.environ, JAX_PLATFORMS='cpu', TPU_SKIP_MDS_QUERY='1',
      ALLOW_MULTIPLE_LIBTPU_LOAD='true', TPU_WORKER_HOSTNAMES='localhost')
  done = subprocess.run([sys.executable, '-c', _COMPILE, topology, str(tensor),
                         str(width)],
                        cwd=pathlib.Path(__file__).parent.parent,
                        env=environment, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
