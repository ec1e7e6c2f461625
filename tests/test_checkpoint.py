# SPDX-License-Identifier: Apache-2.0
"""What was saved comes back bit by bit, or an older one does, and says so."""

import logging
import os
import pathlib
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from typing import NamedTuple

from absl import logging as absl_logging
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np
import optax
import pytest

from lapo_jax import checkpoint, types

_ROOT = pathlib.Path(__file__).parent.parent


class Memory(NamedTuple):
  table: jax.Array
  nothing: tuple


def _layout(num_devices, *axes):
  mesh = Mesh(np.array(jax.devices()[:num_devices]), ('fsdp',))
  return NamedSharding(mesh, PartitionSpec(*axes))


def _state(step=1, num_devices=1):
  """A small train state, large arrays sharded over the devices."""
  noise = jax.random.normal(jax.random.key(step), (64, 16))
  params = {'embed': noise, 'layers': [{'bias': noise[0] * 0},
                                       {'bias': noise[1].astype('bfloat16')}]}
  optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
  opt_state = optimizer.init(params)
  _, opt_state = optimizer.update(params, opt_state, params)
  state = types.TrainState(
      step=jnp.int32(step), stage=jnp.int32(0), nonfinite=jnp.int32(0),
      params=params, opt_state=opt_state,
      reward_state=Memory(jnp.array([True, False]), ()))
  axes = lambda x: ('fsdp',) if x.ndim == 2 else ()
  return jax.tree.map(
      lambda x: jax.device_put(x, _layout(num_devices, *axes(x))), state)


def _like(state):
  return jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
      state)


def _assert_same(got, expected):
  assert jax.tree.structure(got) == jax.tree.structure(expected)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected),
                  strict=True):
    assert a.dtype == b.dtype and a.shape == b.shape
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    assert a.sharding == b.sharding


def _steps(folder):
  return [int(name.split('-')[-1]) for name in sorted(os.listdir(folder))]


def _newest(folder):
  return folder / sorted(os.listdir(folder))[-1]


def test_empty_or_missing_folder(tmp_path):
  like = _like(_state())
  assert checkpoint.restore_latest(tmp_path, like) is None
  assert checkpoint.restore_latest(tmp_path / 'not' / 'there', like) is None
  # A run folder holds other things too.
  (tmp_path / 'metrics.jsonl').write_text('{}')
  assert checkpoint.restore_latest(tmp_path, like) is None
  checkpoint.save(tmp_path, 1, _state(), {})
  assert (tmp_path / 'metrics.jsonl').exists()


def test_round_trip(tmp_path, monkeypatch):
  state = _state()
  meta = {'data': 'é"\n', 'stage': 'discovery', 'seeds': [1, 2], 'rate': 1e-6}
  monkeypatch.chdir(tmp_path)   # relative folders are fine
  checkpoint.save('run/checkpoints', 1, state, meta)
  restored, got = checkpoint.restore_latest('run/checkpoints', _like(state))
  _assert_same(restored, state)
  assert isinstance(restored.reward_state, Memory)
  assert got == meta


def test_params_alone_and_odd_bits(tmp_path):
  params = {'a/b': jnp.array([-0.0, 0.0, jnp.nan, jnp.inf, -jnp.inf, 1e-45]),
            'é': jnp.array([[-128, 127]], jnp.int8), '0': jnp.uint32(2**32 - 1),
            'none': None, 'nested': {}}
  checkpoint.save(tmp_path, 0, params, {})
  restored, _ = checkpoint.restore_latest(tmp_path, _like(params))
  _assert_same(restored, params)


@pytest.mark.parametrize('saved_on, restored_on', [(8, 1), (1, 8), (8, 2)])
def test_restores_onto_another_sharding(tmp_path, saved_on, restored_on):
  checkpoint.save(tmp_path, 1, _state(num_devices=saved_on), {})
  expected = _state(num_devices=restored_on)
  restored, _ = checkpoint.restore_latest(tmp_path, _like(expected))
  _assert_same(restored, expected)


