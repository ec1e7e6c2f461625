# SPDX-License-Identifier: Apache-2.0
"""Grading in workers: a verdict for every item, whatever the text does."""

import logging
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from lapo_jax import grader, grading_worker, types

# A task whose completions are orders, and a method that reads their length.
_TASK = """
import os, re, signal, sys, threading, time
from lapo_jax import types

class Task:
  def __init__(self, expected): self.expected = expected
  def grade(self, completion, example):
    order, _, rest = completion.partition(' ')
    if order == 'sleep': time.sleep(float(rest))
    if order == 'regex': re.match('(a+)+$', 'a' * 60 + 'b')  # holds the lock
    if order == 'exit': os._exit(0)
    if order == 'segv': os.kill(os.getpid(), signal.SIGSEGV)
    if order == 'memory': bytearray(8 * 2**30)
    if order == 'raise': raise ValueError('no such ' + rest)
    if order == 'late': raise TimeoutError('its own deadline')
    if order == 'large': bytearray(2**29 + 2**25)
    if order == 'later': threading.Timer(0.1, os._exit, (1,)).start()
    if order == 'print':
      os.write(1, b'[3, {"correct": 1.0}]\\n' * 20_000)
      print('}' * 2**17, flush=True)
      assert sys.stdin.read() == ''
    if order == 'forge':
      for pipe in range(3, 20):
        try: os.write(pipe, b'[3, {"correct": 1.0}]\\n')
        except OSError: pass
    correct = float(order in (example.answer, 'print', 'later'))
    if order == 'secret': correct = float('SECRET_TOKEN' in os.environ)
    if order == 'backend':
      from jax._src import xla_bridge
      correct = float(xla_bridge.backends_are_initialized())
    if order == 'whole': correct = float(vars(example) == self.expected)
    return {'correct': correct, 'parsed': float(order != ''),
            'sum': float(sum(map(ord, completion))), 'pid': os.getpid()}

def make(fail='', wait=0.0, expected=None):
  time.sleep(wait)
  if fail: raise ValueError(fail)
  return Task(expected)
"""
_METHOD = """
from lapo_jax import types

def make(scale=1.0):
  return types.Reward(
      apply=None,
      read=lambda text, example: {'chars': scale * len(text), 'correct': 9.0})
"""

_BOXED = """
from lapo_jax.tasks import _answers, _equivalence

class Task:
  def grade(self, completion, example):
    answer = _answers.last_boxed(_answers.after_thinking(completion))
    correct = answer is not None and _equivalence.equal(answer, example.answer)
    return {'correct': float(correct), 'parsed': float(answer is not None)}

def make():
  _equivalence.require()
  return Task()
"""
_HOSTILE = (
    '9^9^9', '9**9**9', '99999999!', '100000!!', '{' * 50_000, '1' * 50_000,
    "__import__('os').system('true')", r'\binom{999999}{500000}',
    r'\frac{1}{' * 30 + '1' + '}' * 30, '\ud800\x00\u0301' * 30,
    '10^{10^{10}}', r'\sum_{k=1}^{10^9} k!', r'\int_0^{10^9} e^{x^x} dx',
    '((9^{99})^{99})^{99}', r'\cos^{999}(x+y)', '(a+b+c+d+e+f)^{64}')


@pytest.fixture(scope='module')
def plugins(tmp_path_factory):
  """The two plug-ins, importable by the workers."""
  folder = tmp_path_factory.mktemp('plugins')
  (folder / 'hostile').mkdir()
  (folder / 'hostile' / '__init__.py').touch()
  (folder / 'hostile' / 'task.py').write_text(_TASK)
  (folder / 'hostile' / 'boxed.py').write_text(_BOXED)
  (folder / 'hostile' / 'method.py').write_text(_METHOD)
  sys.path.append(str(folder))
  yield str(folder)
  sys.path.remove(str(folder))


@pytest.fixture(scope='module')
def warm(plugins):
  """A grader that runs, shared by the tests that leave it in peace."""
  with grader.Grader(('hostile.task', {}),
                     reward=('hostile.method', {'scale': 2.0})) as it:
    yield it


def _examples(number, answer='yes'):
  return [types.Example(question='q', answer=answer) for _ in range(number)]


def _alive(pid):
  try:
    with open(f'/proc/{pid}/stat') as stat:
      return stat.read().rpartition(')')[2].split()[0] != 'Z'
  except FileNotFoundError:
    return False


def _memory():
  with open('/proc/self/statm') as pages:
    return int(pages.read().split()[1]) * os.sysconf('SC_PAGE_SIZE')


def test_a_thousand_ordinary_items_in_order(warm):
  warm.grade(['yes'], _examples(1))  # the start is not measured
  completions = [('yes' if i % 3 else 'no') + f' {i}' for i in range(1000)]
  completions[7] = ''
  start = time.perf_counter()
  results = warm.grade(completions, _examples(1000))
  assert time.perf_counter() - start < 5.0  # about 0.1 on an idle machine
  for text, result in zip(completions, results, strict=True):
    assert result['chars'] == 2.0 * len(text)
    assert result['sum'] == sum(map(ord, text))
    assert result['correct'] == float(text.startswith('yes'))  # not `read`'s
    assert result['verdict'] == {'y': 'correct', 'n': 'wrong',
                                 '': 'unparsed'}[text[:1]]
  assert warm.counts == {'correct': 665, 'wrong': 334, 'unparsed': 1,
                         'timeout': 0, 'crash': 0}


