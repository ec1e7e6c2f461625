# SPDX-License-Identifier: Apache-2.0
"""Decoders: their cache, their padding, their settings, others' numbers."""

import dataclasses
import functools
import json
import math
import pathlib
import warnings

import flax.traverse_util
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import numpy as np
import pytest

from experiments.real_models import cases
from lapo_jax import attention, ops, plugins, sampling, sharding, types
from lapo_jax.models import _configs, _folders, _layers, llama, qwen2, qwen3

FAMILIES = {'qwen2': qwen2, 'qwen3': qwen3, 'llama': llama}
# Lengths of the real tokens of three rows of 11 slots, padded on the left.
LENGTHS = np.array([11, 7, 3])
GOLDENS = pathlib.Path(__file__).parent / 'goldens' / 'logits.json'


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


# One of each family: every kind of parameter that there is.
FULL = {
    'qwen2': cases.CASES['qwen2 shared heads, tied'],
    'qwen3': cases.CASES['qwen3 own heads, biases, untied'],
    'llama': cases.CASES['llama own heads, all biases, tied'],
}


# ---- The forward pass.


@pytest.mark.parametrize('name', FULL)
@pytest.mark.parametrize('tied', [True, False])
def test_every_parameter_has_a_partition_rule(name, tied):
  family = FAMILIES[name]
  mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
  sizes = dict(vocab_size=64, width=32, num_heads=4, num_kv_heads=2,
               head_dim=8)
  shapes = family.init_shapes(FULL[name].model(tied=tied, **sizes))
  placed = sharding.partition(family.PARTITION_RULES, shapes, mesh)
  assert jax.tree.structure(placed) == jax.tree.structure(shapes)
  for path, leaf in flax.traverse_util.flatten_dict(placed, sep='/').items():
    # All else is really cut: no rule is a typo that matches nothing.
    whole = path.endswith(('scale', 'out/bias', 'down/bias'))
    assert (leaf.spec == PartitionSpec()) == whole, path
  with pytest.raises(ValueError, match='parameter layers_0/rogue'):
    sharding.partition(family.PARTITION_RULES,
                       {'layers_0': {'rogue': jnp.zeros(2)}}, mesh)


def test_attention_is_handed_to_the_cache_layer_by_layer(tiny_model,
                                                         tiny_params):
  class Seen(list):
    """Attends as without a cache, and notes what it is given."""

    def attend(self, queries, keys, values):
      return (attention.causal(queries, keys, values,
                               jnp.asarray(mask, jnp.int32)),
              Seen([*self, (queries.shape, keys.shape, values.shape)]))

  tokens, mask = left_padded(LENGTHS, 11, 64)
  hidden, seen = tiny_model.apply(
      {'params': tiny_params}, *map(jnp.asarray, (tokens, positions_of(mask))),
      cache=Seen())
  layers, kv_heads, width = tiny_model.cache_shape()
  key_shape = (3, 11, kv_heads, width)
  assert seen == [((3, 11, tiny_model.num_heads, width), key_shape,
                   key_shape)] * layers
  logits = tiny_model.apply({'params': tiny_params}, hidden, method='unembed')
  want = forward(tiny_model, tiny_params, tokens, mask)
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


def test_bfloat16_stays_near_float32_and_gives_float32_logits(
    tiny_model, tiny_params):
  tokens, mask = left_padded(LENGTHS, 11, 64)
  half = forward(tiny_model.clone(dtype=jnp.bfloat16), tiny_params, tokens,
                 mask)
  assert half.dtype == jnp.float32
  whole = forward(tiny_model, tiny_params, tokens, mask)
  assert np.abs(half - whole)[mask].max() < 0.3


def test_parameters_may_be_bfloat16(tiny_model, tiny_params):
  tokens, mask = left_padded(LENGTHS, 11, 64)
  half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), tiny_params)
  model = tiny_model.clone(param_dtype=jnp.bfloat16)
  shapes = qwen2.init_shapes(model)
  assert {x.dtype for x in jax.tree.leaves(shapes)} == {jnp.dtype('bfloat16')}
  # In float32 arithmetic they are the numbers that they are.
  np.testing.assert_array_equal(
      forward(model, half, tokens, mask),
      forward(tiny_model, jax.tree.map(lambda x: x.astype(jnp.float32), half),
              tokens, mask))


def stacked(model, params):
  return model.stack(params, jnp.stack)


