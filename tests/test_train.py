# SPDX-License-Identifier: Apache-2.0
"""Whole runs of a tiny config: what they write, and that no kill is seen.

`toys.config` runs the real loop through both LAPO stages over a model of a few
thousand weights. In this process it has eight devices, in others one.
"""

import contextlib
import importlib.util
import itertools
import json
import logging
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import time

from etils import epath
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import config as toy_config

from lapo_jax import build, checkpoint, export, stages, train
from lapo_jax.models import qwen2

_ROOT = pathlib.Path(__file__).parent.parent
_GSM8K = _ROOT / '..' / 'shared' / 'data' / 'gsm8k_train.jsonl'
STEPS = 4  # of each of two stages


@pytest.fixture(scope='module', autouse=True)
def cache(compile_cache):
  """Every run here compiles the same few programs."""
  return compile_cache


@pytest.fixture
def make_config(model_folder):
  return lambda argument='', **overrides: _config(model_folder, argument,
                                                  overrides)


def _config(model_folder, argument='', overrides=None):
  config = toy_config.get_config(argument)
  config.model.path = model_folder
  config.lock()
  config.update_from_flattened_dict(
      {key.replace('__', '.'): value
       for key, value in (overrides or {}).items()})
  return config


@pytest.fixture(scope='module')
def straight(tmp_path_factory, model_folder):
  """The folder of an uninterrupted run on eight devices."""
  folder = tmp_path_factory.mktemp('straight') / 'run'
  train.train_and_evaluate(_config(model_folder), str(folder))
  return folder


def lines(folder, name='metrics'):
  return [json.loads(line) for line in
          (folder / f'{name}.jsonl').read_text().splitlines()]


def timeless(records):
  """Without what the clock says."""
  return [{key: value for key, value in record.items()
           if not key.startswith('time/')} for record in records]


def summary(folder):
  return json.loads((folder / 'summary.json').read_text())


def fingerprints(folder, stage=1):
  """Of all arrays of the newest checkpoint: parameters, moments, memory."""
  newest = sorted((folder / 'checkpoints' / str(stage)).iterdir())[-1]
  record = checkpoint._read_record(epath.Path(newest))
  return newest.name.partition('-')[2], record['leaves']


def test_the_summary_is_as_promised(straight):
  found = summary(straight)
  assert found.keys() == {'stages', 'seconds'} and found['seconds'] > 0
  assert [(s['name'], s['steps']) for s in found['stages']] == [
      ('base', 0), ('discovery', STEPS), ('internalisation', 2 * STEPS)]
  for stage in found['stages']:
    assert stage.keys() == {'name', 'steps', 'accuracy', 'mean_tokens',
                            'truncated', 'by_level'}
    assert sorted(stage['by_level']) == ['1', '2', '3']
    for level in (stage, *stage['by_level'].values()):
      assert {'accuracy', 'mean_tokens'} <= level.keys()
      assert 0 <= level['accuracy'] <= 1 <= level['mean_tokens'] <= 16
  assert (straight / 'summary.png').read_bytes().startswith(b'\x89PNG')
  assert list((straight / 'tensorboard').iterdir())
  assert json.loads((straight / 'config.json').read_text())['seed'] == 0


def test_metrics_by_name(straight):
  records = lines(straight)
  steps = [r for r in records if 'update/loss' in r]
  assert [r['step'] for r in steps] == list(range(2 * STEPS))
  assert [r['stage'] for r in steps] == (
      ['discovery'] * STEPS + ['internalisation'] * STEPS)
  for record in steps:
    assert {'reward/correct', 'reward/length', 'reward/total', 'length/mean',
            'length/p90', 'outcome/correct', 'outcome/truncated',
            'advantage/zero_groups', 'policy/entropy', 'policy/clip_fraction',
            'policy/kl', 'policy/sampler_kl', 'policy/sampler_ratio_mean',
            'policy/sampler_ratio_max', 'policy/sampler_ratio_outside',
            'update/loss', 'update/grad_norm',
            'update/nonfinite'} <= record.keys()
    assert {f'time/{name}' for name in (
        'prompts', 'sample', 'grade', 'score', 'update')} <= record.keys()
    assert all(np.isfinite(value) for value in record.values()
               if not isinstance(value, str))
    # Sampling and scoring are one policy.
    assert record['policy/sampler_kl'] < 1e-6
    assert record['policy/sampler_ratio_mean'] == pytest.approx(1, abs=1e-3)
    assert record['policy/sampler_ratio_max'] == pytest.approx(1, abs=1e-2)
    assert record['policy/sampler_ratio_outside'] == 0
    assert record['update/grad_norm'] > 0
  assert all(r['policy/kl'] == 0 for r in steps[:STEPS])
  assert steps[-1]['policy/kl'] > 0