def test_no_items(warm):
  assert warm.grade([], []) == []
  assert sum(warm.counts.values()) == 0


@pytest.mark.parametrize('text', [
    '\x00', '\ud800', 'a\nb\r\nc\u2028', '{' * 50_000, '"\\' * 25_000,
    '\U0001f600' * 300_000,
], ids=['nul', 'surrogate', 'lines', 'braces', 'quotes', 'megabytes'])
def test_text_arrives_as_it_is(warm, text):
  result, neighbour = warm.grade([text, 'yes'], _examples(2))
  assert result['verdict'] == 'wrong'
  assert result['sum'] == sum(map(ord, text))
  assert neighbour['verdict'] == 'correct'


def test_examples_arrive_whole(plugins):
  example = types.Example(question='\ud800', answer='yes', level='5',
                          prefill='I', target_length=7)
  settings = {'expected': vars(example) | {'target_length': np.int64(7)}}
  with grader.Grader(('hostile.task', settings)) as it:
    other = example.replace(prefill='')
    assert [result['verdict'] for result in
            it.grade(['whole', 'whole'], [example, other])] == [
                'correct', 'wrong']


def test_workers_see_no_secret_and_no_device(plugins, monkeypatch):
  monkeypatch.setenv('SECRET_TOKEN', 'x')
  with grader.Grader(('hostile.task', {})) as it:
    results = it.grade(['secret', 'backend', 'yes'], _examples(3))
  assert [result['correct'] for result in results] == [0.0, 0.0, 1.0]


def test_faults_harm_no_neighbour(plugins, caplog):
  orders = {'sleep 1000': 'timeout', 'regex': 'timeout', 'exit': 'crash',
            'segv': 'crash', 'memory': 'crash', 'raise thing': 'crash',
            'late': 'timeout', 'forge': 'crash', 'print': 'correct'}
  completions = ['yes', 'no']
  for order in orders:
    completions += [order, 'yes', 'no', '']
  expected = [orders.get(text) or {'yes': 'correct', 'no': 'wrong',
                                   '': 'unparsed'}[text]
              for text in completions]
  start = time.perf_counter()
  with (caplog.at_level(logging.WARNING, logger='absl'),
        grader.Grader(('hostile.task', {}), num_workers=2,
                      deadline=0.7) as it):
    results = it.grade(completions, _examples(len(completions)))
  assert time.perf_counter() - start < 60.0  # about 8 on an idle machine
  assert [result['verdict'] for result in results] == expected
  assert it.counts == {verdict: expected.count(verdict)
                       for verdict in grader.VERDICTS}
  for result in results:
    assert set(result) == {'verdict', 'correct', 'parsed', 'sum', 'pid'}
    assert result['correct'] == float(result['verdict'] == 'correct')
  assert 'ValueError: no such thing' in caplog.text
  assert sum('timeout on item' in line for line in caplog.messages) == 3
  assert caplog.messages[-1].startswith(
      f'grading: 3 timeouts and 5 crashes in {len(results)} items, over 1 %')


def test_a_grader_that_fails_on_everything_is_at_fault_itself(plugins):
  with (grader.Grader(('hostile.task', {}), num_workers=2) as it,
        pytest.raises(grader.GradingError, match='each of 8 completions')):
    it.grade(['raise thing'] * 8, _examples(8))


def test_a_part_of_a_call_is_no_proof_against_the_grader(plugins):
  with grader.Grader(('hostile.task', {}), num_workers=2) as it:
    found = it.grade(['raise thing'] * 8, _examples(8), whole=False)
    verdicts = [result['verdict'] for result in found]
    assert verdicts == ['crash'] * 8
    it.check([*verdicts, 'wrong'])
    with pytest.raises(grader.GradingError, match='each of 8 completions'):
      it.check(verdicts)


def test_what_an_earlier_item_left_behind_is_not_the_next_ones_fault(plugins):
  # The first item is graded, and ends the process during the second.
  with grader.Grader(('hostile.task', {})) as it:
    results = it.grade(['later', 'sleep 0.4', 'yes'], _examples(3))
    assert [result['verdict'] for result in results] == [
        'correct', 'wrong', 'correct']
    # A worker that died between two calls is replaced.
    os.kill(int(results[2]['pid']), signal.SIGKILL)
    time.sleep(0.05)
    assert it.grade(['yes'], _examples(1))[0]['verdict'] == 'correct'


def test_few_faults_are_no_alarm(plugins, caplog):
  with (caplog.at_level(logging.WARNING, logger='absl'),
        grader.Grader(('hostile.task', {})) as it):
    it.grade(['yes'] * 99 + ['raise'], _examples(100))
    assert len(caplog.messages) == 1  # of the item
    it.grade(['yes'] * 98 + ['raise'], _examples(99))
    assert '0 timeouts and 1 crashes in 99 items' in caplog.messages[-1]


