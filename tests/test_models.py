# SPDX-License-Identifier: Apache-2.0
"""Decoders: their cache, their padding, their files, and another's numbers."""

import functools
import json
import pathlib
import shutil
import warnings

import flax.traverse_util
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import numpy as np
import pytest
import safetensors.flax
import safetensors.numpy

from lapo_jax import ops, sampling, sharding, types
from lapo_jax.models import _folders, _layers, qwen2

# Lengths of the real tokens of three rows of 11 slots, padded on the left.
LENGTHS = np.array([11, 7, 3])
# Logits of the model and the slots of `test_logits_are_the_stored_ones`.
GOLDEN = [[-1.772150, -1.418655, 0.013198, -2.467846, -0.312985, -0.246844],
          [-1.176716, 0.303111, 0.926162, -0.206527, 1.011514, 0.878549]]


def positions_of(mask):
  return np.asarray(ops.positions_from_mask(jnp.asarray(mask)))


def left_padded(lengths, slots, vocab_size, seed=0):
  """Random tokens and their mask."""
  rng = np.random.default_rng(seed)
  tokens = rng.integers(0, vocab_size, (len(lengths), slots)).astype(np.int32)
  return tokens, np.arange(slots) >= slots - np.asarray(lengths)[:, None]


@functools.partial(jax.jit, static_argnums=0)
def forward(model, params, tokens, mask, positions=None):
  """Logits float32 [B, S, V] without a cache."""
  if positions is None:
    positions = ops.positions_from_mask(mask)
  hidden, _ = model.apply({'params': params}, tokens, positions, mask)
  return model.apply({'params': params}, hidden, method='unembed')


@pytest.fixture
def folder(tmp_path, tiny_model, tiny_params):
  """The tiny model, saved."""
  qwen2.save(tiny_params, tmp_path / 'model', tiny_model, eos_token_id=1)
  return tmp_path / 'model'


def rewrite(folder, **settings):
  """Changes config.json."""
  config = json.loads((folder / 'config.json').read_text())
  (folder / 'config.json').write_text(json.dumps({**config, **settings}))


def tensors_of(folder):
  return safetensors.numpy.load_file(folder / 'model.safetensors')