def test_held_out_problems_are_tried_at_every_stage_and_between(straight):
  evals = [r for r in lines(straight) if 'eval/toys.task/accuracy' in r]
  # Stage ends count completed steps; in between, after the step they name.
  assert [(r['step'], r['stage']) for r in evals] == [
      (0, 'discovery'), (1, 'discovery'), (4, 'discovery'),
      (5, 'internalisation'), (8, 'internalisation')]
  ends = [r for r in evals if r['step'] % STEPS == 0]
  for record, stage in zip(ends, summary(straight)['stages'], strict=True):
    for ours, theirs in (('accuracy', 'accuracy'), ('length', 'mean_tokens'),
                         ('truncated', 'truncated')):
      assert record[f'eval/toys.task/{ours}'] == stage[theirs]
    assert (record['eval/toys.task/accuracy/2'] ==
            stage['by_level']['2']['accuracy'])


def test_samples_show_prompt_completion_and_verdict(straight):
  rows = lines(straight, 'samples')
  assert {row['step'] for row in rows} == {0, 2, 5}
  for row in rows:
    assert row['prompt'].startswith('train ')
    assert row['verdict'] in ('correct', 'wrong', 'truncated')
    assert isinstance(row['completion'], str) and row['gold'].isdigit()
    assert (row['reward'] > 0) == (row['verdict'] == 'correct')
  assert all('I will answer the question with' in row['prompt']
             for row in rows if row['stage'] == 'internalisation')


def test_a_held_out_completion_may_be_longer_than_those_of_training(
    make_config, caplog):
  """Slots are counted for the longer, and nothing is forced on it."""
  config = make_config(rollout__forced__first='a', rollout__forced__end='b',
                       rollout__forced__wait='c')
  slots = lambda: int(re.findall(r'once; (\d+) fit', caplog.text)[-1])
  with caplog.at_level(logging.INFO, logger='absl'):
    build.build('short', config)
    few = slots()
    config.eval.max_completion_length = 1000
    run = build.build('long', config)
  assert few > 2 * slots()
  assert np.all(run.sample.keywords['forced'].most > 1000)


class Stop(Exception):
  """Stands for a process that ends."""


@pytest.fixture
def stop_after(monkeypatch):
  """Runs until the checkpoint of a step is written, and no further."""
  original = checkpoint.save

  def run(config, folder, last):
    def save(where, step, *rest):
      original(where, step, *rest)
      if step == last:
        raise Stop
    with monkeypatch.context() as patch:
      patch.setattr(stages.checkpoint, 'save', save)
      with pytest.raises(Stop):
        train.train_and_evaluate(config, str(folder))
  return run


def test_stop_and_resume_end_with_the_same_bits(straight, make_config,
                                                stop_after, tmp_path):
  for last in (2, STEPS, STEPS + 2):  # within, at and after the switch
    stop_after(make_config(), tmp_path, last)
  state = train.train_and_evaluate(make_config(), str(tmp_path))
  assert int(state.step) == 2 * STEPS and int(state.stage) == 1
  assert fingerprints(tmp_path) == fingerprints(straight)
  assert summary(tmp_path)['stages'] == summary(straight)['stages']
  assert timeless(lines(tmp_path)) == timeless(lines(straight))
  assert timeless(lines(tmp_path, 'samples')) == timeless(
      lines(straight, 'samples'))
  # Once more, with nothing left to do.
  train.train_and_evaluate(make_config(), str(tmp_path))
  assert fingerprints(tmp_path) == fingerprints(straight)
  assert timeless(lines(tmp_path)) == timeless(lines(straight))
  # A stage whose checkpoints are all damaged starts again.
  parts = list((tmp_path / 'checkpoints' / '1').glob('*/state/**/d/*'))
  assert parts
  for part in parts:
    part.write_bytes(b'')
  train.train_and_evaluate(make_config(), str(tmp_path))
  assert fingerprints(tmp_path) == fingerprints(straight)
  assert timeless(lines(tmp_path)) == timeless(lines(straight))
  # What the base reached cannot be found again: not with these parameters.
  (tmp_path / 'stages' / '0.json').write_text('{')
  with pytest.raises(checkpoint.DamagedError, match='stages/0.json: expected'):
    train.train_and_evaluate(make_config(), str(tmp_path))


