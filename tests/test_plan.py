# SPDX-License-Identifier: Apache-2.0
"""What a plan says follows from shapes, and holds for what a run compiles."""

import importlib.util
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from toys import config as toy_config

from lapo_jax import (
    ahead,
    attention,
    cases,
    costs,
    plan,
    sharding,
)
from lapo_jax.models import qwen2

_GIB = 2**30
_TINY = {
    'architectures': ['Qwen2ForCausalLM'], 'model_type': 'qwen2',
    'hidden_size': 128, 'intermediate_size': 128, 'num_attention_heads': 1,
    'num_hidden_layers': 1, 'num_key_value_heads': 1, 'vocab_size': 256}

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec('libtpu') is None,
    reason='compiling for a TPU needs libtpu')


@pytest.fixture
def config(tmp_path):
  """The toy run on a model of which there is a config.json alone."""
  (tmp_path / 'config.json').write_text(json.dumps(_TINY))
  config = toy_config.get_config()
  config.model.update(path=str(tmp_path), dtype='bfloat16')
  config.stages = ()
  config.loss.kl_coef = 0.05
  config.updates.num_minibatches = 2
  return config


def report(**changes):
  """A report that fits, but for the changes of its decode."""
  program = {'arguments': 3 * _GIB, 'output': 0, 'temporaries': _GIB,
             'beside': 2 * _GIB, 'together': 6 * _GIB, 'flops': 2e9,
             'bytes': 3e9, 'code': 0, 'seconds': 1.0}
  work = {'flops': 1e12, 'bytes': 1e9, 'seconds': 0.5}
  return {
      'stage': 'discovery', 'topology': 'v5e:4x4', 'chips': 16,
      'memory': 16 * _GIB, 'code': _GIB // 2, 'mesh': {'data': 1, 'fsdp': 16},
      'model': 'm', 'mean_length': 2048, 'kept': {'parameters': _GIB},
      'programs': {'decode': {**program, **changes}, 'update': program},
      'slots': {'asked': 544, 'largest': 640},
      'microbatch': {'asked': 16, 'largest': 32},
      'floor': {'verbs': {'decode': work, 'update': work}, 'seconds': 1.0,
                'steps_per_hour': 3600.0, 'tokens_per_second_per_chip': 7.0}}


def shape(**changes):
  """Two chips that share 4 groups of 3 completions, six slots in all."""
  return costs.Shape(**{**dict(
      prompts=4, group_size=3, prompt_length=10, mean_length=16, cap=64,
      num_slots=6, score_passes=2, epochs=1, microbatch_size=4, chips=2,
      shards=2, tensor=1, pooled=True, weight_bytes=2,
      cache_dtype='bfloat16'), **changes})


@pytest.mark.parametrize('name', ['v5e:3x3', 'v5e', 'v9:2x2', 'v5p:4x4', ''])
def test_a_topology_that_is_not_known(name):
  with pytest.raises(ValueError, match='v5e:1x1, 2x2.*v6e:.*v5p:2x2x1') as got:
    costs.find(name)
  assert repr(name) in str(got.value) and '\n' not in str(got.value)


def test_what_chips_can_do():
  assert costs.find('v5e:4x4')[:2] == (197e12, 819e9)
  assert costs.find('v5p:4x4x4').flops == 459e12
  assert costs.find('v6e:16x16').memory == int(31.24 * 2**30)


def test_the_flops_of_a_forward_pass_are_those_of_its_matrices(tiny_model):
  shapes = jax.tree.leaves_with_path(qwen2.init_shapes(tiny_model))
  weights = sum(leaf.size for path, leaf in shapes
                if leaf.ndim == 2 and 'embedding' not in str(path))
  assert costs.forward_flops(tiny_model, 7, 0, 0) == 2 * 7 * weights
  assert costs.forward_flops(tiny_model, 0, 0, 5) == 2 * 5 * 32 * 64
  # Two layers, four heads of eight numbers: a product each with key and value.
  assert costs.forward_flops(tiny_model, 0, 3, 0) == 2 * 2 * (2 * 4 * 8) * 3


