# SPDX-License-Identifier: Apache-2.0
"""A run's newest policy as a folder: whole, complete, and read by others."""

import json
import pathlib
import shutil
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lapo_jax import checkpoint, export, sampling, tokenizer, types
from lapo_jax.models import qwen2


def params_of(folder):
  return qwen2.load(str(folder), qwen2.make(str(folder)))


def write_checkpoint(workdir, stage, step, params):
  """A checkpoint as a run saves it."""
  scalar = lambda: jnp.int32(step)
  optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
  params = jax.tree.map(jnp.asarray, params)
  names = {field: scalar() for field in ('step', 'stage', 'nonfinite')}
  state = types.TrainState(params=params, opt_state=optimizer.init(params),
                           reward_state={'median': jnp.zeros(3)}, **names)
  checkpoint.save(workdir / 'checkpoints' / str(stage), step, state, {})


@pytest.fixture
def run(tmp_path, model_folder):
  """(workdir, the newest parameters): three checkpoints over two stages."""
  workdir = tmp_path / 'run'
  workdir.mkdir()
  (workdir / 'config.json').write_text(json.dumps({
      'model': {'name': 'qwen2', 'path': model_folder, 'dtype': 'float32'},
      'updates': {'scan_layers': False},
      'task': {'name': 'gone', 'path': '/nowhere'}}))
  params = params_of(model_folder)
  scaled = lambda factor: jax.tree.map(lambda x: factor * x, params)
  write_checkpoint(workdir, 0, 3, scaled(0.5))
  write_checkpoint(workdir, 1, 4, scaled(2.0))
  write_checkpoint(workdir, 1, 5, scaled(4.0))
  return workdir, scaled(4.0)


def test_the_newest_policy_comes_out_with_all_that_a_folder_needs(
    run, tmp_path, model_folder):
  workdir, newest = run
  out = export.export(str(workdir), str(tmp_path / 'out'))
  assert out == tmp_path / 'out'
  jax.tree.map(np.testing.assert_array_equal, params_of(out), newest)
  source = pathlib.Path(model_folder)
  there = {file.name for file in out.iterdir()}
  assert there == {file.name for file in source.iterdir()}
  for name in there - {'model.safetensors'}:
    assert (out / name).read_bytes() == (source / name).read_bytes(), name
  assert {file.name for file in tmp_path.iterdir()} == {'run', 'out'}


def test_transformers_loads_what_comes_out_and_writes_our_tokens(
    run, tmp_path):
  torch = pytest.importorskip('torch', reason='another reader needs torch')
  import transformers
  out = export.export(run[0], tmp_path / 'out')
  ids = tokenizer.load(out).encode(['7 + 5 = <think>'])
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        str(out), dtype=torch.float32).eval()
    reader = transformers.AutoTokenizer.from_pretrained(str(out))
    assert reader(['7 + 5 = <think>'])['input_ids'] == ids
    decoded = theirs.generate(
        torch.tensor(ids), max_new_tokens=16, do_sample=False,
        eos_token_id=0, pad_token_id=0)
  model = qwen2.make(str(out))
  sample = sampling.make_sample_fn(model, group_size=1, eos_ids=[0], pad_id=0,
                                   max_completion_length=16)
  tokens = jnp.asarray(ids, jnp.int32)
  rollout = sample(jax.tree.map(jnp.asarray, params_of(out)), types.Prompts(
      tokens=tokens, mask=tokens >= 0, index=jnp.arange(1),
      target_lengths=jnp.zeros(1, jnp.int32)), jax.random.key(0),
      jnp.float32(0.0))
  ours = np.asarray(rollout.completion_tokens)[:, :decoded.shape[1] - len(
      ids[0])]
  np.testing.assert_array_equal(ours, decoded[:, len(ids[0]):].numpy())


def test_a_damaged_checkpoint_is_passed_over(run, tmp_path):
  workdir, newest = run
  for part in (workdir / 'checkpoints' / '1').glob('*-step-5/state/**/d/*'):
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 0xFF
    part.write_bytes(content)
  out = export.export(workdir, tmp_path / 'out')
  jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y / 2),
               params_of(out), newest)


def test_an_empty_folder_is_filled_and_a_full_one_is_not(run, tmp_path):
  out = tmp_path / 'out'
  out.mkdir()
  assert export.export(run[0], out) == out
  before = {file: file.read_bytes() for file in out.iterdir()}
  with pytest.raises(ValueError, match='holds something'):
    export.export(run[0], out)
  assert before == {file: file.read_bytes() for file in out.iterdir()}


@pytest.mark.parametrize('spoil,said', [
    (lambda run: shutil.rmtree(run), 'Give the --workdir of a run'),
    (lambda run: (run / 'config.json').write_text('{"a": 1}'),
     'expected the config of a run'),
    (lambda run: (run / 'config.json').write_text('nonsense'),
     'expected the config of a run'),
    (lambda run: shutil.rmtree(run / 'checkpoints'), 'got no checkpoint'),
    (lambda run: (run / 'config.json').write_text(json.dumps(
        {'model': {'name': 'qwen2', 'path': '/nowhere'},
         'updates': {'scan_layers': False}})), "'/nowhere'"),
    (lambda run: (run / 'config.json').write_text(json.dumps(
        {'model': {'name': 'qwen2', 'path': 'tiny_reasoner'},
         'updates': {'scan_layers': False}})),
     'is of another model'),
])
def test_what_cannot_be_exported_is_told_in_one_line(run, tmp_path, spoil,
                                                     said):
  spoil(run[0])
  with pytest.raises(ValueError, match=said) as caught:
    export.export(run[0], tmp_path / 'out')
  assert '\n' not in str(caught.value)
  assert not (tmp_path / 'out').exists()