def test_every_seed_stream_and_step_has_random_numbers_of_its_own():
  keys = {tuple(jax.random.key_data(build.key(*which)).tolist())
          for which in itertools.product((0, 1), build.STREAMS, (0, 1, 2))}
  assert len(keys) == 2 * len(build.STREAMS) * 3


def test_a_run_goes_on_with_what_changes_no_bit(
    straight, make_config, stop_after, tmp_path):
  stop_after(make_config(), tmp_path / 'run', 2)
  # Fewer rows at once, for other devices: the same but for rounding.
  other = make_config()
  size = other.updates.microbatch_size // 2
  train.prepare(make_config(updates__microbatch_size=size),
                str(tmp_path / 'run'))
  # Few slots, grading ahead, no evaluation on the way.
  train.train_and_evaluate(
      make_config(rollout__num_slots=8, rollout__grade_ahead=True,
                  eval_every=0), str(tmp_path / 'run'))
  assert fingerprints(tmp_path / 'run') == fingerprints(straight)
  with pytest.raises(ValueError, match='holds another run.*updates.num_epochs'):
    train.prepare(make_config(updates__num_epochs=2), str(tmp_path / 'run'))


def test_a_state_of_stacked_layers_stops_resumes_and_is_exported(
    straight, make_config, stop_after, model_folder, tmp_path):
  config = lambda: make_config(updates__scan_layers=True, updates__remat='full')
  folder = tmp_path / 'run'
  stop_after(config(), folder, 2)
  state = train.train_and_evaluate(config(), str(folder))
  assert 'layers' in state.params and 'layers_0' not in state.params
  for ours, theirs in zip(lines(folder), lines(straight), strict=True):
    assert ours.get('length/mean') == pytest.approx(theirs.get('length/mean'))
  # The same policy but for rounding, by layer again.
  out = export.export(folder, tmp_path / 'ours')
  other = export.export(straight, tmp_path / 'theirs')
  load = lambda place: qwen2.load(str(place), qwen2.make(str(place)))
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-4),
               load(out), load(other))
  with pytest.raises(ValueError, match='updates.scan_layers'):
    train.train_and_evaluate(make_config(), str(folder))


@pytest.mark.parametrize('key,value', [
    ('updates.scan_layers', True), ('mesh.tensor', 2),
    ('model.param_dtype', 'bfloat16')])
def test_stages_hold_parameters_alike(make_config, tmp_path, key, value):
  config = make_config()
  with config.unlocked():
    config.stages = ({}, {key: value})
  with pytest.raises(ValueError, match=r'stages\[1\]: .*set it for all'):
    train.prepare(config, str(tmp_path / 'run'))


@pytest.mark.parametrize('names', [('a', 1), ('a', 'a'), ('a', '')])
def test_every_stage_has_a_name_of_its_own(make_config, names):
  config = make_config()
  with config.unlocked():
    config.stages = tuple({'name': name} for name in names)
  with pytest.raises(ValueError, match=r'stages\[1\]: got the name'):
    build.stage_configs(config)


def test_what_is_free_is_free_in_a_stage(make_config, tmp_path):

  def prepare(**settings):
    config = make_config()
    with config.unlocked():
      config.stages = ({'name': 'one'}, {'name': 'two', **settings})
    train.prepare(config, str(tmp_path))

  prepare(**{'rollout.num_slots': 8})
  prepare(**{'rollout.num_slots': 16, 'updates.remat': 'full'})
  with pytest.raises(ValueError, match=r'run.*stages\[1\].loss.kl_coef: got 1'):
    prepare(**{'loss.kl_coef': 1.0})


