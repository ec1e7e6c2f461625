# SPDX-License-Identifier: Apache-2.0
"""Model folders: where they are, what is refused, which bits come through."""

import json
import os
import shutil

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.flax
import safetensors.numpy

from experiments.real_models import cases
from lapo_jax import sharding
from lapo_jax.models import _folders, _loading, llama, qwen2, qwen3

FAMILIES = {'qwen2': qwen2, 'qwen3': qwen3, 'llama': llama}
FULL = ('qwen2 own heads, untied', 'qwen3 own heads, biases, untied',
        'llama own heads, all biases, tied')
INDEX = 'model.safetensors.index.json'
COMMIT = '0123456789abcdef' * 2 + '01234567'


@pytest.fixture
def folder(tmp_path, tiny_model, tiny_params):
  """The tiny model, saved in one file."""
  qwen2.save(tiny_params, tmp_path / 'model', tiny_model, eos_token_id=1)
  return tmp_path / 'model'


@pytest.fixture
def sharded(tmp_path, tiny_model, tiny_params):
  """The tiny model, saved in several."""
  qwen2.save(tiny_params, tmp_path / 'sharded', tiny_model,
             max_shard_bytes=30_000)
  return tmp_path / 'sharded'


def rewrite(folder, **settings):
  """Changes config.json."""
  file = folder / 'config.json'
  file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))


def rewrite_tensors(folder, change):
  """Changes the dict of tensors in place."""
  file = folder / 'model.safetensors'
  tensors = safetensors.numpy.load_file(file)
  change(tensors)
  safetensors.numpy.save_file(tensors, file)


def load(folder, **settings):
  model = qwen2.make(str(folder), **settings)
  return qwen2.load(str(folder), model)


def assert_same_bits(a, b):
  jax.tree.map(lambda x, y: np.testing.assert_array_equal(
      np.asarray(x), np.asarray(y), strict=True), a, b)


def refused(folder, said):
  with pytest.raises(ValueError, match=said) as caught:
    qwen2.make(str(folder))
  assert '\n' not in str(caught.value)
  return str(caught.value)


# ---- Which bits come through.


@pytest.mark.parametrize('name', FULL)
@pytest.mark.parametrize('param_dtype', ['float32', 'bfloat16'])
def test_loading_and_saving_keep_every_bit(tmp_path, name, param_dtype):
  case = cases.CASES[name]
  family = FAMILIES[case.family]
  model = case.model(param_dtype=jnp.dtype(param_dtype))
  params = cases.make_params(model)
  first, second = tmp_path / 'a', tmp_path / 'b'
  family.save(params, first, model, eos_token_id=5)
  assert family.make(str(first), param_dtype=param_dtype) == model
  loaded = family.load(str(first), model)
  assert_same_bits(loaded, params)
  family.save(jax.tree.map(jnp.asarray, loaded), second, model,
              eos_token_id=5)
  assert_same_bits(family.load(str(second), model), params)
  for file in ('config.json', 'model.safetensors'):
    assert (first / file).read_bytes() == (second / file).read_bytes()
  config = json.loads((second / 'config.json').read_text())
  assert config['torch_dtype'] == param_dtype


def test_what_we_write_is_what_the_library_writes(tmp_path, folder):
  tensors = safetensors.numpy.load_file(folder / 'model.safetensors')
  safetensors.numpy.save_file(tensors, tmp_path / 'theirs',
                              metadata={'format': 'pt'})
  for file in (folder / 'model.safetensors', tmp_path / 'theirs'):
    with safetensors.safe_open(file, framework='numpy') as opened:
      assert opened.metadata() == {'format': 'pt'}
      assert {name: opened.get_slice(name).get_dtype()
              for name in opened.keys()} == dict.fromkeys(tensors, 'F32')  # noqa: SIM118
  size = lambda file: file.stat().st_size
  assert size(folder / 'model.safetensors') == size(tmp_path / 'theirs')


