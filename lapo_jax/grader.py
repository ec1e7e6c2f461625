# SPDX-License-Identifier: Apache-2.0
"""Grades hostile text in processes of its own: one verdict per item, no hang.

Each worker is a fresh interpreter (`python -m lapo_jax.grader`) with a
scrubbed environment and a memory limit. It builds the task, and the method
whose `read` it runs, from names and settings; all else travels as JSON lines
over pipes. A worker holds one item at a time, so an item's deadline is its
own; a round trip costs about a tenth of a millisecond.

After any fault (deadline passed, process dead, exception in the task) the
worker is killed and replaced. If that worker had graded before, what broke it
may have been left behind by an earlier item: the item is tried once more, and
what happens on the fresh worker is its verdict.

The wall is the process: a task that executes model text can still forge
grades inside its worker. Ours do not; see `tasks/_answers.py`.
"""

import collections
from collections.abc import Callable
import contextlib
import faulthandler
import json
import math
import operator
import os
import resource
import selectors
import signal
import subprocess
import sys
import time
from typing import Any

from absl import logging

from lapo_jax import plugins, types

VERDICTS = ('correct', 'wrong', 'unparsed', 'timeout', 'crash')

_STARTUP = 120.0            # seconds for imports and for reading the data set
_MEMORY = 4 * 2**30         # bytes of address space of a worker
_MAX_REPLY = 2**20          # bytes
_ERRORS = 4000              # bytes kept of what a worker last wrote to stderr
_LOGGED = 500               # characters of it that are logged for an item
_CHUNK = 2**16              # bytes per read: what a pipe holds
_INHERITED = ('PATH', 'HOME', 'LANG', 'LD_LIBRARY_PATH')


class Grader:
  """A task's grading, and a method's `read`, in worker processes.

  Workers start at the first `grade`, or at `start`; they end with `close`,
  with the `with` block, or when this process dies.

  Attributes:
    counts: number of items of the last call, by verdict.
  """

  def __init__(self, task: tuple[str, dict],
               reward: tuple[str, dict] | None = None,
               num_workers: int = 1, deadline: float = 5.0):
    """Keeps the settings; starts nothing.

    Args:
      task: name of the task and the settings of its `make`, JSON values.
      reward: the same of the method whose `read` is wanted, None = no read.
      num_workers: processes.
      deadline: seconds an item may take.

    Raises:
      ValueError: no workers, no time, or settings that JSON cannot hold.
    """
    if num_workers < 1 or deadline <= 0:
      raise ValueError('expected num_workers >= 1 and deadline > 0 seconds, '
                       f'got {num_workers} and {deadline}.')
    try:
      self._hello = _encode([task, reward, deadline])
    except (TypeError, ValueError) as error:
      raise ValueError('expected settings of JSON values only, got '
                       f'{task} and {reward}: {error}') from error
    self._num_workers = num_workers
    self._deadline = deadline
    self._selector = selectors.DefaultSelector()
    self._workers: list[_Worker] = []
    self.counts = dict.fromkeys(VERDICTS, 0)

  def __enter__(self) -> 'Grader':
    return self

  def __exit__(self, *error: Any) -> None:
    self.close()

  def start(self) -> None:
    """Starts the workers that are not running, and does not wait for them."""
    while len(self._workers) < self._num_workers:
      self._workers.append(_Worker(self._selector, self._hello))

  def close(self) -> None:
    """Ends the workers; a later `grade` starts new ones."""
    while self._workers:
      self._workers.pop().close()

  def grade(self, completions: list[str],
            examples: list[types.Example]) -> list[dict[str, Any]]:
    """Grades completions, each against its example.

    Returns:
      For each completion, in order: 'verdict', one of `VERDICTS`; 'correct'
      in [0, 1]; the task's other grades and what the method read, floats by
      name (of one name, the task's stands). The verdict 'correct' means full
      marks. All items of a call have the same names: what a timeout or crash
      hid is 0.0.

    Raises:
      ValueError: not as many examples as completions.
      RuntimeError: a worker cannot start; the message ends with its stderr.
    """
    if len(completions) != len(examples):
      raise ValueError(f'got {len(completions)} completions and '
                       f'{len(examples)} examples, expected one for each.')

    def line(item: int) -> bytes:
      return _encode([item, completions[item], vars(examples[item])])

    try:
      results = self._run(len(completions), line)
    except BaseException:
      self.close()  # what is in flight must not answer the next call
      raise
    found = [results[item] for item in range(len(completions))]
    self.counts = dict.fromkeys(VERDICTS, 0)
    for result in found:
      self.counts[result['verdict']] += 1
    zeros = dict.fromkeys((name for result in found for name in result), 0.0)
    return [zeros | result for result in found]

  def _run(self, num_items: int, line: Callable[[int], bytes]) -> dict:
    """The result of every item, by item, in the order they came in."""
    self.start()
    for worker in self._workers:
      worker.expect_start()
    waiting = collections.deque(range(num_items))
    results: dict[int, dict[str, Any]] = {}
    patience = 0.0  # first hear what was said since the last call
    while len(results) < num_items:
      for key, _ in self._selector.select(patience):
        key.data.pump(key.fileobj)
      for slot in range(self._num_workers):
        self._settle(slot, results)
        self._workers[slot].give(waiting, line, self._deadline)
      # Finite while items are left: an idle worker has just been given one.
      deadline = min(worker.deadline for worker in self._workers)
      patience = max(0.0, deadline - time.monotonic())
    return results

  def _settle(self, slot: int, results: dict) -> None:
    """Takes a worker's reply and replaces the worker after a fault."""
    worker = self._workers[slot]
    # The reply first: it may have come before a deadline that is now past.
    grades = worker.take_reply()
    if grades is not None:
      results[worker.item] = grades | {'verdict': _verdict(grades)}
      worker.item = None
    fault = worker.fault()
    if not fault:
      return
    said = self._workers.pop(slot).close()
    if not worker.ready:
      raise RuntimeError(f'a grading worker did not start ({fault}):\n{said}')
    fresh = _Worker(self._selector, self._hello)
    fresh.expect_start()
    self._workers.insert(slot, fresh)
    if worker.item is not None and worker.num_graded:
      fresh.item = worker.item
    elif worker.item is not None:
      results[worker.item] = {'verdict': fault, 'correct': 0.0}
      logging.warning('grading: %s on item %d. %s', fault, worker.item,
                      said[-_LOGGED:])