def test_a_stage_start_is_new_but_for_policy_and_memory(make_config, tmp_path):
  """What internalisation states is M(q), which each group may lower."""
  cap = 16
  runs = train.prepare(make_config(), str(tmp_path))
  first, second = runs
  states, seen, told = [], {}, []

  def update(state, batch):
    states.append(jax.device_get(state))
    return second.update(state, batch)

  def encode(examples, indices):
    told.append([(int(i), e.target_length, e.prefill)
                 for i, e in zip(indices, examples, strict=True)])
    return second.encode(examples, indices)

  def replicate(tree):
    if hasattr(tree, 'correct'):
      seen[len(told) - 1] = jax.device_get(vars(tree))
    return second.replicate(tree)

  memory = {}

  def init_opt_state(params):
    memory['params'] = jax.device_get(params)
    return second.init_opt_state(params)

  spied = second._replace(update=update, encode=encode, replicate=replicate,
                          init_opt_state=init_opt_state)
  end = train.train([first, spied], str(tmp_path))

  # The optimizer starts from nothing, the policy from where it was.
  assert all(not np.any(leaf) for leaf in jax.tree.leaves(states[0].opt_state))
  assert any(np.any(leaf) for leaf in jax.tree.leaves(states[1].opt_state))
  jax.tree.map(np.testing.assert_array_equal, states[0].params,
               memory['params'])
  assert int(states[0].step) == STEPS and int(states[0].stage) == 1

  # The table, followed by hand from what discovery left.
  table = np.array(states[0].reward_state['target'])
  assert (table < cap).any()  # it passed on
  lowered = 0
  for step, group in enumerate(told):
    outcome = seen[step]
    for p, (index, target, prefill) in enumerate(group):
      assert target == int(table[index])
      assert prefill == f' I will answer the question with {target} tokens.'
      good = outcome['lengths'][p][outcome['correct'][p] > 0.5]
      if len(good):
        found = np.median(good)
        lowered += found < table[index] < cap
        table[index] = (found if table[index] >= cap
                        else min(found, table[index]))
  assert lowered
  np.testing.assert_allclose(end.reward_state['target'], table)


def test_a_memory_passes_to_the_same_method_alone(make_config, tmp_path):
  # Visits of each problem are as many numbers as shortest lengths.
  config = make_config('accuracy')
  with config.unlocked():
    config.stages = tuple({'reward.name': name}
                          for name in ('e1', 'e1', 'exp_think'))
  runs = train.prepare(config, str(tmp_path))
  _, state, _ = stages.resume(runs, tmp_path)
  visits = state.reward_state + 5
  state = stages.begin(runs, 1, state.replace(reward_state=visits))
  np.testing.assert_array_equal(state.reward_state, visits)
  state = stages.begin(runs, 2, state)
  np.testing.assert_array_equal(state.reward_state,
                                runs[2].reward.init(len(runs[2].task)))


@pytest.fixture
def poison(monkeypatch):
  """Advantages of these steps, counted from 0, are not numbers."""
  def apply(steps):
    from_rewards, calls = train.advantages_lib.from_rewards, []

    def poisoned(*args, **kwargs):
      calls.append(0)
      found = from_rewards(*args, **kwargs)
      return found * jnp.nan if len(calls) - 1 in steps else found

    monkeypatch.setattr(train.advantages_lib, 'from_rewards', poisoned)
  return apply


