# SPDX-License-Identifier: Apache-2.0
"""Every config builds, every key of it is read, its argument names plug-ins."""

import contextlib
import importlib
import json
import pathlib

import ml_collections
import pytest
from toys import config as toy_config

from lapo_jax import benchmark, build, main, plugins, train

_ROOT = pathlib.Path(__file__).parent.parent
_DATA = _ROOT.parent / 'shared' / 'data'
_CONFIGS = sorted(path.stem for path in (_ROOT / 'configs').glob('[a-z]*.py'))
_PAPER = {'lapo_r1_1p5b': 'DeepSeek-R1-Distill-Qwen-1.5B',
          'lapo_deepscaler_1p5b': 'DeepScaleR-1.5B-Preview',
          'lapo_r1_7b': 'DeepSeek-R1-Distill-Qwen-7B'}

needs_data = pytest.mark.skipif(
    not (_DATA / 'aime_train.json').exists(),
    reason='the real problem sets are not beside the repository')


def load(name, argument=''):
  return importlib.import_module(f'configs.{name}').get_config(argument)


@contextlib.contextmanager
def recorded(monkeypatch):
  """The keys of a config that are read meanwhile, by path.

  Copying and writing out are not reading; handing a plug-in its section is,
  since the plug-in refuses what it does not know.
  """
  reads, paths, quiet = set(), {}, []
  original = {name: getattr(ml_collections.ConfigDict, name)
              for name in ('__getitem__', 'to_dict', 'to_json')}

  def getitem(self, key):
    value = original['__getitem__'](self, key)
    path = paths.get(id(self), (self, ''))[1] + key
    if isinstance(value, ml_collections.ConfigDict):
      paths[id(value)] = (value, f'{path}.')  # held, so that no id comes twice
    if not quiet:
      reads.add(path)
    return value

  def silent(name):
    def call(self, *args, **kwargs):
      section = paths.get(id(self), (self, ''))[1]
      if not quiet and section in ('model.', 'task.', 'reward.'):
        reads.update(section + key for key in self)
      quiet.append(name)
      try:
        return original[name](self, *args, **kwargs)
      finally:
        quiet.pop()
    return call

  with monkeypatch.context() as patch:
    patch.setattr(ml_collections.ConfigDict, '__getitem__', getitem)
    for name in ('to_dict', 'to_json'):
      patch.setattr(ml_collections.ConfigDict, name, silent(name))
    yield reads


def keys(config, prefix=''):
  """The paths of all keys that hold no section."""
  for key, value in config.to_dict().items():
    path = f'{prefix}{key}'
    # What these hold are settings of a task, as in task itself.
    if isinstance(value, dict) and path not in ('eval.task', 'benchmarks'):
      yield from keys(config[key], f'{path}.')
    else:
      yield path


def test_every_key_is_read(monkeypatch, model_folder, compile_cache, tmp_path):
  config = toy_config.get_config()
  config.model.path = model_folder
  config.total_steps = 2  # the first step is always shown
  config.stages = config.stages[:1]
  config.lock()
  declared = set(keys(config))
  with recorded(monkeypatch) as reads:
    train.train_and_evaluate(config, str(tmp_path))
  assert {'seed', 'reward.slope', 'mesh.tensor', 'advantage.eps'} <= declared
  assert declared - reads == set()
  # The recorder would tell: a key that nobody knows is not among the reads.
  assert 'loss.entropy_coef' not in reads and 'optimizer.lr' not in reads


def test_every_key_of_an_evaluation_is_read(monkeypatch, model_folder,
                                            compile_cache, tmp_path):
  config = load('benchmarks')
  config.model.update(path=model_folder, dtype='float32')
  config.update(batch_size=8, max_prompt_length=1024, max_completion_length=4)
  config.benchmarks = {'toy': {'task': 'toys.task', 'num_samples': 1,
                               'settings': {'num_examples': 3}}}
  config.lock()
  declared = set(keys(config))
  with recorded(monkeypatch) as reads:
    benchmark.benchmark(config, str(tmp_path))
  assert {'top_p', 'conflict.budgets', 'grader.deadline'} <= declared
  assert declared - reads == set()


def real(config, model_folder):
  """The config on the problems that are here, as small as it can be."""
  if config.task.name == 'math':
    config.task.update(path=str(_DATA), sources=(
        {'path': 'aime_train.json', 'count': 200},))
    config.eval.num_examples = 8
  config.model.path = model_folder
  # Here a token is a byte.
  config.rollout.max_prompt_length = 8192
  return config


