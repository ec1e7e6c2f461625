# SPDX-License-Identifier: Apache-2.0
"""A user's mistake costs one line and nothing else.

Each is tried on the real command, in this process; nothing may be computed
and nothing written.
"""

import json
import os
import pathlib
import shutil
import subprocess
import sys

from absl import flags, logging
import jax
import numpy as np
import pytest
import safetensors.numpy

from lapo_jax import draws, main, train

_ROOT = pathlib.Path(__file__).parent.parent


def forget():
  """A new process knows no flags of an earlier call."""
  flags.FLAGS.unparse_flags()
  for name in list(flags.FLAGS):
    if name.startswith('config.'):
      delattr(flags.FLAGS, name)
  for name in ('config', 'workdir'):
    flags.FLAGS[name].unparse()


@pytest.fixture(autouse=True)
def restore(compile_cache, monkeypatch):
  """Flags and verbosity are the process's: as they were, for others."""
  for name, value in compile_cache.items():  # a user may have set them
    monkeypatch.setenv(name, value)
  level = logging.get_verbosity()
  yield
  forget()
  logging.set_verbosity(level)


@pytest.fixture
def call(monkeypatch, capsys, tmp_path, model_folder):
  """Runs the command; returns its status and what it printed to stderr."""
  def run(*arguments, config='tests/toys/config.py', model=model_folder,
          workdir=tmp_path / 'run'):
    forget()
    argv = ['lapo_jax', f'--config={config}', f'--workdir={workdir}']
    if model:
      argv.append(f'--config.model.path={model}')
    monkeypatch.setattr(sys, 'argv', [*argv, *arguments])
    monkeypatch.chdir(_ROOT)
    with pytest.raises(SystemExit) as stop:
      main.run()
    return stop.value.code, capsys.readouterr().err
  return run


@pytest.fixture
def refused(call, monkeypatch, tmp_path):
  """What the one line says, all in order; nothing was computed or written."""
  def compute(*args, **kwargs):
    raise AssertionError('something was computed')

  def run(*arguments, **kwargs):
    before = sorted(tmp_path.rglob('*'))
    with monkeypatch.context() as patch:
      patch.setattr(train, 'train', compute)
      code, said = call(*arguments, **kwargs)
    assert code == 2
    assert said.startswith('lapo_jax: ') and said.count('\n') == 1, said
    assert 'Traceback' not in said and len(said) < 1500
    assert sorted(tmp_path.rglob('*')) == before
    return said
  return run


def test_no_config_or_workdir(monkeypatch, capsys):
  for argv in (['x'], ['x', '--config=tests/toys/config.py'],
               ['x', '--workdir=/tmp/y']):
    forget()
    monkeypatch.chdir(_ROOT)
    monkeypatch.setattr(sys, 'argv', argv)
    with pytest.raises(SystemExit) as stop:
      main.run()
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count('\n') == 1
    assert '--config=configs/tiny.py --workdir=runs/tiny' in said


@pytest.mark.parametrize('mistake, hint', [
    ('--config.rollout.num_promptz=3', 'num_prompts'),
    ('--config.optimiser.learning_rate=1', 'optimizer'),
    ('--config.reward.alhpa=1', 'alpha'),
    ('--config.reward.name=accuracy --config.reward.alpha=1', 'alpha'),
])
def test_a_mistyped_key(refused, mistake, hint):
  said = refused(*mistake.split())
  key = mistake.rpartition('--config.')[2].partition('=')[0]
  assert key.rpartition('.')[2] in said or key.partition('.')[0] in said
  assert hint in said


@pytest.mark.parametrize('value', ['many', '1.5', ''])
def test_a_value_of_another_type(refused, value):
  said = refused(f'--config.rollout.num_prompts={value}')
  assert 'num_prompts' in said or 'integer' in said or 'int' in said


def test_a_mistyped_key_in_a_file_of_ones_own(refused, tmp_path, monkeypatch):
  monkeypatch.setattr(sys, 'dont_write_bytecode', True)
  file = tmp_path / 'mine.py'
  file.write_text('from configs import default\n\n'
                  'def get_config():\n  config = default.get_config()\n'
                  '  config.rollout.tempertaure = 0.3\n  return config\n')
  assert 'tempertaure' in refused(config=file)


def test_a_config_of_the_other_mode(refused):
  assert '--config is for --mode=train' in refused('--mode=eval')
  assert '--config is for --mode=eval' in refused(
      config='configs/benchmarks.py', model=None)