def test_a_nonfinite_update_is_skipped_and_the_third_in_a_row_stops(
    make_config, tmp_path, poison):
  poison({1, 2, 4, 5, 6})
  [run] = train.prepare(make_config('accuracy', total_steps=9), str(tmp_path))
  trained = []

  def update(state, batch):
    before = checkpoint.fingerprint((state.params, state.opt_state))
    state, metrics = run.update(state, batch)
    after = checkpoint.fingerprint((state.params, state.opt_state))
    trained.append(before != after)
    return state, metrics

  with pytest.raises(train.TrainingError, match=r'step 6.*3 times in a row'):
    train.train([run._replace(update=update)], str(tmp_path))
  assert trained == [True, False, False, True, False, False, False]
  steps = [r for r in lines(tmp_path) if 'update/loss' in r]
  assert [r['update/nonfinite'] for r in steps] == [0, 1, 2, 0, 1, 2]
  assert steps[1]['update/loss'] is None  # JSON has no NaN
  assert not (tmp_path / 'summary.json').exists()


@contextlib.contextmanager
def log():
  """What the run says through absl's logger."""
  said = []
  handler = logging.Handler()
  handler.emit = lambda record: said.append(record.getMessage())
  logger = logging.getLogger('absl')
  level = logger.level
  logger.addHandler(handler)
  logger.setLevel(logging.INFO)
  try:
    yield said
  finally:
    logger.removeHandler(handler)
    logger.setLevel(level)


def test_a_model_that_solves_nothing_is_told_so(make_config, tmp_path):
  if _GSM8K.exists():
    rows = _GSM8K.read_text().splitlines()[:40]
  else:
    rows = [json.dumps({'question': f'Ann has {i} pens and buys one. How many?',
                        'answer': f'#### {i + 1}'}) for i in range(40)]
  path = tmp_path / 'gsm8k.jsonl'
  path.write_text('\n'.join(rows))
  config = make_config(
      'task=gsm8k', task__path=str(path), total_steps=1,
      rollout__max_prompt_length=1024, rollout__template='chat')
  config.stages = ()
  with log() as said:
    train.train_and_evaluate(config, str(tmp_path / 'run'))
  said = '\n'.join(said)
  assert 'No completion of this step was correct (0 of 32)' in said
  # The last nine are held out, the others trained on.
  asked = [json.loads(row)['question'] for row in rows[:-9]]
  shown = lines(tmp_path / 'run', 'samples')
  assert len(shown) == 4 and all(row['completion'] for row in shown)
  assert {row['verdict'] for row in shown} <= {'wrong', 'unparsed', 'truncated'}
  assert all(row['prompt'] in asked for row in shown)
  [record] = [r for r in lines(tmp_path / 'run') if 'update/loss' in r]
  assert record['outcome/correct'] == 0
  assert record['advantage/zero_groups'] == 1
  stages = summary(tmp_path / 'run')['stages']
  assert [s['accuracy'] for s in stages] == [0, 0]
  assert all(s['by_level'] == {} for s in stages)


def command(model_folder, folder):
  """The command line of a run, with a checkpoint each step."""
  return [sys.executable, '-m', 'lapo_jax.main',
          '--config=tests/toys/config.py', f'--workdir={folder}',
          f'--config.model.path={model_folder}', '--config.checkpoint_every=1']


def environment(cache):
  paths = [str(_ROOT / 'tests'), os.environ.get('PYTHONPATH', '')]
  return {**os.environ, **cache, 'JAX_NUM_CPU_DEVICES': '1',
          'PYTHONPATH': os.pathsep.join(filter(None, paths))}