@pytest.mark.parametrize('name', FULL)
def test_one_loop_over_the_layers_is_the_layers_in_turn(name):
  model = FULL[name].model()
  params = jax.tree.map(jnp.asarray, cases.make_params(model))
  tokens, mask = left_padded(LENGTHS, 11, model.vocab_size)
  found = forward(model, stacked(model, params), tokens, mask)
  wanted = forward(model, params, tokens, mask)
  np.testing.assert_allclose(found[mask], wanted[mask], atol=2e-5)
  jax.tree.map(np.testing.assert_array_equal,
               model.unstack(stacked(model, params)), params)


def size_of_program(model, params):
  """Equations of the gradient's program, those of loops once."""
  tokens, mask = left_padded(LENGTHS, 11, 64)
  gradient = jax.grad(lambda params: jnp.sum(forward(
      model, params, tokens, mask)))
  lowered = jax.jit(gradient).lower(stacked(model, params))
  return len(lowered.as_text().splitlines())


def test_one_loops_program_is_as_large_for_many_layers(tiny_model,
                                                       make_params):
  sizes = {size_of_program(model, make_params(model)) for model in (
      tiny_model.clone(num_layers=n, remat='dots') for n in (2, 5))}
  assert len(sizes) == 1


def test_computing_again_changes_memory_and_not_the_gradient(
    tiny_model, tiny_params):
  tokens, mask = left_padded(LENGTHS, 11, 64)
  params = stacked(tiny_model, tiny_params)

  def compiled(remat):
    model = tiny_model.clone(remat=remat)
    loss = lambda params: jnp.sum(jnp.where(
        mask[..., None], forward(model, params, tokens, mask), 0)**2)
    return jax.jit(jax.grad(loss)).lower(params).compile()

  programs = {remat: compiled(remat) for remat in ('none', 'dots', 'full')}
  wanted = programs['none'](params)
  bytes_of = {remat: program.memory_analysis().temp_size_in_bytes
              for remat, program in programs.items()}
  for remat in ('dots', 'full'):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(
        x, y, rtol=1e-4, atol=1e-4 * float(jnp.abs(y).max())),
        programs[remat](params), wanted)
  assert bytes_of['full'] < bytes_of['dots'] < bytes_of['none']


def test_rotary_frequencies_are_those_of_the_papers():
  np.testing.assert_allclose(_layers.rotary_frequencies(8, 10000.0),
                             [1.0, 0.1, 0.01, 0.001], rtol=1e-6)
  # Of 8,192 positions, 8192 f / 2π waves: 1304, 130, 13, 1.3, 0.13.
  found = _layers.rotary_frequencies(
      10, 1e5, _layers.RopeScaling(8.0, 1.0, 4.0, 8192))
  plain = np.array([1.0, 0.1, 0.01, 0.001, 0.0001])
  share = (8192 * 0.001 / (2 * math.pi) - 1) / 3
  between = 0.001 * ((1 - share) / 8 + share)
  np.testing.assert_allclose(found, [*plain[:3], between, 0.0001 / 8],
                             rtol=1e-6)
  assert found.dtype == np.float32


# ---- Another implementation.


@functools.cache
def ours_of(name):
  """Our logits of a case."""
  case = cases.CASES[name]
  model = case.model()
  return cases.logits(model, cases.make_params(model), case.texts())


def needs_torch():
  return pytest.importorskip('torch', reason='parity needs torch')


@pytest.mark.parametrize('name', cases.CASES)
def test_logits_are_those_of_transformers(tmp_path, name):
  needs_torch()
  case = cases.CASES[name]
  model, texts = case.model(), case.texts()
  params = cases.make_params(model)
  plugins.module('models', case.family).save(params, tmp_path, model)
  theirs = cases.transformers_logits(tmp_path, texts)
  mask = texts[1]
  assert np.abs(theirs[mask]).max() > 1.0
  np.testing.assert_allclose(ours_of(name)[mask], theirs[mask], atol=1e-4)


@pytest.mark.parametrize('name', cases.CASES)
def test_logits_are_the_stored_ones(name):
  # What transformers said when `experiments.real_models.parity` was run.
  want = np.array(json.loads(GOLDENS.read_text())[name])
  np.testing.assert_allclose(ours_of(name)[:, -1, :want.shape[1]], want,
                             atol=1e-4)


def test_long_texts_tell_whether_the_frequencies_are_stretched():
  scaled = [name for name, case in cases.CASES.items()
            if case.model().rope_scaling]
  assert len(scaled) == 3
  for name in scaled:
    case = cases.CASES[name]
    texts, model = case.texts(), case.model(rope_scaling=None)
    other = cases.logits(model, cases.make_params(model), texts)
    assert np.abs(ours_of(name) - other)[texts[1]].max() > 1.0