@pytest.mark.parametrize('workdir', ['gs://bucket/run', 's3://bucket/run'])
def test_a_workdir_is_a_folder(refused, workdir):
  assert 'where the bucket is mounted' in refused(workdir=workdir)


def test_help_is_given(monkeypatch, capsys):
  monkeypatch.setattr(sys, 'argv', ['lapo_jax', '--help'])
  main.run()
  said = capsys.readouterr().out
  assert '--config=configs/tiny.py --workdir=runs/tiny' in said


def test_ctrl_c_is_answered_with_a_line(call, monkeypatch):
  def interrupted(*args):
    raise KeyboardInterrupt
  with monkeypatch.context() as patch:
    patch.setattr(train, 'train', interrupted)
    code, said = call()
  assert code == 130
  assert said.splitlines()[-1] == ('lapo_jax: interrupted; the same command '
                                   'goes on from what is saved.')


def test_an_unknown_flag(refused):
  assert 'workdri' in refused('--workdri=x')


def test_what_is_no_flag(refused):
  said = refused('config.seed=3', 'run')
  assert 'got config.seed=3 run: expected flags' in said


@pytest.mark.parametrize('mode', ['train', 'eval'])
def test_a_stop_token_that_the_model_lacks(refused, model_folder, tmp_path,
                                           mode):
  folder = shutil.copytree(model_folder, tmp_path / 'model')
  (folder / 'generation_config.json').write_text('{"eos_token_id": [1, 9999]}')
  flags = {'eval': {'config': 'configs/benchmarks.py'}}.get(mode, {})
  said = refused(f'--mode={mode}', model=folder, **flags)
  assert '[9999] are none of the model' in said
  (folder / 'generation_config.json').write_text('{"eos_token_id": true}')
  assert 'eos_token_id is True' in refused(f'--mode={mode}', model=folder,
                                           **flags)


def test_a_folder_of_a_run_of_another_model(call, refused, model_folder,
                                            tmp_path, monkeypatch):
  folder = shutil.copytree(model_folder, tmp_path / 'model')
  with monkeypatch.context() as patch:
    patch.setattr(train, 'train', lambda runs, workdir: None)
    assert call(model=folder)[0] in (0, None)
    assert call(model=folder)[0] in (0, None)
  file, = folder.glob('*.safetensors')
  weights = bytearray(file.read_bytes())
  weights[-1] ^= 1
  file.write_bytes(weights)
  assert 'by its model.json: fingerprint' in refused(model=folder)


def test_a_config_file_that_is_not_there(refused):
  assert 'configs/tny.py' in refused(config='configs/tny.py')


@pytest.mark.parametrize('setting, got, legal', [
    ('rollout.num_prompts=12', 'num_prompts 12', ['8 devices', '8 or 16']),
    ('rollout.num_prompts=4', 'num_prompts 4', ['such as 8 or 16']),
    ('eval.batch_size=10', 'batch_size 10', ['8 or 16']),
    ('updates.microbatch_size=3', 'microbatch_size 3', ['[8, 16, 32]']),
    ('updates.microbatch_size=64', 'microbatch_size 64', ['[8, 16, 32]']),
    ('updates.num_minibatches=3', 'num_minibatches 3', ['divisor of 4']),
    ('rollout.group_size=1', 'group_size 1', ['at least 2']),
    ('mesh.tensor=3', "'tensor': 3", ['8 devices']),
    ('rollout.num_prompts=24', 'num_prompts 24', ['18']),
    ('loss.importance_cap=-1', 'importance_cap -1', ['at least 0']),
    ('loss.importance_cap=nan', 'importance_cap nan', ['at least 0']),
])
def test_numbers_that_do_not_fit(refused, setting, got, legal):
  said = refused(f'--config.{setting}')
  for text in (got, *legal):
    assert text in said, said


def test_a_prompt_longer_than_its_slots(refused):
  said = refused('--config.rollout.max_prompt_length=10')
  assert 'has 11 tokens' in said and 'hold 10' in said
  assert 'rollout.max_prompt_length' in said
  # The sentence of the second stage counts too.
  assert 'tokens, the slots hold 40' in refused(
      '--config.rollout.max_prompt_length=40')