def test_the_flops_of_a_forward_pass_are_xlas(tiny_model):
  def forward(params, tokens):
    segments = jnp.ones_like(tokens)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden, _ = tiny_model.apply({'params': params}, tokens, positions,
                                 cache=attention.Whole(segments, backend='xla'))
    return tiny_model.apply({'params': params}, hidden, method='unembed')

  cost = jax.jit(forward).lower(
      qwen2.init_shapes(tiny_model),
      jax.ShapeDtypeStruct((4, 64), jnp.int32)).compile().cost_analysis()
  # Whole squares of scores, and some numbers for norms and softmax.
  counted = costs.forward_flops(tiny_model, 4 * 64, 4 * 64 * 64, 4 * 64)
  assert 1 < cost['flops'] / counted < 1.25


def test_the_work_of_a_step_by_hand(tiny_model):
  work = costs.step_work(tiny_model, shape())
  of = lambda *args: costs.forward_flops(tiny_model, *args) / 2
  assert work['prefill'].flops == of(4 * 10, 4 * 50, 0)
  assert work['decode'].flops == of(12 * 16, 12 * 16 * 18, 12 * 16)
  # Rows of 10 + 16 slots, scored twice; trained on, at three times the price.
  forward = of(12 * 26, 12 * 26**2 / 2, 12 * 16)
  assert work['score'].flops == 2 * forward
  assert work['update'].flops == 3 * forward
  # Six rows in three slots are two turns of 16 steps. Each step reads the
  # weights, and in each slot a prompt and half a completion: 2 bytes for each
  # of 2 layers' 2 heads of 8 numbers, keys and values.
  weights = of(1, 0, 1)
  cache = 3 * (10 + 8) * 2 * (2 * 2 * 2 * 8)
  assert work['decode'].bytes == 2 * 16 * (2 * weights + cache)
  # Without a pool a group reads its prompt once.
  apart = costs.step_work(tiny_model, shape(pooled=False))['decode'].bytes
  assert work['decode'].bytes - apart == pytest.approx(
      2 * 16 * 3 * (10 - 10 / 3) * 2 * 64)


def test_chips_that_share_layers_share_the_heads_of_the_cache(tiny_model):
  # Two key heads: two chips have one each, four all of them.
  read = lambda tensor: costs.step_work(
      tiny_model, shape(tensor=tensor))['decode'].bytes
  weights = costs.forward_flops(tiny_model, 1, 0, 1) / 2
  cache = read(1) - 2 * 16 * 2 * weights
  assert read(2) == pytest.approx(2 * 16 * weights + cache / 2)
  assert read(4) == pytest.approx(16 * weights + cache)


def test_twice_the_chips_have_half_the_work(tiny_model):
  one, two = (costs.step_work(tiny_model, shape(chips=n, shards=n))
              for n in (2, 4))
  for name, work in one.items():
    assert two[name].flops == work.flops / 2
  slower, faster = (costs.Work(8e12, 8e9).seconds(costs.Chip(
      1e12, bandwidth, 1, ())) for bandwidth in (1e8, 1e12))
  assert (slower, faster) == (80.0, 8.0)


def test_the_bytes_of_a_device():
  mesh = sharding.make_mesh(data=2, fsdp=4)
  place = lambda sharding_, dtype: jax.ShapeDtypeStruct(
      (16, 3), dtype, sharding=sharding_)
  tree = {'rows': place(sharding.batch(mesh), jnp.bfloat16),
          'all': (place(sharding.replicated(mesh), jnp.float32), ())}
  assert cases.device_bytes(tree) == 2 * 3 * 2 + 16 * 3 * 4