def assert_same_bits(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


# ---- The forward pass.


@pytest.mark.parametrize('tied', [True, False])
def test_every_parameter_has_a_partition_rule(tiny_model, tied):
  mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
  shapes = qwen2.init_shapes(tiny_model.clone(tied=tied))
  placed = sharding.partition(qwen2.PARTITION_RULES, shapes, mesh)
  assert jax.tree.structure(placed) == jax.tree.structure(shapes)
  for path, leaf in flax.traverse_util.flatten_dict(placed, sep='/').items():
    # All but the norms are really cut: no rule is a typo that matches nothing.
    assert (leaf.spec == PartitionSpec()) == path.endswith('scale'), path
  with pytest.raises(ValueError, match='parameter layers_0/rogue'):
    sharding.partition(qwen2.PARTITION_RULES,
                       {'layers_0': {'rogue': jnp.zeros(2)}}, mesh)


def test_a_cache_changes_nothing(tiny_model, tiny_params):
  tokens, mask = left_padded(LENGTHS, 11, 64)
  want = forward(tiny_model, tiny_params, tokens, mask)
  positions = positions_of(mask)
  step = jax.jit(functools.partial(tiny_model.apply, {'params': tiny_params}))
  # Five slots at once, then one by one into a cache with room to spare.
  cache = tiny_model.init_cache(3, 5)
  hidden, cache = step(tokens[:, :5], positions[:, :5], mask[:, :5], cache)
  cache, found = cache.grow(16), [hidden]
  room = np.pad(mask, ((0, 0), (0, 5)))
  for slot in range(5, 11):
    now = slice(slot, slot + 1)
    key_mask = room & (np.arange(16) <= slot)
    hidden, cache = step(tokens[:, now], positions[:, now], key_mask, cache)
    found.append(hidden)
    assert int(cache.index) == slot + 1
  logits = tiny_model.apply({'params': tiny_params},
                            jnp.concatenate(found, axis=1), method='unembed')
  np.testing.assert_allclose(logits[mask], want[mask], atol=1e-5)


def test_a_row_alone_is_the_row_in_any_batch(tiny_model, tiny_params):
  tokens, mask = left_padded(LENGTHS, 11, 64)
  batch = forward(tiny_model, tiny_params, tokens, mask)
  assert np.all(np.isfinite(batch))
  for row, length in enumerate(LENGTHS):
    alone = forward(tiny_model, tiny_params, tokens[row:row + 1, -length:],
                    np.ones((1, length), bool))
    np.testing.assert_allclose(batch[row, -length:], alone[0], atol=1e-5)


def test_what_padding_holds_changes_nothing(tiny_model, tiny_params):
  tokens, mask = left_padded(LENGTHS, 11, 64)
  logits = forward(tiny_model, tiny_params, tokens, mask)
  other = forward(tiny_model, tiny_params, np.where(mask, tokens, 63), mask)
  np.testing.assert_array_equal(logits[mask], other[mask])


def test_no_slot_sees_a_later_one(tiny_model, tiny_params):
  tokens, mask = left_padded(LENGTHS, 11, 64)
  changed = tokens.copy()
  changed[:, 8] = (changed[:, 8] + 1) % 64
  before = forward(tiny_model, tiny_params, tokens, mask)
  after = forward(tiny_model, tiny_params, changed, mask)
  earlier = mask & (np.arange(11) < 8)
  np.testing.assert_array_equal(before[earlier], after[earlier])
  assert np.all(np.abs(before - after)[:, 8:].max(axis=-1) > 1e-3)


def test_a_cache_of_other_rows_is_repeated_by_group():
  cache = _layers.init_cache(2, 3, num_layers=1, num_kv_heads=1, head_dim=2,
                             dtype=jnp.float32)
  cache = cache.replace(keys=(cache.keys[0].at[1].set(1.0),))
  rows = cache.repeat(3).keys[0][:, 0, 0, 0]
  np.testing.assert_array_equal(rows, [0, 0, 0, 1, 1, 1])


def test_bfloat16_stays_near_float32_and_gives_float32_logits(
    tiny_model, tiny_params):
  tokens, mask = left_padded(LENGTHS, 11, 64)
  half = forward(tiny_model.clone(dtype=jnp.bfloat16), tiny_params, tokens,
                 mask)
  assert half.dtype == jnp.float32
  whole = forward(tiny_model, tiny_params, tokens, mask)
  assert np.abs(half - whole)[mask].max() < 0.3


def test_logits_are_the_stored_ones(make_params):
  # Six query heads on three key heads of eight, untied, the last slot of a
  # padded and of a full row. Torch gave the same numbers to 1e-5.
  model = qwen2.Model(vocab_size=40, width=48, num_layers=2, num_heads=6,
                      num_kv_heads=3, mlp_width=56, rope_theta=1e6, tied=False)
  tokens = np.array([[0, 0, 0, 7, 11, 13], [17, 19, 23, 29, 31, 37]], np.int32)
  mask = np.arange(6) >= np.array([3, 0])[:, None]
  logits = forward(model, make_params(model), tokens, mask)
  np.testing.assert_allclose(logits[:, -1, :6], GOLDEN, atol=1e-4)


# ---- Another implementation.


SHAPES = {
    'shared_heads': dict(vocab_size=67, width=36, num_layers=2, num_heads=6,
                         num_kv_heads=2, mlp_width=40, rope_theta=1e6),
    'untied': dict(vocab_size=64, width=32, num_layers=3, num_heads=4,
                   num_kv_heads=4, mlp_width=33, rope_theta=10000.0,
                   tied=False),
    'one_key_head': dict(vocab_size=65, width=36, num_layers=1, num_heads=3,
                         num_kv_heads=1, mlp_width=50, rope_theta=500.0,
                         tied=False, norm_eps=1e-5),
    'heads_do_not_fill_the_width': dict(
        vocab_size=64, width=34, num_layers=2, num_heads=4, num_kv_heads=2,
        mlp_width=48, rope_theta=10000.0),
}


def reference(folder):
  """The folder's model in transformers, float32."""
  torch = pytest.importorskip('torch', reason='parity needs torch')
  transformers = pytest.importorskip('transformers')
  torch.set_num_threads(1)
  transformers.utils.logging.disable_progress_bar()
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')
    return torch, transformers.AutoModelForCausalLM.from_pretrained(
        str(folder), dtype=torch.float32, attn_implementation='eager').eval()


def reference_logits(folder, tokens, mask, positions):
  torch, theirs = reference(folder)
  ask = lambda x: torch.tensor(np.asarray(x), dtype=torch.long)
  with torch.no_grad(), warnings.catch_warnings():
    warnings.simplefilter('ignore')
    return theirs(ask(tokens), attention_mask=ask(mask),
                  position_ids=ask(positions)).logits.numpy()


@pytest.mark.parametrize('shape,slots,first', [
    ('shared_heads', 11, 0),
    ('untied', 11, 0),
    ('one_key_head', 11, 489),  # positions 489 … 499
    ('heads_do_not_fill_the_width', 11, 0),
    ('shared_heads', 500, 0),
])
def test_logits_are_those_of_transformers(tmp_path, make_params, shape, slots,
                                          first):
  model = qwen2.Model(**SHAPES[shape])
  params = make_params(model)
  qwen2.save(params, tmp_path, model)
  lengths = [slots, slots - 4, 3]
  tokens, mask = left_padded(lengths, slots, model.vocab_size)
  positions = positions_of(mask) + first
  ours = forward(model, params, tokens, mask, positions)
  theirs = reference_logits(tmp_path, tokens, mask, positions)
  assert np.abs(theirs[mask]).max() > 1.0
  np.testing.assert_allclose(ours[mask], theirs[mask], atol=1e-4)


def test_transformers_decodes_the_tokens_that_we_decode(folder, tiny_model,
                                                        tiny_params):
  tokens, mask = left_padded([6, 4], 6, 64)
  sample = sampling.make_sample_fn(tiny_model, group_size=1,
                                   max_completion_length=32, eos_ids=[1],
                                   pad_id=0)
  rollout = sample(tiny_params, types.Prompts(
      tokens=tokens, mask=mask, index=jnp.arange(2),
      target_lengths=jnp.zeros(2, jnp.int32)), jax.random.key(0),
      jnp.float32(0.0))
  torch, theirs = reference(folder)
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')
    decoded = theirs.generate(
        torch.tensor(tokens, dtype=torch.long),
        attention_mask=torch.tensor(mask, dtype=torch.long), do_sample=False,
        max_new_tokens=32, eos_token_id=1, pad_token_id=0)
  np.testing.assert_array_equal(rollout.completion_tokens,
                                decoded[:, 6:].numpy())


def test_a_folder_that_transformers_wrote_loads(tmp_path, folder, tiny_model,
                                                tiny_params):
  _, theirs = reference(folder)
  theirs.save_pretrained(tmp_path / 'theirs')
  model = qwen2.make(str(tmp_path / 'theirs'))
  assert model == tiny_model
  assert_same_bits(qwen2.load(str(tmp_path / 'theirs'), model), tiny_params)


def test_the_embedded_model_is_small_and_anyones():
  folder = _folders.resolve('tiny_reasoner')
  size = sum(file.stat().st_size for file in folder.rglob('*'))
  assert size <= 5 * 2**20
  model = qwen2.make('tiny_reasoner')
  params = qwen2.load('tiny_reasoner', model)
  assert 0.7e6 < sum(x.size for x in jax.tree.leaves(params)) < 1.3e6
  tokens, mask = left_padded([40, 25, 3], 40, model.vocab_size)
  theirs = reference_logits(folder, tokens, mask, positions_of(mask))
  ours = forward(model, params, tokens, mask)
  np.testing.assert_allclose(ours[mask], theirs[mask], atol=1e-4)


# ---- Folders.


@pytest.mark.parametrize('tied', [True, False])
def test_saving_and_loading_keep_every_bit(tmp_path, tiny_model, make_params,
                                           tied):
  model = tiny_model.clone(tied=tied)
  params = make_params(model)
  first, second = str(tmp_path / 'a'), str(tmp_path / 'b')
  qwen2.save(params, first, model, eos_token_id=5)
  assert qwen2.make(first) == model
  loaded = qwen2.load(first, model)
  assert_same_bits(loaded, params)
  qwen2.save(loaded, second, model, eos_token_id=5)
  assert_same_bits(qwen2.load(second, model), params)
  for name in ('config.json', 'model.safetensors'):
    assert (pathlib.Path(first, name).read_bytes() ==
            pathlib.Path(second, name).read_bytes())


def test_bfloat16_files_load_as_float32(folder, tiny_model, tiny_params):
  half = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16),
                      tensors_of(folder))
  safetensors.flax.save_file(half, folder / 'model.safetensors')
  loaded = qwen2.load(str(folder), qwen2.make(str(folder)))
  assert {x.dtype for x in jax.tree.leaves(loaded)} == {np.dtype('float32')}
  assert_same_bits(loaded, jax.tree.map(
      lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), tiny_params))