@pytest.mark.parametrize('flag, known', [
    ('--config.reward.name=lappo', ['lappo', 'accuracy', 'lapo']),
    ('--config.model.name=qwen', ["'qwen'", 'qwen2']),
    ('--config.task.name=gsm', ["'gsm'", 'arithmetic', 'gsm8k']),
    ('--config.reward.name=no_lab.reward', ['no_lab.reward', 'lapo']),
])
def test_an_unknown_name_is_answered_with_the_known(refused, flag, known):
  said = refused(flag)
  assert all(text in said for text in known)


@pytest.mark.parametrize('body', ['import jax\njax.nothing_here',
                                  'import os\n{}["abc"]'])
def test_a_mistake_in_ones_own_file_is_told_with_its_place(
    refused, tmp_path_factory, monkeypatch, body):
  folder = tmp_path_factory.mktemp('lab')
  (folder / 'own_lab').mkdir()
  (folder / 'own_lab' / 'mine.py').write_text(body)
  monkeypatch.syspath_prepend(str(folder))
  said = refused('--config.reward.name=own_lab.mine')
  assert 'mine.py:2' in said and 'no such key' not in said


@pytest.mark.parametrize('setting', [
    'advantage.baseline=median', 'advantage.scale=sd', 'advantage.whiten=all',
    'loss.aggregate=tokens', 'model.dtype=float16', 'reward.guidance=loud',
    'reward.statistic=mode'])
def test_an_unknown_choice_is_answered_with_the_known(refused, setting):
  said = refused(f'--config.{setting}')
  key, _, value = setting.partition('=')
  assert value in said and key.rpartition('.')[2] in said
  assert 'expected one of' in said


def test_a_template_without_its_place(refused):
  assert '{question}' in refused('--config.rollout.template=Q:')


def test_a_missing_model_folder(refused):
  said = refused(model='/no/such/model')
  assert '/no/such/model' in said and 'config.json' in said


def test_a_foreign_model_folder(refused, tmp_path, model_folder):
  folder = tmp_path / 'foreign'
  shutil.copytree(model_folder, folder)
  weights = folder / 'model.safetensors'
  tensors = safetensors.numpy.load_file(weights)
  tensors['model.layers.0.extra.weight'] = np.zeros(3, np.float32)
  del tensors['model.norm.weight']
  safetensors.numpy.save_file(tensors, weights)
  said = refused(model=folder)
  assert "missing ['model.norm.weight']" in said
  assert "unexpected ['model.layers.0.extra.weight']" in said

  weights.write_bytes(b'not tensors')
  assert 'safetensors' in refused(model=folder)
  weights.unlink()
  assert '*.safetensors' in refused(model=folder)

  config = json.loads((folder / 'config.json').read_text())
  (folder / 'config.json').write_text(json.dumps(
      {**config, 'model_type': 'gpt2'}))
  said = refused(model=folder)
  assert 'gpt2' in said and 'qwen2' in said
  (folder / 'config.json').write_text('{')
  assert 'config.json' in refused(model=folder)


def test_a_model_folder_without_tokenizer(refused, tmp_path, model_folder):
  folder = tmp_path / 'mute'
  shutil.copytree(model_folder, folder)
  (folder / 'generation_config.json').write_text('{"eos_token_id": "x"}')
  assert 'generation_config.json: expected' in refused(model=folder)
  (folder / 'tokenizer.json').write_text('{')
  assert 'tokenizer.json' in refused(model=folder)
  (folder / 'tokenizer.json').unlink()
  assert 'tokenizer.json' in refused(model=folder)


def test_a_config_that_lacks_a_size(refused, tmp_path, model_folder):
  folder = tmp_path / 'sizeless'
  shutil.copytree(model_folder, folder)
  config = json.loads((folder / 'config.json').read_text())
  del config['hidden_size']
  (folder / 'config.json').write_text(json.dumps(config))
  assert 'hidden_size' in refused(model=folder)


def test_another_runs_folder(refused, tmp_path):
  folder = tmp_path / 'run'
  folder.mkdir()
  (folder / 'config.json').write_text('{"seed": 1}')
  said = refused()  # of a version that knew other keys, say
  assert 'holds another run' in said and '--workdir' in said
  assert 'advantage.baseline: got mean' in said and ' more. ' in said


def test_another_run_differs_by_name(call, refused, tmp_path, monkeypatch):
  monkeypatch.setattr(train, 'train', lambda runs, workdir: None)
  assert call()[0] in (0, None)
  said = refused('--config.optimizer.learning_rate=0.5',
                 '--config.rollout.temperature=0.9')
  assert 'learning_rate' in said and '0.5' in said
  assert 'temperature' in said and '0.9' in said
  # Keys that change no number may change.
  assert call('--config.log_every=3', '--config.grader.num_workers=2')[0] in (
      0, None)