@pytest.mark.parametrize('stored', ['bfloat16', 'float16', 'float32'])
@pytest.mark.parametrize('held', ['bfloat16', 'float32'])
def test_each_dtype_loads_as_each(folder, tiny_params, stored, held):
  file = folder / 'model.safetensors'
  tensors = safetensors.flax.load_file(file)
  safetensors.flax.save_file(
      {name: x.astype(stored) for name, x in tensors.items()}, file)
  assert_same_bits(load(folder, param_dtype=held), jax.tree.map(
      lambda x: x.astype(stored).astype(held), tiny_params))


def test_several_files_hold_what_one_does(folder, sharded, tiny_params):
  files = sorted(sharded.glob('*.safetensors'))
  assert files[0].name == f'model-00001-of-0000{len(files)}.safetensors'
  assert 3 <= len(files) <= 9
  # One tensor may be too large for a file; it has one of its own.
  assert all(file.stat().st_size < 32_000 for file in files)
  index = json.loads((sharded / INDEX).read_text())
  assert index['metadata']['total_size'] == sum(
      x.nbytes for x in jax.tree.leaves(tiny_params))
  assert_same_bits(load(sharded), load(folder))
  assert_same_bits(load(sharded), tiny_params)


def test_a_folder_that_is_saved_again_holds_the_new_files_alone(
    sharded, tiny_model, tiny_params):
  (sharded / 'tokenizer.json').write_text('{}')
  doubled = jax.tree.map(lambda x: 2 * x, tiny_params)
  qwen2.save(doubled, sharded, tiny_model)
  assert {file.name for file in sharded.iterdir()} == {
      'config.json', 'model.safetensors', 'tokenizer.json'}
  assert_same_bits(load(sharded), doubled)
  qwen2.save(tiny_params, sharded, tiny_model, max_shard_bytes=30_000)
  assert not (sharded / 'model.safetensors').exists()
  assert_same_bits(load(sharded), tiny_params)


def test_a_save_that_breaks_off_leaves_the_old_file(folder, tiny_model,
                                                    tiny_params):
  class Broken:
    shape, dtype, nbytes = (32,), np.dtype('float32'), 128

    def __array__(self, *args, **kwargs):
      raise OSError('the disk is full')

  params = {**tiny_params, 'final_norm': {'scale': Broken()}}
  with pytest.raises(OSError, match='disk is full'):
    qwen2.save(params, folder, tiny_model)
  assert_same_bits(load(folder), tiny_params)


def test_a_source_lends_its_config(tmp_path, folder, tiny_model, tiny_params):
  own = dict(rope_theta=10000, torch_dtype='float16', use_cache=True,
             sliding_window=4096, eos_token_id=[7, 8])
  rewrite(folder, **own)
  model = tiny_model.clone(param_dtype=jnp.bfloat16)
  half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), tiny_params)
  qwen2.save(half, tmp_path / 'out', model, source=str(folder))
  config = json.loads((tmp_path / 'out' / 'config.json').read_text())
  assert config == {**json.loads((folder / 'config.json').read_text()),
                    'torch_dtype': 'bfloat16'}
  rewrite(folder, dtype='float32')
  qwen2.save(half, tmp_path / 'out', model, source=str(folder))
  config = json.loads((tmp_path / 'out' / 'config.json').read_text())
  assert config['dtype'] == 'bfloat16' and 'torch_dtype' not in config
  with pytest.raises(ValueError, match='describes another model'):
    qwen2.save(half, tmp_path / 'out', model.clone(rope_theta=5.0),
               source=str(folder))


# ---- Straight into shards.


@pytest.mark.parametrize('name', FULL)
def test_each_device_reads_its_own_part(tmp_path, monkeypatch, name):
  case = cases.CASES[name]
  family = FAMILIES[case.family]
  model = case.model(vocab_size=64, mlp_width=48, num_heads=4, num_kv_heads=4,
                     width=32, head_dim=8)
  params = cases.make_params(model)
  family.save(params, tmp_path, model, max_shard_bytes=20_000)
  mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
  shapes = family.init_shapes(model)
  places = sharding.partition(family.PARTITION_RULES, shapes, mesh)
  read, sizes = _loading._Place.read, {}

  def watch(self, index, dtype):
    part = read(self, index, dtype)
    sizes.setdefault(self.name, []).append(part.size)
    return part

  monkeypatch.setattr(_loading._Place, 'read', watch)
  loaded = family.load(str(tmp_path), model, places)
  assert_same_bits(loaded, params)
  assert_same_bits(jax.tree.map(lambda x: x.sharding, loaded), places)
  # A quarter of a matrix at a time, never the whole.
  matrices = {name: found for name, found in sizes.items()
              if 'proj.weight' in name}
  assert len(matrices) == 7 * model.num_layers
  whole = flax.traverse_util.flatten_dict(shapes, sep='/')
  sizes_of = {4 * max(found) for found in matrices.values()}
  assert sizes_of <= {leaf.size for leaf in whole.values()}
  assert all(len(found) == 8 for found in matrices.values())