@pytest.mark.parametrize('name', FULL)
def test_transformers_decodes_the_tokens_that_we_decode(tmp_path, name):
  torch = needs_torch()
  model = FULL[name].model()
  params = cases.make_params(model)
  FAMILIES[name].save(params, tmp_path, model)
  tokens, mask = left_padded([6, 4], 6, 67)
  sample = sampling.make_sample_fn(model, group_size=1, eos_ids=[66],
                                   max_completion_length=64, pad_id=0)
  rollout = sample(jax.tree.map(jnp.asarray, params), types.Prompts(
      tokens=tokens, mask=mask, index=jnp.arange(2),
      target_lengths=jnp.zeros(2, jnp.int32)), jax.random.key(0),
      jnp.float32(0.0))
  assert np.all(rollout.completion_mask)
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')
    decoded = cases.transformers_model(tmp_path).generate(
        torch.tensor(tokens, dtype=torch.long),
        attention_mask=torch.tensor(mask, dtype=torch.long), do_sample=False,
        max_new_tokens=64, eos_token_id=66, pad_token_id=0)
  np.testing.assert_array_equal(rollout.completion_tokens,
                                decoded[:, 6:].numpy())


@pytest.mark.parametrize('name', [
    *FULL, 'llama scaled 8 times, 5,000 to 14,970'])
def test_a_folder_that_transformers_wrote_loads(tmp_path, name):
  needs_torch()
  case = FULL.get(name) or cases.CASES[name]
  family, model = FAMILIES[case.family], case.model()
  params = cases.make_params(model)
  family.save(params, tmp_path / 'ours', model)
  # Version 5 writes rope_parameters and dtype.
  cases.transformers_model(tmp_path / 'ours').save_pretrained(
      tmp_path / 'theirs')
  again = family.make(str(tmp_path / 'theirs'))
  assert again == model
  jax.tree.map(np.testing.assert_array_equal,
               family.load(str(tmp_path / 'theirs'), again), params)


def test_the_embedded_model_is_small_and_anyones():
  folder = _folders.resolve('tiny_reasoner')
  size = sum(file.stat().st_size for file in folder.rglob('*'))
  assert size <= 5 * 2**20
  model = qwen2.make('tiny_reasoner')
  params = qwen2.load('tiny_reasoner', model)
  assert 0.7e6 < sum(x.size for x in jax.tree.leaves(params)) < 1.3e6
  needs_torch()
  tokens, mask = left_padded([40, 25, 3], 40, model.vocab_size)
  texts = tokens, mask, positions_of(mask)
  theirs = cases.transformers_logits(folder, texts)
  np.testing.assert_allclose(cases.logits(model, params, texts)[mask],
                             theirs[mask], atol=1e-4)


# ---- Settings.


@pytest.fixture
def folder(tmp_path):
  """family name -> a folder of it, whose config.json takes `settings`."""

  def write(name, **settings):
    path = tmp_path / name
    model = FULL[name].model()
    FAMILIES[name].save(cases.make_params(model), path, model)
    config = json.loads((path / 'config.json').read_text())
    config = {**config, **settings}
    (path / 'config.json').write_text(json.dumps(
        {key: value for key, value in config.items() if value is not ...}))
    return str(path)

  return write


# config.json of DeepSeek-R1-Distill-Qwen-1.5B, DeepScaleR the same, without
# its sizes; then Qwen2.5's, Qwen3's and Llama 3.2's own entries.
REAL = [
    ('qwen2', dict(
        attention_dropout=0.0, bos_token_id=151643, eos_token_id=151643,
        initializer_range=0.02, max_position_embeddings=131072,
        max_window_layers=21, rope_theta=10000, sliding_window=4096,
        torch_dtype='bfloat16', transformers_version='4.44.0', use_cache=True,
        use_mrope=False, use_sliding_window=False)),
    ('qwen2', dict(sliding_window=32768, max_window_layers=28,
                   rope_scaling=None, layer_types=['full_attention'] * 2)),
    ('qwen3', dict(sliding_window=None, max_window_layers=36,
                   rope_theta=1000000, rope_scaling=None)),
    ('llama', dict(pretraining_tp=1, eos_token_id=[128001, 128008, 128009],
                   rope_theta=500000.0, rope_scaling={
                       'factor': 32.0, 'low_freq_factor': 1.0,
                       'high_freq_factor': 4.0, 'rope_type': 'llama3',
                       'original_max_position_embeddings': 8192})),
]