def test_a_process_that_grew_large_grades_no_other_item(plugins):
  with grader.Grader(('hostile.task', {})) as it:
    results = it.grade(['no', 'large', 'yes', 'yes'], _examples(4))
  assert [result['verdict'] for result in results] == [
      'wrong', 'wrong', 'correct', 'correct']
  assert results[0]['pid'] == results[1]['pid'] != results[2]['pid']
  assert results[2]['pid'] == results[3]['pid']


def test_a_hostile_batch_ends_and_leaves_the_parent_as_it_was(plugins):
  texts = [f'x</think>\\boxed{{{text}}}' for text in _HOSTILE] * 8
  texts += [r'x</think>\boxed{\log_2 8}', r'\boxed{3}']
  with grader.Grader(('hostile.boxed', {})) as it:
    it.grade(texts[-1:], _examples(1, '3'))
    before, start = _memory(), time.perf_counter()
    results = it.grade(texts, _examples(len(texts), '3'))
    assert time.perf_counter() - start < 30.0  # about 1 on an idle machine
  assert _memory() - before < 2**25
  verdicts = [result['verdict'] for result in results]
  assert set(verdicts[:-2]) == {'wrong', 'unparsed'}
  assert verdicts[-2:] == ['correct', 'unparsed']  # the last one only thought


def test_a_call_that_fails_whole_has_all_names(plugins):
  with grader.Grader(('hostile.task', {}), names=('boxed',)) as it:
    (result,) = it.grade(['raise'], _examples(1))
  assert result == {'verdict': 'crash', 'correct': 0.0, 'boxed': 0.0}


def test_close_ends_the_workers_and_grade_starts_them_again(plugins):
  it = grader.Grader(('hostile.task', {}))
  it.start()
  pid = int(it.grade(['yes'], _examples(1))[0]['pid'])
  assert _alive(pid)
  it.close()
  it.close()
  assert not _alive(pid)
  # An error half-way ends them too: no late answer meets a later item.
  with pytest.raises(TypeError):
    it.grade(['yes', 'yes'],
             [*_examples(1), types.Example('q', object())])
  assert it.grade(['no'], _examples(1))[0]['verdict'] == 'wrong'
  it.close()


def test_workers_die_with_their_parent(plugins):
  # The parent is killed while one worker waits and the other one hangs with
  # the interpreter's lock held.
  code = ('from lapo_jax import grader, grading_worker, types\n'
          'e = types.Example("q", "yes")\n'
          'it = grader.Grader(("hostile.task", {}), num_workers=2, '
          'deadline=1.0)\n'
          'it.grade(["yes"], [e])\n'
          'print(*(x._process.pid for x in it._workers), flush=True)\n'
          'it.grade(["regex"], [e])\n')
  environment = os.environ | {'PYTHONPATH': os.pathsep.join(sys.path)}
  with subprocess.Popen([sys.executable, '-c', code], env=environment,
                        stdout=subprocess.PIPE) as parent:
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    time.sleep(0.2)
    parent.kill()
  assert len(pids) == 2
  end = time.monotonic() + 10.0
  while any(map(_alive, pids)) and time.monotonic() < end:
    time.sleep(0.05)
  assert not any(map(_alive, pids))


def test_a_worker_that_cannot_start_says_why(plugins, monkeypatch):
  for name, settings, message in (
      ('hostile.task', {'fail': 'no data there'}, 'ValueError: no data there'),
      ('hostile.task', {'typo': 1}, "has no setting .*typo"),
      ('no_such_task', {}, "unknown name 'no_such_task' in tasks")):
    with (grader.Grader((name, settings)) as it,
          pytest.raises(RuntimeError, match=message)):
      it.grade(['yes'], _examples(1))
  monkeypatch.setattr(grading_worker, '_STARTUP', 0.3)
  with (grader.Grader(('hostile.task', {'wait': 1000.0})) as it,
        pytest.raises(RuntimeError, match=re.escape('start (timeout)'))):
    it.grade(['yes'], _examples(1))


def test_what_is_wrong_at_build(warm):
  with pytest.raises(ValueError, match='2 completions and 1 examples'):
    warm.grade(['a', 'b'], _examples(1))
  with pytest.raises(ValueError, match='num_workers >= 1'):
    grader.Grader(('x', {}), num_workers=0)
  with pytest.raises(ValueError, match='deadline > 0'):
    grader.Grader(('x', {}), deadline=0.0)
  with pytest.raises(ValueError, match='JSON values only'):
    grader.Grader(('x', {'path': object()}))


@pytest.mark.parametrize('grades, error', [
    ({}, KeyError), ({'correct': 2.0}, ValueError),
    ({'correct': -1}, ValueError), ({'correct': float('nan')}, ValueError),
    ({'correct': 1.0, 'other': float('inf')}, ValueError),
    ({'correct': 'yes'}, ValueError),
])
def test_a_grade_must_be_a_grade(grades, error):
  with pytest.raises(error):
    grading_worker.grades(lambda text, example: grades, None, 'x',
                          *_examples(1))