# Records are made of shapes, which checked types would refuse.
_CALL = """
import json, sys
import jax, ml_collections
from lapo_jax import ahead, cases, checks, forcing
from lapo_jax import programs as programs_lib

config = ml_collections.ConfigDict(json.load(sys.stdin))
mesh = programs_lib.make_mesh(config)
found = programs_lib.make(config, ahead.read_model(config), mesh,
                          eos_ids=(0,), pad_id=0, reward_shapes=())
sampler = cases.sampler(config, found, 8)
called = sampler.cases | cases.trainer(config, found, mesh)
results = {name: jax.eval_shape(case.function, *case.arguments)
           for name, case in called.items()}
of = lambda tree: [(x.shape, x.dtype) for x in jax.tree.leaves(tree)]
# One slot on each of eight devices; a state is given back as it was.
assert sampler.cases['decode'].arguments[-1].row.shape == (8,)
for name in ('grow', 'decode'):
  assert of(results[name]) == of(called['decode'].arguments[-1]), name
assert of(results['copy']) == of(sampler.params)
assert of(results['update'][0]) == of(found.state_shapes)
assert results['score'].shape == (32, 16)
# The reference lies beside sampling, unless it waits on the host.
here = cases.device_bytes(sampler.cases['decode'].beside)
config.updates.offload_reference = True
away = cases.device_bytes(cases.sampler(config, found, 8).cases[
    'decode'].beside)
assert here - away == cases.device_bytes(found.state_shapes.params) > 0

# Packed rows have one prompt slot; forced words are part of the state.
config.updates.pack = True
config.rollout.forced.most = 8
assert checks.forces(config)
found = programs_lib.make(config, ahead.read_model(config), mesh, eos_ids=(0,),
                          pad_id=0, reward_shapes=(),
                          forced_words=forcing.Words(0, 0))
sampler = cases.sampler(config, found, 8)
assert sampler.cases['decode'].arguments[-1].forced.shape == (32, 16)
called = sampler.cases | cases.trainer(config, found, mesh)
results = {name: jax.eval_shape(case.function, *case.arguments)
           for name, case in called.items()}
slots = config.rollout.max_prompt_length + 16
assert results['score'].shape == (32, slots - 1)
# Two microbatches are the fewest that packing makes.
assert called['update'].arguments[1].rollout.segments.shape == (32, slots)
"""


def test_the_programs_take_what_they_are_called_with(config):
  """No program is compiled: jit refuses other trees, shapes and places."""
  done = subprocess.run([sys.executable, '-c', _CALL], text=True,
                        input=config.to_json(), capture_output=True)
  assert done.returncode == 0, done.stderr


@pytest.mark.parametrize('message, size', [
    ('RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required '
     'for HLO temporaries (390.62G) exceeds available HBM (15.75G).',
     int(390.62 * _GIB)),
    ('RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 18.50G '
     'of 15.75G hbm. Exceeded hbm capacity by 2.75G.', int(18.5 * _GIB)),
    ('RESOURCE_EXHAUSTED: something else', 0)])
def test_what_the_compiler_asks_for_in_vain(message, size):
  assert ahead.needed(message) == size


@pytest.mark.parametrize('limit, found', [(0, 0), (16, 16), (40, 32), (99, 64)])
def test_the_most_that_fits(limit, found):
  assert ahead.most(lambda number: number <= limit, [16, 32, 64]) == found


def test_what_does_not_fit_is_named():
  assert plan.misfits(report()) == []
  [told] = plan.misfits(report(together=18 * _GIB))
  assert told == (
      'decode does not fit: it needs 18.0 of 15.5 GiB, 2.5 too much; lower '
      'rollout.num_slots or rollout.cache_share (640 slots fit).')
  [told] = plan.misfits(report(together=16 * _GIB, refused='no'))
  assert 'at least 16.0 of 15.5 GiB' in told
  none = report(together=18 * _GIB) | {'slots': {'asked': 16, 'largest': 0}}
  assert 'raise mesh.tensor' in plan.misfits(none)[0]
  # Refused is refused, whatever it asked for.
  assert plan.misfits(report(refused='no'))
  text = plan.table(report(together=18 * _GIB))
  assert 'decode does not fit' in text and 'It fits.' not in text
  assert plan.table(report()).endswith('It fits.')