@pytest.mark.parametrize('name,settings', REAL)
def test_what_real_folders_say_is_understood(folder, name, settings):
  model = FAMILIES[name].make(folder(name, **settings))
  if 'rope_theta' in settings:
    assert model.rope_theta == settings['rope_theta']
  assert model.rope_scaling == (
      _layers.RopeScaling(32.0, 1.0, 4.0, 8192) if name == 'llama' else None)


LLAMA3 = {'rope_type': 'llama3', 'factor': 8.0, 'low_freq_factor': 1.0,
          'high_freq_factor': 4.0, 'original_max_position_embeddings': 64}


@pytest.mark.parametrize('settings,theta,scaling', [
    (dict(rope_theta=5e5), 5e5, None),
    (dict(rope_theta=...), 1e4, None),
    (dict(rope_theta=..., rope_parameters={'rope_theta': 5e5}), 5e5, None),
    (dict(rope_theta=7.0, rope_parameters={
        'rope_type': 'default', 'rope_theta': 5e5}), 5e5, None),
    (dict(rope_theta=5e5, rope_scaling={'type': 'default'}), 5e5, None),
    (dict(rope_theta=5e5, rope_scaling=LLAMA3), 5e5, (8.0, 1.0, 4.0, 64)),
    (dict(rope_theta=..., rope_parameters={**LLAMA3, 'rope_theta': 5e5}), 5e5,
     (8.0, 1.0, 4.0, 64)),
    # Without its own length, the text's.
    (dict(rope_theta=5e5, max_position_embeddings=512, rope_scaling={
        **LLAMA3, 'original_max_position_embeddings': None}), 5e5,
     (8.0, 1.0, 4.0, 512)),
    (dict(rope_theta=5e5, original_max_position_embeddings=128,
          rope_scaling=LLAMA3), 5e5, (8.0, 1.0, 4.0, 128)),
])
def test_rotary_settings_are_read_in_both_styles(folder, settings, theta,
                                                 scaling):
  model = llama.make(folder('llama', **settings))
  assert model.rope_theta == theta
  assert model.rope_scaling == (
      scaling and _layers.RopeScaling(*scaling))


def test_heads_are_as_wide_as_the_folder_or_its_family_says(folder):
  assert llama.make(folder('llama', head_dim=None)).head_dim == 8
  assert qwen2.make(folder('qwen2', head_dim=...)).head_dim == 6
  # transformers' default for this family.
  with pytest.raises(ValueError, match=r'\(32, 24\), expected \(32, 384\)'):
    qwen3.make(folder('qwen3', head_dim=...))