class _Worker:
  """One process, seen from outside; nothing here waits for it.

  Attributes:
    item: the item in hand, None = none. A fresh worker may hold one that it
      is still to be sent.
    ready: the process has built its task.
    num_graded: items answered.
    deadline: time.monotonic() by which it must answer, inf = it owes nothing.
  """

  def __init__(self, selector: selectors.BaseSelector, hello: bytes):
    self.item: int | None = None
    self.ready = False
    self.num_graded = 0
    self.deadline = math.inf
    self._dead = False
    self._inbox, self._errors = b'', b''
    # A session of its own: killed with all its children, deaf to Ctrl-C.
    # -P: modules come from our own path, not from the current folder.
    self._process = subprocess.Popen(
        [sys.executable, '-P', '-m', 'lapo_jax.grader'], bufsize=0,
        env=_environment(), start_new_session=True, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    self._stdin = self._process.stdin
    self._heard = (self._process.stdout, self._process.stderr)
    self._selector = selector
    for pipe in (self._stdin, *self._heard):
      os.set_blocking(pipe.fileno(), False)
    for pipe in self._heard:
      selector.register(pipe, selectors.EVENT_READ, self)
    self._send(hello)

  def expect_start(self) -> None:
    """Starts the clock of a starting worker, now that somebody listens."""
    if not self.ready:
      self.deadline = time.monotonic() + _STARTUP

  def give(self, waiting: collections.deque, line: Callable[[int], bytes],
           deadline: float) -> None:
    """Sends an idle worker its next item, to be done in `deadline` seconds."""
    if not self.ready or self.deadline < math.inf:
      return
    if self.item is None and waiting:
      self.item = waiting.popleft()
    if self.item is not None:
      self.deadline = time.monotonic() + deadline
      self._send(line(self.item))

  def pump(self, pipe: Any) -> None:
    """Moves what the pipe will take or give at once."""
    if pipe is self._stdin:
      self._selector.unregister(pipe)
      self._send(self._outbox)
      return
    data = pipe.read(_CHUNK)
    if data == b'':
      self._selector.unregister(pipe)
      self._dead |= pipe is self._process.stdout
    elif pipe is self._process.stderr:
      self._errors = (self._errors + (data or b''))[-_ERRORS:]
    else:
      self._inbox += data or b''
      self._dead |= len(self._inbox) > _MAX_REPLY

  def take_reply(self) -> dict[str, float] | None:
    """The grades of the item in hand, None while there are none."""
    line, newline, rest = self._inbox.partition(b'\n')
    if not newline:
      return None
    self._inbox = rest
    try:
      item, grades = json.loads(line)
    except (TypeError, ValueError):
      item, grades = math.nan, {}
    if item != (self.item if self.ready else None) or self.deadline == math.inf:
      self._dead = True  # not an answer to what was asked: do not trust it
      return None
    self.deadline = math.inf
    if not self.ready:
      self.ready = True
      return None
    self.num_graded += 1
    return grades

  def fault(self) -> str:
    """'crash', 'timeout', or '' if all is well."""
    if self._dead:
      return 'crash'
    return 'timeout' if time.monotonic() > self.deadline else ''

  def close(self) -> str:
    """Kills the process and its children; returns the end of its stderr."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
      os.killpg(self._process.pid, signal.SIGKILL)
    self._process.wait()
    errors = self._errors + (self._process.stderr.read(_CHUNK) or b'')
    for pipe in (self._stdin, *self._heard):
      if pipe in self._selector.get_map():
        self._selector.unregister(pipe)
      pipe.close()
    return errors[-_ERRORS:].decode('utf-8', 'replace').strip()

  def _send(self, line: bytes | memoryview) -> None:
    """Writes what fits into the pipe, the rest when it is drained."""
    try:
      sent = self._stdin.write(line) or 0
    except BrokenPipeError:
      return  # the end of its stdout will tell
    self._outbox = memoryview(line)[sent:]
    if self._outbox:
      self._selector.register(self._stdin, selectors.EVENT_WRITE, self)


def _verdict(grades: dict[str, float]) -> str:
  """The verdict on an item that was graded."""
  if grades['correct'] == 1.0:
    return 'correct'
  return 'wrong' if grades.get('parsed', 1.0) else 'unparsed'


def _encode(message: Any) -> bytes:
  """One line of ASCII; NumPy integers pass, lone surrogates too."""
  return json.dumps(message, default=operator.index).encode('ascii') + b'\n'


def _environment() -> dict[str, str]:
  """What a worker sees of our environment: no tokens, no accelerator."""
  kept = {name: os.environ[name] for name in _INHERITED if name in os.environ}
  # Our path as it stands, so that plug-ins from outside are found. One thread:
  # on a host of many cores BLAS alone would reserve the memory limit.
  return kept | {
      'PYTHONPATH': os.pathsep.join(path or os.getcwd() for path in sys.path),
      'JAX_PLATFORMS': 'cpu', 'OPENBLAS_NUM_THREADS': '1',
      'OMP_NUM_THREADS': '1'}


def _serve() -> None:
  """The worker: builds the task, then grades line by line until stdin ends.

  An exception ends it: the parent finds the traceback on stderr.
  """
  # Nothing the task prints or reads may touch the conversation.
  requests = os.fdopen(os.dup(0), 'rb')
  replies = os.fdopen(os.dup(1), 'wb', buffering=0)
  with open(os.devnull, 'rb') as nothing:
    os.dup2(nothing.fileno(), 0)
  os.dup2(2, 1)
  (name, settings), reward, deadline = json.loads(requests.readline())
  task = plugins.make('tasks', name, **settings)
  read = None
  if reward is not None:
    read = plugins.make('rewards', reward[0], **reward[1]).read
  for limit, most in ((resource.RLIMIT_AS, _MEMORY), (resource.RLIMIT_CORE, 0)):
    with contextlib.suppress(ValueError, OSError):  # not on every system
      resource.setrlimit(limit, (most, most))
  replies.write(_encode([None, {}]))
  for line in requests:
    item, completion, fields = json.loads(line)
    # An orphan in a hang has no parent to kill it. No signal and no lock of
    # the interpreter is needed for this one.
    faulthandler.dump_traceback_later(2 * deadline + 1, exit=True, file=2)
    grades = _grades(task.grade, read, completion, types.Example(**fields))
    faulthandler.cancel_dump_traceback_later()
    replies.write(_encode([item, grades]))


def _grades(grade: Callable, read: Callable | None, completion: str,
            example: types.Example) -> dict[str, float]:
  """What task and method find in a completion, checked."""
  found = dict(read(completion, example)) if read else {}
  found |= grade(completion, example)
  grades = {str(name): float(value) for name, value in found.items()}
  if not 0.0 <= grades['correct'] <= 1.0:
    raise ValueError(f'expected correct in [0, 1], got {grades["correct"]}.')
  if not all(math.isfinite(value) for value in grades.values()):
    raise ValueError(f'expected finite grades, got {grades}.')
  return grades


if __name__ == '__main__':
  _serve()