@pytest.mark.parametrize('together, status', [(6 * _GIB, None), (18 * _GIB, 2)])
def test_the_status_tells_whether_it_fits(monkeypatch, capsys, together,
                                          status):
  monkeypatch.setattr(plan, 'plan', lambda *args: [report(together=together)])
  argv = ['plan', '--config=configs/tiny.py', '--topology=v5e:4x4', '--json']
  monkeypatch.setattr(sys, 'argv', argv)
  if status is None:
    plan.run()
  else:
    with pytest.raises(SystemExit) as end:
      plan.run()
    assert end.value.code == status
  [printed] = json.loads(capsys.readouterr().out)
  assert printed['programs']['decode']['together'] == together


@pytest.mark.parametrize('argv, told', [
    ([], 'expected --config='),
    (['--config=configs/tiny.py', '--topology=v5e:9x9'], 'v5e:1x1'),
    (['--config=configs/tiny.py', '--topology=v5e:4x4'], 'lapo_jax[plan]')])
def test_a_mistake_is_one_line(monkeypatch, capsys, argv, told):
  find = importlib.util.find_spec
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: (
      None if name == 'libtpu' else find(name)))
  monkeypatch.setattr(sys, 'argv', ['plan', *argv])
  with pytest.raises(SystemExit) as end:
    plan.run()
  error = capsys.readouterr().err
  assert end.value.code == 2 and told in error and error.count('\n') == 1


@pytest.mark.parametrize('name, numbers', [
    ('DeepSeek-R1-Distill-Qwen-1.5B', 1_777_088_000),
    ('DeepScaleR-1.5B-Preview', 1_777_088_000),
    ('DeepSeek-R1-Distill-Qwen-7B', 7_615_616_512)])
def test_models_whose_shapes_are_known(config, name, numbers):
  config.model.path = name
  model = ahead.read_model(config)
  assert model.dtype == jnp.bfloat16 and model.param_dtype == jnp.float32
  matrices = costs.forward_flops(model, 1, 0, 1) // 2
  width, layers = model.width, model.num_layers
  biases = layers * model.head_dim * (model.num_heads + 2 * model.num_kv_heads)
  assert numbers == (matrices + model.vocab_size * width + biases +
                     (2 * layers + 1) * width)


@needs_libtpu
def test_a_step_compiles_for_a_slice_that_is_not_here(config):
  [found] = plan.plan(config, 'v5e:2x2')
  programs = found['programs']
  assert set(programs) == {'copy', 'prefill', 'grow', 'decode', 'update',
                           'score'}
  assert not plan.misfits(found) and 'It fits.' in plan.table(found)
  assert found['chips'] == 4 and found['memory'] == costs.CHIPS['v5e'].memory
  assert found['slots'] == {'asked': 32, 'largest': 32}
  assert found['microbatch'] == {'asked': 16, 'largest': 16}
  # The state is donated: the update makes none beside it.
  assert programs['update']['output'] < programs['update']['arguments'] / 10
  # On each of four chips, one prefill of two prompts in two pages.
  model = ahead.read_model(config)
  counted = costs.forward_flops(model, 2 * 128, 0, 0)
  assert 1 < programs['prefill']['flops'] / counted < 1.5
  # A slice on which the devices do not share the batch is refused as in a run.
  with pytest.raises(RuntimeError, match='num_prompts 8 .*16'):
    plan.plan(config, 'v5e:4x4')


_REFUSED = """
import jax, jax.numpy as jnp
from jax.experimental import topologies
from lapo_jax import ahead, cases, sharding

devices = topologies.get_topology_desc(platform='tpu',
                                       topology_name='v5e:2x2').devices
place = sharding.replicated(sharding.make_mesh(devices=devices))
shape = lambda *axes: jax.ShapeDtypeStruct(axes, jnp.float32, sharding=place)
found = ahead.measure(cases.Case(jax.jit(lambda x: x[0] * 2),
                                 (shape(20, 2**28),), shape(1024)), 'big')
assert found['beside'] == 4096
assert 20 < found['together'] / 2**30 < 30, found
assert 'exceeds available HBM (15.75G)' in found['refused']
"""


@needs_libtpu
def test_what_the_compiler_refuses_is_measured():
  done = subprocess.run([sys.executable, '-c', _REFUSED], text=True,
                        env={**os.environ, **plan.ENVIRONMENT},
                        capture_output=True)
  assert done.returncode == 0, done.stderr