# ---- What is refused.


def test_weights_that_do_not_fit_are_named_in_one_line(folder):
  def change(tensors):
    del tensors['model.norm.weight']
    tensors['model.layers.9.rogue'] = np.zeros(2, np.float32)
    tensors['model.layers.0.mlp.up_proj.weight'] = np.zeros((3, 32),
                                                            np.float32)
    tensors['model.layers.1.input_layernorm.weight'] = np.zeros(32, np.int8)

  rewrite_tensors(folder, change)
  said = refused(folder, 'do not fit the model')
  for part in ("missing ['model.norm.weight']",
               "unexpected ['model.layers.9.rogue']",
               'input_layernorm.weight I8 (32,), expected (32,)',
               'mlp.up_proj.weight F32 (32, 3), expected (32, 48)'):
    assert part in said


def test_a_model_without_its_unembedding_is_not_taken_as_tied(folder):
  rewrite(folder, tie_word_embeddings=False)
  refused(folder, r"missing \['lm_head.weight'\]")


def test_a_tied_model_may_carry_a_copy_and_nothing_else(
    folder, tiny_params, monkeypatch):
  monkeypatch.setattr(_loading, '_ROWS', 10)  # 64 rows in seven parts
  embedding = np.asarray(tiny_params['embedding'])
  copy = lambda tensors: tensors.update({'lm_head.weight': embedding})
  rewrite_tensors(folder, copy)
  assert_same_bits(load(folder), tiny_params)

  def spoil(tensors):
    tensors['lm_head.weight'] = embedding.copy()
    tensors['lm_head.weight'][63, 31] += 1e-6

  rewrite_tensors(folder, spoil)
  refused(folder, 'lm_head.weight is not the embedding')
  rewrite_tensors(folder, lambda tensors: tensors.update(
      {'lm_head.weight': embedding[:, :5].copy()}))
  refused(folder, r'lm_head.weight F32 \(64, 5\), expected \(64, 32\)')


def test_tables_that_follow_from_the_config_are_ignored_by_name(folder,
                                                                tiny_params):
  table = np.zeros(4, np.float32)
  rewrite_tensors(folder, lambda tensors: tensors.update({
      'model.layers.0.self_attn.rotary_emb.inv_freq': table,
      'model.rotary_emb.inv_freq': table}))
  assert_same_bits(load(folder), tiny_params)
  rewrite_tensors(folder, lambda tensors: tensors.update({
      'model.layers.0.self_attn.rotary_emb.other': table}))
  refused(folder, 'rotary_emb.other')


def test_only_safetensors_are_read(folder):
  weights = folder / 'model.safetensors'
  # A pickle is never opened, whatever it is called.
  shutil.move(weights, folder / 'pytorch_model.bin')
  refused(folder, r'got no \*.safetensors')
  weights.write_bytes(b'\x80\x04K\x01.' * 20)
  refused(folder, 'expected a safetensors file')


@pytest.mark.parametrize('cut', [4, 100, 5000])
def test_a_file_that_was_cut_off_is_refused(folder, cut):
  weights = folder / 'model.safetensors'
  weights.write_bytes(weights.read_bytes()[:-cut])
  refused(folder, 'expected a safetensors file')
  weights.write_bytes(weights.read_bytes()[:cut])
  refused(folder, 'expected a safetensors file')