ANY = [
    ({'model_type': 'gpt2'}, "got model_type 'gpt2'"),
    ({'hidden_act': 'gelu'}, "hidden_act 'gelu'"),
    ({'layer_types': ['full_attention', 'sliding_attention']}, 'layer_types'),
    ({'layer_types': 3}, 'layer_types 3'),
    ({'architectures': ['OtherForSequenceClassification']}, 'architectures'),
    ({'architectures': 'OtherForCausalLM'}, 'architectures'),
    ({'partial_rotary_factor': 0.5}, 'partial_rotary_factor 0.5'),
    ({'quantization_config': {'quant_method': 'gptq'}}, 'quantization_config'),
    ({'auto_map': {'AutoModel': 'x.Y'}}, 'auto_map'),
    ({'is_causal': False}, 'is_causal False'),
    ({'logits_scaling': 8.0}, 'logits_scaling'),
    ({'final_logit_softcapping': 30.0}, 'final_logit_softcapping'),
    ({'rope_scaling': {'type': 'yarn', 'factor': 4.0}}, "rope_type 'yarn'"),
    ({'rope_scaling': {'rope_type': 'dynamic', 'factor': 4.0}}, 'dynamic'),
    ({'rope_parameters': {'rope_type': 'linear', 'factor': 2.0}}, 'linear'),
    ({'rope_parameters': {'full_attention': {'rope_theta': 1e4}}},
     'rope_scaling .*full_attention'),
    ({'rope_parameters': {'rope_theta': 1e4, 'partial_rotary_factor': 0.5}},
     'partial_rotary_factor'),
    ({'rope_scaling': [1]}, r'rope_scaling \[1\]'),
    ({'rope_scaling': {'rope_type': ['llama3']}}, 'rope_type'),
    ({'rope_scaling': {**LLAMA3, 'factor': None}}, 'factor None'),
    ({'rope_scaling': {**LLAMA3, 'low_freq_factor': 4.0}},
     'low_freq_factor 4.0'),
    ({'rope_theta': -1.0}, 'rope_theta -1.0'),
    ({'rope_theta': math.nan}, 'rope_theta nan'),
    ({'rms_norm_eps': 10**400}, 'rms_norm_eps 1'),
    ({'tie_word_embeddings': 'yes'}, "tie_word_embeddings 'yes'"),
    ({'vocab_size': ...}, 'vocab_size None'),
    ({'hidden_size': 32.0}, 'hidden_size 32.0'),
    ({'num_hidden_layers': True}, 'num_hidden_layers True'),
    ({'num_hidden_layers': 10**9}, 'num_hidden_layers 1000000000'),
    ({'num_attention_heads': 0}, 'num_attention_heads 0'),
    ({'num_key_value_heads': 5}, 'num_key_value_heads 5'),
    ({'head_dim': 7}, 'heads of 7'),
    ({'head_dim': '8'}, "head_dim '8'"),
]
OWN = [
    ('qwen2', {'use_sliding_window': True}, 'use_sliding_window'),
    ('qwen2', {'use_mrope': True}, 'use_mrope'),
    ('qwen3', {'attention_bias': 1}, 'attention_bias 1'),
    ('llama', {'mlp_bias': 'no'}, "mlp_bias 'no'"),
    ('llama', {'sliding_window': 4096}, 'sliding_window'),
    ('llama', {'pretraining_tp': 2}, 'pretraining_tp 2'),
]


@pytest.mark.parametrize('name,settings,named', [
    *((('qwen2', 'qwen3', 'llama')[i % 3], *rest)
      for i, rest in enumerate(ANY)), *OWN])
def test_what_we_cannot_compute_is_refused_by_name(folder, name, settings,
                                                   named):
  with pytest.raises(ValueError, match=named) as caught:
    FAMILIES[name].make(folder(name, **settings))
  assert '\n' not in str(caught.value)


# Entries of transformers' classes that change no logits of a text, or are
# read by others (the tokenizer: ids of tokens).
HARMLESS = {
    'transformers_version', 'output_hidden_states', 'return_dict', 'dtype',
    'chunk_size_feed_forward', 'id2label', 'label2id', 'problem_type',
    'initializer_range', 'use_cache', 'attention_dropout', 'pad_token_id',
    'bos_token_id', 'eos_token_id', 'max_window_layers'}
READ = {
    'vocab_size', 'hidden_size', 'num_hidden_layers', 'num_attention_heads',
    'num_key_value_heads', 'intermediate_size', 'head_dim', 'rms_norm_eps',
    'max_position_embeddings', 'tie_word_embeddings', 'rope_parameters',
    'attention_bias', 'mlp_bias', 'layer_types', 'architectures'}


@pytest.mark.parametrize('name,theirs', [
    ('qwen2', 'Qwen2Config'), ('qwen3', 'Qwen3Config'),
    ('llama', 'LlamaConfig')])
def test_every_entry_of_transformers_is_read_refused_or_harmless(name, theirs):
  import transformers
  fields = {field.name
            for field in dataclasses.fields(getattr(transformers, theirs))}
  known = READ | HARMLESS | set(_configs._NEUTRAL)
  # Qwen's window counts when use_sliding_window says so.
  known |= {'sliding_window'} if name != 'llama' else set()
  assert fields - known == set()


@pytest.mark.parametrize('content', [
    b'{"model_type": "qwen2"', b'[1, 2]', b'\xff\xfe',
    b'{"a":' * 10000, b'{"vocab_size": ' + b'9' * 5000 + b'}'])
def test_a_broken_config_is_refused(folder, content):
  path = folder('qwen2')
  pathlib.Path(path, 'config.json').write_bytes(content)
  with pytest.raises(ValueError, match='config.json'):
    qwen2.make(path)


@pytest.mark.parametrize('settings,named', [
    ({'dtype': 'float16'}, r"model.dtype 'float16': expected one of"),
    ({'param_dtype': 'int8'}, r"model.param_dtype 'int8': expected one of")])
def test_dtypes_are_float32_or_bfloat16(settings, named):
  with pytest.raises(ValueError, match=named):
    qwen2.make('tiny_reasoner', **settings)