@pytest.fixture(scope='module')
def alone(tmp_path_factory, model_folder, cache):
  """The folder of an uninterrupted process with one device, and its output."""
  folder = tmp_path_factory.mktemp('alone') / 'run'
  done = subprocess.run(command(model_folder, folder), cwd=_ROOT,
                        env=environment(cache), capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  return folder, done


def test_one_device_and_eight_give_the_same_metrics(straight, alone):
  assert len(jax.devices()) == 8
  one, eight = timeless(lines(alone[0])), timeless(lines(straight))
  assert len(one) == len(eight)
  for ours, theirs in zip(eight, one, strict=True):
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
      if isinstance(value, str):
        assert value == theirs[name]
      elif name.startswith(('update/', 'policy/')):
        assert value == pytest.approx(theirs[name], rel=1e-3, abs=2e-6), name
      else:
        assert value == pytest.approx(theirs[name], rel=1e-6), name
  for ours, theirs in zip(summary(straight)['stages'],
                          summary(alone[0])['stages'], strict=True):
    levels = [stage.pop('by_level') for stage in (ours, theirs)]
    assert ours == pytest.approx(theirs)
    for level in levels[0]:
      assert levels[0][level] == pytest.approx(levels[1][level])


def test_the_command_ends_with_a_table(alone):
  folder, done = alone
  table = done.stdout.splitlines()
  assert table[0].split()[:3] == ['stage', 'steps', 'accuracy']
  assert [row.split()[0] for row in table[1:4]] == [
      'base', 'discovery', 'internalisation']
  assert str(folder / 'summary.json') in table[-1]
  assert 'Traceback' not in done.stderr
  assert 'Unable to initialize backend' not in done.stderr


def _saving(folder):
  """A save is half done: Orbax writes into a folder of another name."""
  return any('tmp' in path.name for stage in folder.glob('checkpoints/*')
             for path in stage.iterdir())


def _steps(folder):
  file = folder / 'metrics.jsonl'
  return file.read_bytes().count(b'\n') if file.exists() else 0


def _kill(process, folder, moment, rng):
  """Kills the process at its moment; False if it had ended before."""
  kind, _, place = moment.partition(' ')
  before = _steps(folder)
  started = time.monotonic()
  while process.poll() is None:
    if kind == 'start' and time.monotonic() > started + rng.uniform(0.5, 4):
      break
    if kind == 'file' and (folder / place).exists():
      break
    if kind == 'save' and _saving(folder):
      time.sleep(rng.uniform(0, 0.02))
      break
    if kind == 'step' and _steps(folder) > before:
      time.sleep(rng.uniform(0, 0.3))
      break
    time.sleep(0.001)
  alive = process.poll() is None
  # Its grading workers are sessions of their own and end with its pipes.
  with contextlib.suppress(ProcessLookupError):
    os.kill(process.pid, signal.SIGKILL)
  process.wait()
  return alive


@pytest.mark.parametrize('seed', [0])
def test_no_kill_is_seen_in_the_result(alone, model_folder, cache, tmp_path,
                                       seed):
  rng = random.Random(seed)
  moments = ['file stages/0.json', 'save', 'start', 'step', 'save',
             'file stages/1.json', 'save', 'start', 'step', 'save', 'step',
             'file stages/2.json']
  kills, halves = 0, 0
  for moment in moments:
    with (tmp_path / 'err').open('wb') as errors:
      process = subprocess.Popen(
          command(model_folder, tmp_path / 'run'), cwd=_ROOT,
          env=environment(cache), stdout=errors, stderr=errors)
      kills += _kill(process, tmp_path / 'run', moment, rng)
    halves += _saving(tmp_path / 'run')
    said = (tmp_path / 'err').read_text()
    assert 'Traceback' not in said, said
  assert kills >= 10
  assert halves >= 2  # some did hit a save
  done = subprocess.run(command(model_folder, tmp_path / 'run'), cwd=_ROOT,
                        env=environment(cache), capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  folder, killed = alone[0], tmp_path / 'run'
  assert fingerprints(killed)[1] == fingerprints(folder)[1]
  assert fingerprints(killed)[0] == f'step-{2 * STEPS}'
  assert summary(killed)['stages'] == summary(folder)['stages']
  assert timeless(lines(killed)) == timeless(lines(folder))
  assert timeless(lines(killed, 'samples')) == timeless(
      lines(folder, 'samples'))
  assert not _saving(killed)


@pytest.mark.slow
def test_the_embedded_default_end_to_end(tmp_path):
  if not (_ROOT / 'lapo_jax/assets/tiny_reasoner/config.json').exists():
    pytest.skip('no embedded model yet')
  spec = importlib.util.spec_from_file_location(
      'tiny', _ROOT / 'configs' / 'tiny.py')
  tiny = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(tiny)
  config = tiny.get_config()
  config.total_steps = 2
  config.rollout.update(num_prompts=8, max_completion_length=64)
  config.eval.update(num_examples=24, batch_size=24)
  train.train_and_evaluate(config, str(tmp_path))
  assert summary(tmp_path)['stages'][0]['accuracy'] > 0