def test_weights_in_several_files_load(folder, tiny_model, tiny_params):
  tensors = tensors_of(folder)
  names = sorted(tensors)
  (folder / 'model.safetensors').unlink()
  files = ['model-00001-of-00002.safetensors',
           'model-00002-of-00002.safetensors']
  for file, part in zip(files, (names[::2], names[1::2]), strict=True):
    safetensors.numpy.save_file({name: tensors[name] for name in part},
                                folder / file)
  index = {name: files[i % 2] for i, name in enumerate(names)}
  (folder / 'model.safetensors.index.json').write_text(
      json.dumps({'metadata': {}, 'weight_map': index}))
  assert_same_bits(qwen2.load(str(folder), qwen2.make(str(folder))),
                   tiny_params)


def test_weights_that_do_not_fit_are_named_in_one_line(folder):
  tensors = tensors_of(folder)
  del tensors['model.norm.weight']
  tensors['model.layers.9.rogue'] = np.zeros(2, np.float32)
  tensors['model.layers.0.mlp.up_proj.weight'] = np.zeros((3, 32), np.float32)
  safetensors.numpy.save_file(tensors, folder / 'model.safetensors')
  with pytest.raises(ValueError) as caught:
    qwen2.make(str(folder))
  message = str(caught.value)
  assert '\n' not in message
  for part in ("missing ['model.norm.weight']",
               "unexpected ['model.layers.9.rogue']",
               'model.layers.0.mlp.up_proj.weight (32, 3), expected (32, 48)'):
    assert part in message