def test_keeps_latest_two_and_best(tmp_path):
  state = _state()
  scores = {1: 0.1, 2: 0.9, 3: float('nan'), 4: 0.2, 5: None}
  kept = []
  for step, score in scores.items():
    checkpoint.save(tmp_path, step, state, {}, metric=score)
    kept.append(_steps(tmp_path))
  # Each save reads the metrics from disk, as a resumed run would.
  assert kept == [[1], [1, 2], [2, 3], [2, 3, 4], [2, 4, 5]]
  checkpoint.save(tmp_path, 6, state, {}, metric=0.9)
  assert _steps(tmp_path) == [5, 6]   # the newer of two equals


@pytest.mark.parametrize('again', [2, 3, 4])
def test_save_after_rollback_replaces_newer(tmp_path, again):
  for step in (1, 2, 3):
    checkpoint.save(tmp_path, step, _state(step), {}, metric=-float(step))
  shutil.rmtree(_newest(tmp_path) / 'state')
  checkpoint.save(tmp_path, again, _state(10), {'again': True}, metric=0.0)
  restored, meta = checkpoint.restore_latest(tmp_path, _like(_state()))
  _assert_same(restored, _state(10))
  assert meta == {'again': True}
  # Of 1 (the best so far), 2, 3, what is left beside the new, now best one.
  assert _steps(tmp_path) == {2: [1, 2], 3: [2, 3], 4: [3, 4]}[again]


