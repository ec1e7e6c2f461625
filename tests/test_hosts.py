# SPDX-License-Identifier: Apache-2.0
"""Several hosts are one machine: real processes that talk by gloo.

Two hosts of four devices run until one is killed. From what they saved, two
hosts, four hosts of two devices and this process with eight go on: the same
prompts, tokens, grades, loss and gradient, and the same bits where the hosts
are as before.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

from etils import epath
import jax
import numpy as np
import pytest
from toys import config as toy_config
from toys import host, pod

from lapo_jax import build, checkpoint, hosts, programs, train

_ROOT = pathlib.Path(__file__).parent.parent
_STEP = 2  # the one that all compare, numbered from 0
_PATIENCE = 300  # seconds


@contextlib.contextmanager
def start(num_hosts, model, folder, cache):
  """The command on so many hosts; their logs lie beside the run's folder."""
  with socket.socket() as free:
    free.bind(('localhost', 0))
    port = free.getsockname()[1]
  environment = {
      **os.environ, **cache, 'JAX_PLATFORMS': 'cpu',
      'JAX_NUM_CPU_DEVICES': str(8 // num_hosts),
      'PYTHONPATH': f'{_ROOT}{os.pathsep}{_ROOT / "tests"}'}
  processes = []
  with contextlib.ExitStack() as stack:
    for i in range(num_hosts):
      log = stack.enter_context((folder.parent / f'host-{i}').open('wb'))
      processes.append(subprocess.Popen(
          [sys.executable, str(_ROOT / 'tests/toys/host.py'),
           '--config=tests/toys/pod.py:accuracy', f'--workdir={folder}',
           f'--config.model.path={model}', f'--coordinator=localhost:{port}',
           f'--num_hosts={num_hosts}', f'--host={i}',
           '--heartbeat_seconds=10'],
          cwd=_ROOT, env=environment, stdout=log, stderr=log))
    try:
      yield processes
    finally:
      for process in processes:
        process.kill()
        process.wait()


def said(folder, i):
  return (folder.parent / f'host-{i}').read_text(errors='replace')


def wait_for(folder, step, processes):
  """Until the checkpoint of a step is there; a process that ends has failed."""
  began = time.monotonic()
  while not saved(folder, step):
    for i, process in enumerate(processes):
      assert process.poll() is None, said(folder, i)
    assert time.monotonic() < began + _PATIENCE
    time.sleep(0.01)


def saved(folder, step):
  """The checkpoint of a step, None until it is whole."""
  found = [path for path in folder.glob('checkpoints/0/*')
           if path.name.endswith(f'-step-{step}')]
  return found[0] if found else None


def fingerprints(folder, step):
  return checkpoint._read_record(epath.Path(saved(folder, step)))['leaves']


@pytest.fixture(scope='module')
def killed(tmp_path_factory, model_folder, compile_cache):
  """The folder of two hosts, the second of which was killed, and its end."""
  folder = tmp_path_factory.mktemp('killed') / 'run'
  with start(2, model_folder, folder, compile_cache) as (first, second):
    wait_for(folder, _STEP + 1, (first, second))
    os.kill(second.pid, signal.SIGKILL)
    began = time.monotonic()
    status = first.wait(_PATIENCE)
    return folder, status, time.monotonic() - began


@pytest.fixture(scope='module')
def went_on(killed, tmp_path_factory, model_folder, compile_cache):
  """num_hosts -> the folder of that many, from before the compared step."""
  known = {}

  def go_on(num_hosts):
    if num_hosts not in known:
      folder = tmp_path_factory.mktemp(f'on-{num_hosts}') / 'run'
      shutil.copytree(killed[0], folder)
      for later in range(_STEP + 1, 9):
        if saved(folder, later):
          shutil.rmtree(saved(folder, later))
      for file in folder.glob('step-*'):
        file.unlink()
      known[num_hosts] = folder
      if num_hosts == 1:
        _here(model_folder, folder)
        return folder
      with start(num_hosts, model_folder, folder, compile_cache) as processes:
        wait_for(folder, _STEP + 1, processes)
        # Later ones take its place.
        (folder / 'leaves.json').write_text(
            json.dumps(fingerprints(folder, _STEP + 1)))
        if num_hosts > 2:  # the rest is as for two
          processes[-1].terminate()
        for i, process in enumerate(processes):
          expected = 128 + signal.SIGTERM if num_hosts > 2 else 0
          assert process.wait(_PATIENCE) == expected, said(folder, i)
    return known[num_hosts]

  return go_on


def _here(model_folder, folder):
  """Goes on in this process, until it is asked to stop."""
  config = pod.get_config('accuracy')
  config.model.path = model_folder
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(programs, 'make_optimizer', host.make_optimizer)
    patch.setattr(hosts, 'asked_to_stop', lambda step: step == _STEP)
    runs = host.prepare(config, str(folder))
    with pytest.raises(hosts.Stopped, match='step 2, which is saved'):
      train.train(runs, str(folder))


def test_a_dead_host_ends_the_others_with_a_line(killed):
  folder, status, seconds = killed
  assert status not in (0, None) and seconds < 20
  words = said(folder, 0)
  ours = 'lapo_jax: host 0 of 2: another host is gone (' in words
  assert ours or 'another task died' in words, words
  if ours:
    assert 'goes on from the last checkpoint' in words.splitlines()[-1]
    assert 'Traceback' not in words
  # The second has said nothing of the run.
  assert 'held out' in words and 'held out' not in said(folder, 1)


def test_started_again_they_end_with_the_same_bits(killed, went_on):
  folder = went_on(2)
  found = json.loads((folder / 'leaves.json').read_text())
  assert found == fingerprints(killed[0], _STEP + 1)
  assert saved(folder, 8) and (folder / 'summary.png').exists()
  # The table is printed once, and every step logged once.
  assert 'Written: ' in said(folder, 0) and 'Written: ' not in said(folder, 1)
  steps = [json.loads(line)['step'] for line in
           (folder / 'metrics.jsonl').read_text().splitlines()
           if 'update/loss' in line]
  assert steps == list(range(8))


def test_a_signal_to_one_host_ends_all_after_a_step_that_is_saved(went_on):
  folder = went_on(4)
  for i in range(4):
    told = re.search(rf'lapo_jax: host {i} of 4: asked to end after step (\d), '
                     'which is saved', said(folder, i))
    assert told and saved(folder, int(told[1]) + 1), said(folder, i)
    assert int(told[1]) < 7 and not saved(folder, int(told[1]) + 2)


@pytest.mark.parametrize('num_hosts', [1, 2, 4])
def test_the_number_of_hosts_changes_nothing(killed, went_on, num_hosts):
  folder = went_on(num_hosts)
  mine, theirs = (np.load(where / f'step-{_STEP}.npz') for where in (
      folder, killed[0]))
  assert sorted(mine) == sorted(theirs)
  for name in ('prompts', 'prompt_index', 'completions', 'correct', 'lengths',
               'advantages'):
    np.testing.assert_array_equal(mine[name], theirs[name], err_msg=name)
  assert 0 < mine['correct'].mean() < 1
  np.testing.assert_allclose(mine['sampler_logprobs'],
                             theirs['sampler_logprobs'], rtol=1e-6)
  gradients = [name for name in mine if name.startswith('gradient')]
  assert len(gradients) > 10
  for name in gradients:
    apart = np.linalg.norm(mine[name] - theirs[name])
    assert apart <= 1e-6 * np.linalg.norm(theirs[name]), name
  ours, other = (next(
      record for record in map(json.loads, (where / 'metrics.jsonl')
                               .read_text().splitlines())
      if record['step'] == _STEP and 'update/loss' in record)
      for where in (folder, killed[0]))
  assert ours.keys() == other.keys()
  for name, value in ours.items():
    if not name.startswith('time/') and name != 'stage':
      assert value == pytest.approx(other[name], rel=1e-6, abs=1e-8), name


@pytest.fixture
def joined(monkeypatch):
  """What JAX was asked, [] if nothing; the environment names no cluster."""
  asked = []
  monkeypatch.setattr(jax.distributed, 'initialize',
                      lambda **settings: asked.append(settings))
  for name in list(os.environ):
    if name.startswith(('SLURM_', 'OMPI_', 'TPU_', 'MEGASCALE_', 'JAX_')):
      monkeypatch.delenv(name)
  monkeypatch.setenv('JAX_PLATFORMS', 'cpu')
  return asked


def test_one_host_joins_nothing(joined, monkeypatch):
  hosts.initialize()
  hosts.initialize(num_hosts=1)
  hosts.initialize('there:1', 1, 0)
  monkeypatch.setenv('TPU_WORKER_HOSTNAMES', 'localhost')
  hosts.initialize()
  assert joined == []


def test_hosts_are_told_by_flags_or_variables(joined, monkeypatch):
  hosts.initialize('there:123', 4, 2, heartbeat_seconds=7)
  monkeypatch.setenv('JAX_COORDINATOR_ADDRESS', 'there:123')
  monkeypatch.setenv('JAX_NUM_PROCESSES', '4')
  hosts.initialize(host=2, heartbeat_seconds=7)
  monkeypatch.setenv('JAX_PROCESS_ID', '2')
  hosts.initialize(heartbeat_seconds=7)
  assert joined == 3 * [{
      'coordinator_address': 'there:123', 'num_processes': 4, 'process_id': 2,
      'cluster_detection_method': 'deactivate',
      'heartbeat_timeout_seconds': 7}]


@pytest.mark.parametrize('variables', [
    {'TPU_WORKER_HOSTNAMES': 'a,b'}, {'MEGASCALE_NUM_SLICES': '2'},
    {'OMPI_COMM_WORLD_SIZE': '4'},
    {'SLURM_NTASKS': '2', 'SLURM_STEP_NODELIST': 'n[1-2]'}])
def test_clusters_are_recognised_and_all_devices_used(joined, monkeypatch,
                                                      variables):
  for name, value in variables.items():
    monkeypatch.setenv(name, value)
  hosts.initialize()
  assert joined == [{'heartbeat_timeout_seconds': 30, 'local_device_ids': []}]
  hosts.initialize(num_hosts=1)
  assert len(joined) == 1


@pytest.mark.parametrize('given, lacks', [
    (('there:1', 0, -1), 'no --num_hosts'), (('', 2, 0), 'no --coordinator'),
    (('there:1', 2, -1), 'no --host'), (('there:1', 2, 2), 'a host from 0'),
    (('there', 2, 0), 'expected host:port')])
def test_a_half_told_host_is_refused(joined, given, lacks):
  with pytest.raises(ValueError, match=lacks):
    hosts.initialize(*given)
  assert joined == []


@pytest.fixture
def beside(monkeypatch):
  """Stands for a second host, which sends these messages in turn."""
  def answer(*messages):
    rows = iter([json.dumps(message).encode() for message in messages])
    said = []

    def allgather(x):
      if x.ndim == 0:
        said.append(next(rows))
        return np.array([x, len(said[-1])])
      return np.stack([x, np.frombuffer(said[-1].ljust(len(x)), np.uint8)])

    monkeypatch.setattr(jax, 'process_count', lambda: 2)
    monkeypatch.setattr(hosts.multihost_utils, 'process_allgather', allgather)
  return answer


def test_hosts_tell_one_another(beside):
  long = 'ü' * 999
  beside({'value': [1]}, {'value': long}, {'value': None})
  assert hosts.gather('a') == ['a', [1]]
  assert hosts.gather(None) == [None, long]
  assert hosts.from_first(lambda: {'b': 2.5}) == {'b': 2.5}


def test_an_error_on_one_host_is_one_on_all(beside):
  beside({'error': 'no file x'}, {'value': None}, {'value': None})
  with pytest.raises(hosts.ElsewhereError, match='^host 1: no file x$'):
    hosts.in_step(lambda: 3)

  def fail():
    raise KeyError('mine')
  with pytest.raises(KeyError, match='mine') as mine:
    hosts.in_step(fail)
  with pytest.raises(KeyError):  # told once, however deep
    hosts.in_step(lambda: fail_again(mine.value))
  assert hosts.in_step(lambda: 3) == 3


def fail_again(error):
  raise error


def test_what_differs_is_named_with_its_host(beside):
  facts = {'config': {'seed': 0}, 'data': 'abc'}
  beside({'value': {}})
  with pytest.raises(ValueError, match='host 1 differs from host 0 in its '
                                       'config, data: every host must'):
    hosts.compare(facts)


def test_configs_are_compared_before_anything_is_built(beside, monkeypatch):
  # One host asks for slots, the other for what memory holds.
  config = toy_config.get_config()
  monkeypatch.setattr(build, 'build', lambda *_: pytest.fail('it was built'))
  beside({'value': {**digests(hosts.software()), 'config': 'another'}})
  with pytest.raises(ValueError, match='host 1 differs from host 0 in its '
                                       'config: every host must'):
    train.prepare(config, 'nowhere')


def digests(facts):
  return {name: hashlib.sha256(json.dumps(fact, sort_keys=True).encode())
          .hexdigest() for name, fact in facts.items()}


def test_this_host_agrees_with_itself():
  facts = hosts.software()
  assert facts['versions']['jax'] == jax.__version__
  hosts.compare(facts)
  json.dumps(facts)