def test_a_folder_of_a_run_on_other_problems(call, refused, tmp_path,
                                             monkeypatch):
  monkeypatch.setattr(train, 'train', lambda runs, workdir: None)
  file = tmp_path / 'problems.jsonl'
  rows = [{'question': f'What is {n} + {n}?', 'answer': f'#### {2 * n}'}
          for n in range(1, 41)]
  write = lambda: file.write_text('\n'.join(map(json.dumps, rows)))
  flags = ('--config.task.name=gsm8k', f'--config.task.path={file}',
           '--config.eval.num_examples=8', '--config.eval.task={}')
  write()
  assert call(*flags, config='tests/toys/cut.py')[0] in (0, None)
  rows[3]['answer'] = '#### 9'
  write()
  said = refused(*flags, config='tests/toys/cut.py')
  assert 'holds another run, by its data.json' in said
  assert '.train.f' in said


def test_what_is_held_out_is_not_trained_on(call, tmp_path, monkeypatch):
  prepared = []
  monkeypatch.setattr(train, 'train', lambda runs, _: prepared.extend(runs))
  row = lambda n: {'question': f'What is {n} + {n}?', 'answer': f'#### {2 * n}'}
  for name, numbers in (('train', range(1, 41)), ('test', range(33, 50))):
    (tmp_path / f'{name}.jsonl').write_text(
        '\n'.join(json.dumps(row(n)) for n in numbers))
  flags = ('--config.task.name=gsm8k', '--config.eval.num_examples=8',
           f'--config.task.path={tmp_path / "train.jsonl"}')
  test = str(tmp_path / 'test.jsonl')
  (tmp_path / 'config.py').write_text(
      'from toys import config\n'
      'def get_config(argument=""):\n'
      '  found = config.get_config(argument)\n'
      f'  found.eval.task = {{"path": {test!r}}}\n'
      '  return found\n')
  assert call(*flags, config=tmp_path / 'config.py')[0] in (0, None)
  run = prepared[0]
  # Eight are in the test file, of which only eight others are evaluated.
  assert [run.task[i].answer for i in range(len(run.task))] == [
      str(2 * n) for n in range(1, 33)]
  assert len(run.eval_task) == 8
  data = json.loads((tmp_path / 'run' / 'data.json').read_text())
  assert data['discovery']['train']['problems'] == 32
  assert data['discovery']['train']['files'][0]['rows'] == 40


def test_a_folder_that_cannot_be_one(refused, tmp_path):
  (tmp_path / 'file').write_text('')
  assert str(tmp_path / 'file') in refused(workdir=tmp_path / 'file')
  (tmp_path / 'run').mkdir()
  (tmp_path / 'run' / 'config.json').write_text('{"seed"')
  assert 'config.json' in refused()


def test_too_many_held_out_problems(refused):
  # Without eval.task they are cut from the training problems.
  said = refused('--config.task.num_examples=9', '--config.eval.num_examples=9',
                 '--config.task.split=train', config='tests/toys/cut.py')
  assert 'eval.num_examples 9' in said and '9 problems' in said


def test_a_task_without_its_file(refused):
  said = refused('--config.task.name=gsm8k')
  assert '--config.task.path=' in said
  assert '/no/file' in refused('--config.task.name=gsm8k',
                               '--config.task.path=/no/file')


def test_training_that_breaks_down_says_so(call, monkeypatch):
  def train_(runs, workdir):
    raise train.TrainingError('step 7: not finite')
  monkeypatch.setattr(train, 'train', train_)
  code, said = call()
  assert code == 2
  assert said.splitlines()[-1] == 'lapo_jax: step 7: not finite'


def test_one_line_in_a_process_of_its_own(model_folder, tmp_path):
  # Nobody names a platform: JAX looks for them all, and keeps quiet about it.
  environment = {name: value for name, value in os.environ.items()
                 if name != 'JAX_PLATFORMS'}
  done = subprocess.run(
      [sys.executable, '-m', 'lapo_jax.main', '--config=configs/tiny.py',
       f'--workdir={tmp_path / "run"}', f'--config.model.path={model_folder}',
       '--config.rollout.group_size=1'],
      cwd=_ROOT, env=environment, capture_output=True, text=True)
  assert done.returncode == 2 and done.stdout == ''
  assert done.stderr.startswith('lapo_jax: rollout.group_size 1: expected')
  assert done.stderr.count('\n') == 1, done.stderr
  assert not (tmp_path / 'run').exists()