def test_an_index_and_its_files_agree(sharded):
  index = sharded / INDEX
  good = json.loads(index.read_text())
  first, second = sorted(file.name for file in
                         sharded.glob('*.safetensors'))[:2]
  held = next(name for name, file in good['weight_map'].items()
              if file == first)

  (sharded / 'stray.safetensors').write_bytes((sharded / first).read_bytes())
  refused(sharded, r"not there nothing; not in the index "
                   r"\['stray.safetensors'\]")
  (sharded / 'stray.safetensors').unlink()

  content = (sharded / first).read_bytes()
  (sharded / first).unlink()
  refused(sharded, rf"not there \['{first}'\]; not in the index nothing")
  (sharded / first).write_bytes(content)

  moved = {**good['weight_map'], held: second}
  index.write_text(json.dumps({**good, 'weight_map': moved}))
  refused(sharded, f'not in the index .*{held}|not in the file .*{held}')

  index.unlink()
  refused(sharded, 'expected the weights in one such file, or in several')


@pytest.mark.parametrize('content,said', [
    ('{', 'expected an object weight_map'),
    ('[]', 'expected an object weight_map'),
    ('{"weight_map": [1]}', 'expected an object weight_map'),
    ('{"weight_map": {"a": ["b"]}}', 'not there .*b'),
    ('{"weight_map": {"a": 3}}', "not there .'3'"),
    ('{"weight_map": {"a": "../model.safetensors"}}', r'not there .*\.\./'),
    ('{"weight_map": {"a": "/etc/passwd"}}', 'not there .*/etc/passwd'),
    ('{"weight_map": {}}', 'not in the index'),
])
def test_an_index_that_misleads_is_refused(sharded, content, said):
  (sharded / INDEX).write_text(content)
  refused(sharded, said)


# ---- Where a folder is.


def test_a_model_that_is_nowhere_names_what_there_is(tmp_path):
  for path in (str(tmp_path), ''):
    with pytest.raises(ValueError, match=r"tiny_reasoner.*or owner/name@"):
      _folders.resolve(path)
  assert _folders.resolve('tiny_reasoner').name == 'tiny_reasoner'


@pytest.mark.parametrize('name', [
    'Qwen/Qwen3-1.7B', 'Qwen/Qwen3-1.7B@main', 'Qwen/Qwen3-1.7B@0123abc',
    f'Qwen/Qwen3-1.7B@{COMMIT}0', f'Qwen/Qwen3-1.7B@{COMMIT.upper()}'])
def test_the_hub_is_asked_for_a_commit_only(name, monkeypatch):
  import huggingface_hub
  monkeypatch.setattr(huggingface_hub, 'snapshot_download', None)
  with pytest.raises(ValueError, match='add its commit: owner/name@<40 hex'):
    _folders.resolve(name)


def test_a_pinned_commit_comes_without_code_or_pickles(folder, tmp_path,
                                                       monkeypatch):
  import huggingface_hub
  there = ['config.json', 'model.safetensors', INDEX, 'tokenizer.json',
           'merges.txt', 'chat_template.jinja', 'modeling_own.py',
           'pytorch_model.bin', 'original/params.json',
           'original/model.safetensors', 'README.md']
  asked = []

  def download(repository, *, revision, allow_patterns, ignore_patterns):
    asked.append((repository, revision))
    asked.extend(huggingface_hub.utils.filter_repo_objects(
        there, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns))
    return str(folder)

  monkeypatch.setattr(huggingface_hub, 'snapshot_download', download)
  assert _folders.resolve(f'owner/name@{COMMIT}') == folder
  assert asked == [('owner/name', COMMIT), *there[:6]]
  monkeypatch.setattr(huggingface_hub, 'snapshot_download',
                      lambda *args, **kwargs: str(tmp_path))
  with pytest.raises(ValueError, match='got no config.json in it'):
    _folders.resolve(f'owner/name@{COMMIT}')


def test_without_a_network_the_hub_is_one_line():
  assert os.environ['HF_HUB_OFFLINE'] == '1'
  with pytest.raises(ValueError, match='could not be fetched.*give a local '
                     'folder') as caught:
    _folders.resolve(f'nobody/nothing-at-all@{COMMIT}')
  assert '\n' not in str(caught.value)