@pytest.mark.parametrize('name', [
    name if name not in _PAPER else pytest.param(name, marks=needs_data)
    for name in _CONFIGS if name != 'benchmarks'])
def test_every_config_builds(name, model_folder):
  config = real(load(name), model_folder)
  config.lock()
  stages = build.stage_configs(config)
  assert [stage for stage, _ in stages]
  for stage, settings in stages:
    run = build.build(stage, settings)
    assert run.name == stage and len(run.task) > 0
    # The shapes hold what a checkpoint does; nothing was allocated for them.
    assert run.state_shapes.step.shape == ()
    assert set(run.state_shapes.reward_state) == {'target', 'low', 'high'}


def test_every_config_tells_its_command():
  for name in _CONFIGS:
    module = importlib.import_module(f'configs.{name}')
    if name != 'default':
      assert f'--config=configs/{name}.py' in module.__doc__


@pytest.mark.parametrize('name', _PAPER)
def test_the_recipe_of_the_paper(name):
  config = load(name)
  # A name, no folder: nobody's model by accident.
  assert config.model.path == _PAPER[name]
  assert config.model.dtype == 'bfloat16'
  rollout, updates = config.rollout, config.updates
  assert (rollout.num_prompts, rollout.group_size) == (128, 8)
  assert (rollout.temperature, rollout.max_prompt_length,
          rollout.max_completion_length) == (1.0, 1024, 4096)
  assert rollout.template.startswith('You are a helpful assistant. A conver')
  assert rollout.template.endswith(
      'User: {question} Please think step by step and output the final answer '
      'within \\boxed{}. Assistant: <think>')
  assert 128 * 8 // updates.num_minibatches == 128
  assert updates.num_epochs == 1 and updates.num_minibatches == 8
  optimizer = config.optimizer
  assert (optimizer.learning_rate, optimizer.b1, optimizer.b2) == (
      1e-6, 0.9, 0.95)
  assert (optimizer.warmup_share, optimizer.final_share,
          optimizer.clip_norm) == (0.03, 0.1, 1.0)
  assert (config.loss.kl_coef, config.loss.clip_low,
          config.loss.clip_high) == (1e-4, 0.2, 0.2)
  assert (config.advantage.scale, config.advantage.eps) == ('group', 1e-9)
  reward = config.reward
  assert (reward.alpha, reward.beta, reward.slope, reward.sigma) == (
      0.7, 0.8, 100.0, 120.0)
  assert (reward.low, reward.high, reward.cap) == (0.3, 0.7, 4096)
  # Three passes over 10,000 problems, 78 whole steps each.
  assert [s['count'] for s in config.task.sources] == [6000, 4000]
  assert config.task.sources[1]['levels'] == (3, 4, 5)
  assert config.total_steps == 3 * (10_000 // 128)
  stages = build.stage_configs(config)
  assert [stage.reward.stage for _, stage in stages] == [
      'discovery', 'internalisation']
  # Held out of the folder that the command line names.
  config.task.path = '/somewhere'
  assert config.eval.task.to_dict() == {'path': '/somewhere/math500.json',
                                        'sources': ()}
  control = load(name, 'accuracy')
  assert control.reward.to_dict() == {'name': 'accuracy'}
  assert control.total_steps == 2 * config.total_steps and not control.stages
  assert control.rollout == load(name).rollout


@pytest.mark.parametrize('name', _PAPER)
def test_a_recipe_without_its_model(name):
  with pytest.raises(ValueError, match='model.path') as caught:
    build.build('discovery', load(name))
  assert '\n' not in str(caught.value)


def test_the_protocol_of_the_paper():
  config = load('benchmarks')
  assert {name: entry['num_samples'] for name, entry in
          config.benchmarks.items()} == {
              'math500': 4, 'aime24': 32, 'amc23': 32, 'olympiad_bench': 4}
  assert (config.temperature, config.top_p, config.top_k,
          config.max_completion_length) == (0.6, 0.95, 0, 32768)
  assert config.template == load('lapo_r1_1p5b').rollout.template
  assert list(load('benchmarks', 'aime24').benchmarks) == ['aime24']
  assert load('benchmarks', 'model=qwen2,amc23').model.name == 'qwen2'
  with pytest.raises(ValueError, match="'aime'.*aime24"):
    load('benchmarks', 'aime')
  with pytest.raises(ValueError, match="'task=math'"):
    load('benchmarks', 'task=math')


@needs_data
def test_the_protocol_finds_its_problems(model_folder, tmp_path):
  config = load('benchmarks')
  config.update(data=str(_DATA), batch_size=64, max_prompt_length=8192)
  config.model.path = model_folder
  prepared = benchmark.prepare(config, str(tmp_path))
  sizes = {p.name: len(p.problems) for p in prepared.passes}
  assert (sizes['math500'], sizes['aime24'], sizes['amc23']) == (500, 30, 40)
  # Of 675, without what no grader can read.
  assert 660 <= sizes['olympiad_bench'] <= 675
  assert prepared.group_size == 4


def test_tiny_is_both_stages_of_lapo():
  config = load('tiny')
  names = [name for name, _ in build.stage_configs(config)]
  assert names == ['discovery', 'internalisation']
  assert [stage.reward.stage for _, stage in build.stage_configs(config)
          ] == names
  assert config.model.path == 'tiny_reasoner'
  assert config.eval.task.split == 'test' != config.task.split


@pytest.mark.parametrize('argument', ['accuracy', 'reward=accuracy'])
def test_the_control_has_the_same_steps_and_cap(argument):
  lapo, control = load('tiny'), load('tiny', argument)
  assert control.reward.to_dict() == {'name': 'accuracy'}
  [(name, stage)] = build.stage_configs(control)
  assert name == 'accuracy'
  assert stage.total_steps == sum(
      s.total_steps for _, s in build.stage_configs(lapo))
  assert control.rollout == lapo.rollout and control.task == lapo.task
  assert control.eval == lapo.eval and control.optimizer == lapo.optimizer


def test_the_argument_names_plugins():
  config = load('default', 'task=gsm8k,reward=accuracy')
  assert config.task.to_dict() == {'name': 'gsm8k',
                                   **plugins.defaults('tasks', 'gsm8k')}
  assert config.reward.name == 'accuracy'
  assert load('default').reward.to_dict() == {
      'name': 'lapo', **plugins.defaults('rewards', 'lapo'),
      'cap': config.rollout.max_completion_length}
  with pytest.raises(ValueError, match=r"'optimizer=adam'.*section=name"):
    load('default', 'optimizer=adam')
  with pytest.raises(ValueError, match="'lappo'.*accuracy.*lapo"):
    load('tiny', 'lappo')


@pytest.mark.parametrize('argv, expected', [
    (['x', '--config=c.py', '--config.seed=1'],
     ['x', '--config=c.py', '--config.seed=1']),
    (['x', '--config=c.py', '--config.task.name=gsm8k', '--config.seed=1'],
     ['x', '--config=c.py:task=gsm8k', '--config.seed=1']),
    (['x', '--config.reward.name=accuracy', '--config=c.py:task=gsm8k'],
     ['x', '--config=c.py:task=gsm8k,reward=accuracy']),
    (['x', '--config=c.py', '--config.task.name=a', '--config.model.name=b'],
     ['x', '--config=c.py:task=a,model=b']),
    (['x', '--config', 'c.py', '--config.task.name', 'gsm8k'],
     ['x', '--config=c.py:task=gsm8k']),
])
def test_names_on_the_command_line_go_first(argv, expected):
  assert main.names_first(argv) == expected


def test_a_reward_knows_the_cap_of_sampling(tmp_path):
  config = load('default')
  assert config.reward.cap == config.rollout.max_completion_length == 2048
  config.rollout.max_completion_length = 99
  assert config.reward.cap == 99
  # In a stage too, and there alone.
  config.stages = ({'rollout.max_completion_length': 50}, {})
  (_, first), (_, second) = build.stage_configs(config)
  assert (first.reward.cap, second.reward.cap) == (50, 99)
  assert config.reward.cap == 99
  # What is written down of it is plain numbers.
  assert json.loads(config.to_json())['reward']['cap'] == 99


def test_a_stage_overrides_known_keys_only():
  config = load('default')
  for overrides in ({'rewardd.stage': 'x'}, {'reward.stagee': 'x'},
                    {'loss.kl_coef': 'much'}):
    config.stages = (overrides,)
    with pytest.raises(ValueError, match=r'stages\[0\]'):
      build.stage_configs(config)
  config.stages = ({'loss.kl_coef': 0.1}, {'name': 'b', 'seed': 3})
  (first, one), (second, two) = build.stage_configs(config)
  assert (first, second) == ('stage 1', 'b')
  assert (one.loss.kl_coef, two.loss.kl_coef) == (0.1, 0.0)
  assert (one.seed, two.seed, config.seed) == (0, 3, 0)