def _truncate(path):
  path.write_bytes(path.read_bytes()[:-max(1, path.stat().st_size // 3)])


def _flip(path):
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 0xFF
  path.write_bytes(bytes(data))


@pytest.mark.parametrize('damage', [_truncate, _flip, os.remove])
def test_damage_to_any_file(tmp_path, damage, caplog):
  """Whichever file is hit: the same bits, or the older ones and a warning."""
  folder, whole = tmp_path / 'run', tmp_path / 'whole'
  for step in (1, 2):
    checkpoint.save(folder, step, _state(step), {'step': step})
  newest = _newest(folder)
  shutil.copytree(newest, whole)
  files = [x.relative_to(whole) for x in whole.rglob('*') if x.is_file()]
  largest = max(files, key=lambda x: (whole / x).stat().st_size
                if '/d/' in str(x) else 0)
  fell_back = set()
  for file in files:
    damage(newest / file)
    caplog.clear()
    restored, meta = checkpoint.restore_latest(folder, _like(_state()))
    warned = 'step 2 is damaged' in caplog.text
    _assert_same(restored, _state(1 if warned else 2))
    assert meta == {'step': 1 if warned else 2}
    if warned:
      fell_back.add(file)
    shutil.rmtree(newest)
    shutil.copytree(whole, newest)
  assert {largest, pathlib.Path('record/metadata')} <= fell_back


def test_what_a_save_left_unfinished_goes_before_the_next(tmp_path,
                                                         monkeypatch):
  leftover = tmp_path / '000007-step-3.orbax-checkpoint-tmp'
  leftover.mkdir()

  def full(writer, folder, args):
    assert folder.name == '000008-step-4'
    raise OSError('no space left')

  monkeypatch.setattr(checkpoint.ocp.Checkpointer, 'save', full)
  with pytest.raises(OSError, match='no space'):
    checkpoint.save(tmp_path, 4, _state(4), {})
  assert not leftover.exists()


def test_changed_arrays_are_found_by_fingerprint(tmp_path, monkeypatch, caplog):
  checkpoint.save(tmp_path, 1, _state(1), {})
  with monkeypatch.context() as patch:   # as if other bits had been written
    patch.setattr(checkpoint, 'fingerprint', lambda _, f=checkpoint.fingerprint:
                  f(_state(3)))
    checkpoint.save(tmp_path, 2, _state(2), {})
  restored, _ = checkpoint.restore_latest(tmp_path, _like(_state()))
  _assert_same(restored, _state(1))
  assert 'step 2 is damaged' in caplog.text
  assert 'fingerprint of .' in caplog.text


def test_all_damaged(tmp_path):
  for step in (7, 8):
    checkpoint.save(tmp_path, step, _state(), {})
    shutil.rmtree(_newest(tmp_path) / 'state')
  with pytest.raises(checkpoint.DamagedError,
                     match=f'{tmp_path}.*step 8: .*step 7: '):
    checkpoint.restore_latest(tmp_path, _like(_state()))


@pytest.mark.parametrize('change, message', [
    (lambda p: p | {'embed': jnp.zeros((64, 32))},
     r"\['embed'\]: got float32\[64,16\], expected float32\[64,32\]"),
    (lambda p: p | {'embed': p['embed'].astype('bfloat16')},
     r'got float32\[64,16\], expected bfloat16\[64,16\]'),
    (lambda p: p | {'head': jnp.zeros(3)},
     r"\['head'\]: got no such leaf, expected float32\[3\]"),
    (lambda p: {'embed': p['embed']},
     r'got float32\[16\], expected no such leaf'),
])
def test_another_model_is_an_error_not_damage(tmp_path, change, message):
  params = _state().params
  checkpoint.save(tmp_path, 1, params, {})
  with pytest.raises(ValueError, match=message) as error:
    checkpoint.restore_latest(tmp_path, _like(change(params)))
  assert '\n' not in str(error.value)


def test_user_mistakes(tmp_path):
  bare = {'w': jax.ShapeDtypeStruct((3,), jnp.float32)}
  with pytest.raises(ValueError, match=r"like\['w'\] has no sharding"):
    checkpoint.restore_latest(tmp_path, bare)
  with pytest.raises(TypeError, match=r"state\['key'\]: got .*random keys"):
    checkpoint.save(tmp_path, 1, {'key': jax.random.key(0)}, {})
  with pytest.raises(TypeError, match='not JSON serializable'):
    checkpoint.save(tmp_path, 1, {'w': jnp.zeros(3)}, {'x': {1, 2}})
  with pytest.raises(TypeError, match=r"state\['n'\]: got 3, expected a jax.A"):
    checkpoint.save(tmp_path, 1, {'n': 3}, {})
  assert not os.listdir(tmp_path)


def test_orbax_is_mute(tmp_path, caplog):
  before = absl_logging.get_verbosity()
  absl_logging.set_verbosity(absl_logging.INFO)
  try:
    with caplog.at_level(logging.DEBUG):
      checkpoint.save(tmp_path, 1, _state(), {})
      checkpoint.restore_latest(tmp_path, _like(_state()))
      absl_logging.info('others are heard')
  finally:
    absl_logging.set_verbosity(before)
  absl_lines = [x.getMessage() for x in caplog.records if x.name == 'absl']
  assert absl_lines == ['others are heard']


def _print(values, dtype='float32'):
  return checkpoint.fingerprint([jnp.array(values, dtype)])['[0]']


def _reference(bits):
  """The formula, in numpy, of a flat uint32 array."""
  def mix(x):
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
  index = np.arange(bits.size, dtype=np.uint32)
  return int(mix(bits ^ mix(index)).sum(dtype=np.uint32))


def test_fingerprint_is_its_formula():
  # It must never change: all old checkpoints would count as damaged.
  values = np.random.default_rng(0).normal(size=(3, 5, 7)).astype(np.float32)
  assert _print(values) == _reference(values.view(np.uint32).ravel())
  half = jnp.array(values, 'bfloat16')
  bits = np.asarray(half).view(np.uint16).astype(np.uint32).ravel()
  assert _print(half, 'bfloat16') == _reference(bits)
  assert _print(5, 'int32') == _reference(np.array([5], np.uint32))
  assert _print([1, -1], 'int8') == _reference(np.array([1, 255], np.uint32))
  flags = np.array([1, 0, 1], np.uint32)
  assert _print([True, False, True], 'bool') == _reference(flags)
  assert _print([1.0, 2.0, 3.0]) == 3545666653


def test_fingerprint_sees_every_bit_and_place():
  values = [1.0, -1.0, 0.0, 3.5]
  assert _print(values) == _print(values)
  others = [[-1.0, 1.0, 0.0, 3.5], [1.0, -1.0, -0.0, 3.5], values[::-1],
            [1.0, -1.0, 0.0, 3.5000002], [0.0] * 4, values[:3], values + [0.0]]
  prints = [_print(x) for x in [values, *others]]
  assert len(set(prints)) == len(prints)
  # 1.0 and -1.0 differ in the highest bit alone: any two places, exchanged.
  line = np.where(np.arange(64) == 0, -1.0, 1.0)
  assert len({_print(np.roll(line, i)) for i in range(64)}) == 64


def test_fingerprint_ignores_sharding():
  expected = checkpoint.fingerprint(_state())
  assert checkpoint.fingerprint(_state(num_devices=8)) == expected
  assert "['embed']" in ' '.join(expected)
  assert all(0 <= x < 2**32 for x in expected.values())


_SAVER = """
import sys
import jax, jax.numpy as jnp
from lapo_jax import checkpoint
place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
like = {f'w{i}': jax.ShapeDtypeStruct((200, 50), jnp.float32, sharding=place)
        for i in range(10)}
latest = checkpoint.restore_latest(sys.argv[1], like)
step = latest[1]['step'] if latest else 0
while True:
  step += 1
  state = {f'w{i}': jnp.full((200, 50), step + i / 10) for i in range(10)}
  checkpoint.save(sys.argv[1], step, state, {'step': step}, step / 1000)
  print(step, flush=True)
"""


def _restored(folder, rows, reported):
  """The latest step and its state, found whole.

  `reported` is the last that `save` has returned from.
  """
  place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  state, meta = checkpoint.restore_latest(folder, {
      f'w{i}': jax.ShapeDtypeStruct((rows, 50), jnp.float32, sharding=place)
      for i in range(10)})
  # The killed one may be there.
  assert meta['step'] in (reported, reported + 1)
  for i in range(10):
    assert np.all(state[f'w{i}'] == np.float32(meta['step'] + i / 10))
  return meta['step'], state


def test_kill_inside_save(tmp_path):
  """SIGKILL at random moments of a process that does nothing but save."""
  env = os.environ | {'PYTHONPATH': str(_ROOT), 'JAX_NUM_CPU_DEVICES': '1'}
  rng = random.Random(0)
  reported, leftovers = 0, 0
  for _ in range(6):
    with subprocess.Popen([sys.executable, '-c', _SAVER, str(tmp_path)],
                          stdout=subprocess.PIPE, text=True, env=env) as saver:
      first = int(saver.stdout.readline())
      assert first > reported   # it resumed from the last run
      time.sleep(rng.uniform(0.0, 0.3))
      saver.send_signal(signal.SIGKILL)
      reported = max([first, *map(int, saver.stdout.read().split())])
    leftovers += any('tmp' in name for name in os.listdir(tmp_path))
    reported, state = _restored(tmp_path, 200, reported)
  assert leftovers   # kills did land inside saves
  checkpoint.save(tmp_path, reported + 1, state, {})
  assert _steps(tmp_path) == [reported, reported + 1]


_SAVERS = """
import sys
import jax, jax.numpy as jnp
from lapo_jax import checkpoint, hosts, sharding
folder, address, host = sys.argv[1:]
hosts.initialize(address, 2, int(host), heartbeat_seconds=10)
mesh = sharding.make_mesh()
cut = jax.NamedSharding(mesh, jax.P('fsdp'))
make = jax.jit(lambda step: {f'w{i}': jnp.full((400, 50), step + i / 10)
                             for i in range(10)}, out_shardings=cut)
latest = checkpoint.restore_latest(folder, jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=cut),
    jax.eval_shape(make, 0.0)))
step = latest[1]['step'] if latest else 0
while True:
  step += 1
  checkpoint.save(folder, step, make(float(step)), {'step': step})
  print('saved', step, flush=True)
"""


def test_a_host_killed_inside_save(tmp_path):
  """Each of two writes its half; what one has left unfinished is not there."""
  env = os.environ | {'PYTHONPATH': str(_ROOT), 'JAX_NUM_CPU_DEVICES': '1',
                      'JAX_PLATFORMS': 'cpu'}
  rng = random.Random(0)
  reported, leftovers = 0, 0
  for _ in range(2):
    with socket.socket() as free:
      free.bind(('localhost', 0))
      address = f'localhost:{free.getsockname()[1]}'
    first, second = (subprocess.Popen(
        [sys.executable, '-c', _SAVERS, str(tmp_path), address, str(host)],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=env)
        for host in range(2))
    try:
      # gloo talks, too.
      words = next(line for line in first.stdout if line.startswith('saved'))
      assert int(words.split()[1]) > reported  # it resumed from the last run
      time.sleep(rng.uniform(0.0, 0.3))
      second.kill()
      time.sleep(0.5)  # what the first does alone
    finally:
      for process in (first, second):
        process.kill()
      rest, _ = (process.communicate()[0] for process in (first, second))
    words += rest
    reported = max(map(int, re.findall(r'saved (\d+)', words)))
    leftovers += any('tmp' in name for name in os.listdir(tmp_path))
    reported, _ = _restored(tmp_path, 400, reported)
  assert leftovers  # kills did land inside saves