_COMPILES = """
import jax
from lapo_jax import main, train

found = []
jax.monitoring.register_event_listener(
    lambda event, **_: found.append(event.rpartition('/')[2]))

def work(runs, workdir):
  jax.jit(lambda x: 2 * x + 1)(3.0)
  print(found.count('cache_hits'), found.count('cache_misses'))

train.prepare = lambda config, workdir: []
train.train = work
main.run()
"""


def test_a_second_run_finds_the_programs_of_the_first(tmp_path):
  # No program is too quick or too small to be kept.
  environment = {
      **{name: value for name, value in os.environ.items()
         if name != 'JAX_COMPILATION_CACHE_DIR'},
      'XDG_CACHE_HOME': str(tmp_path / 'cache'),
      'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
      'JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES': '-1'}
  folder, kept = tmp_path / 'cache' / 'lapo_jax' / 'xla', []
  for turn in range(2):
    done = subprocess.run(
        [sys.executable, '-c', _COMPILES, '--config=tests/toys/config.py',
         f'--workdir={tmp_path / "run"}'],
        cwd=_ROOT, env={**environment, 'PYTHONPATH': str(_ROOT / 'tests')},
        capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    hits, misses = map(int, done.stdout.split())
    assert (hits > 0, misses > 0) == ((False, True), (True, False))[turn]
    assert done.stderr.count(str(folder)) == 1
    kept.append(sorted(file.name for file in folder.iterdir()))
  assert kept[0] == kept[1] and kept[0]


@pytest.fixture
def cache_is(monkeypatch):
  """Sets JAX's folder, and the two variables that name the user's cache."""
  names = ('jax_compilation_cache_dir',
           'jax_persistent_cache_min_compile_time_secs')
  old = {name: getattr(jax.config, name) for name in names}

  def change(folder, home, cache=''):
    jax.config.update('jax_compilation_cache_dir', folder)
    monkeypatch.setenv('HOME', str(home))
    monkeypatch.setenv('XDG_CACHE_HOME', str(cache))

  yield change
  for name, value in old.items():
    jax.config.update(name, value)


def test_where_compiled_programs_are_kept(cache_is, monkeypatch, tmp_path):
  home, cache, mine = (tmp_path / name for name in ('home', 'cache', 'mine'))
  for settings, folder in (
      ((None, home), home / '.cache' / 'lapo_jax' / 'xla'),
      ((None, home, cache), cache / 'lapo_jax' / 'xla'),
      ((str(mine), home, cache), mine)):
    cache_is(*settings)
    assert main._keep_programs() == (str(folder), None)
    assert jax.config.jax_compilation_cache_dir == str(folder)
    assert not list(folder.iterdir())
  shutil.rmtree(cache)
  cache_is('', home, cache)  # as JAX has it: nowhere
  assert main._keep_programs() == (None, None)
  assert jax.config.jax_compilation_cache_dir is None
  assert not cache.exists()
  # What takes less is compiled again, unless the user says otherwise.
  name = 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'
  for asked in ('5', None):
    jax.config.update(name.lower(), 5.0)
    monkeypatch.setenv(name, asked) if asked else monkeypatch.delenv(name)
    main._keep_programs()
    assert getattr(jax.config, name.lower()) == (5.0 if asked else 0.5)


def test_a_cache_that_cannot_be_written_stops_nothing(
    call, cache_is, monkeypatch, tmp_path):
  (tmp_path / 'file').write_text('')
  done, said = [], []
  monkeypatch.setattr(train, 'train', lambda *_: done.append(
      jax.config.jax_compilation_cache_dir))
  monkeypatch.setattr(logging, 'warning', lambda form, *arguments: said.append(
      form % arguments))
  for settings in ((str(tmp_path / 'file'), tmp_path),
                   (None, tmp_path / 'file')):
    cache_is(*settings)
    assert call()[0] in (0, None)
  assert done == [None, None]
  assert len(said) == 2
  assert all('not kept' in line and str(tmp_path / 'file') in line
             for line in said)


def test_nothing_is_sampled_before_the_checks(refused, monkeypatch):
  def sample(*args, **kwargs):
    raise AssertionError('sampled')
  monkeypatch.setattr(draws, 'draw', sample)
  monkeypatch.setattr(jax, 'block_until_ready', sample)
  refused('--config.rollout.max_prompt_length=11')