def test_a_model_without_its_unembedding_is_not_taken_as_tied(folder):
  rewrite(folder, tie_word_embeddings=False)
  with pytest.raises(ValueError, match=r"missing \['lm_head.weight'\]"):
    qwen2.make(str(folder))


@pytest.mark.parametrize('settings,named', [
    ({'model_type': 'gpt2'}, "got model_type 'gpt2'"),
    ({'use_sliding_window': True}, 'use_sliding_window'),
    ({'hidden_act': 'gelu'}, 'hidden_act'),
    ({'rope_scaling': {'type': 'yarn', 'factor': 4.0}}, 'rope_scaling'),
    ({'rope_parameters': {'rope_type': 'linear', 'factor': 2.0}},
     'rope_scaling'),
])
def test_what_we_cannot_compute_is_refused_by_name(folder, settings, named):
  rewrite(folder, **settings)
  with pytest.raises(ValueError, match=named):
    qwen2.make(str(folder))


@pytest.mark.parametrize('missing', ['vocab_size', 'num_hidden_layers'])
def test_a_config_without_a_size_is_refused_by_name(folder, missing):
  config = json.loads((folder / 'config.json').read_text())
  del config[missing]
  (folder / 'config.json').write_text(json.dumps(config))
  with pytest.raises(ValueError, match=missing):
    qwen2.make(str(folder))


@pytest.mark.parametrize('content', [
    b'{"model_type": "qwen2"', b'[1, 2]', b'\xff\xfe'])
def test_a_broken_config_is_refused(folder, content):
  (folder / 'config.json').write_bytes(content)
  with pytest.raises(ValueError, match='config.json'):
    qwen2.make(str(folder))


def test_only_safetensors_are_read(folder):
  weights = folder / 'model.safetensors'
  # A pickle is never opened, whatever it is called.
  shutil.move(weights, folder / 'pytorch_model.bin')
  with pytest.raises(ValueError, match='got no .*safetensors'):
    qwen2.make(str(folder))
  weights.write_bytes(b'\x80\x04K\x01.' * 20)
  with pytest.raises(ValueError, match='expected a safetensors file'):
    qwen2.make(str(folder))


def test_a_model_that_is_nowhere_names_what_there_is(tmp_path):
  with pytest.raises(ValueError, match='expected a folder with config.json'):
    qwen2.make(str(tmp_path))
  with pytest.raises(ValueError, match=r'model.dtype .float16.'):
    _folders.dtype_of('float16')
