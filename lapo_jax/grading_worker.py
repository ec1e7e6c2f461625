# SPDX-License-Identifier: Apache-2.0
"""A grading process, both ends of it: what the parent holds and what runs.

The process (`python -m lapo_jax.grading_worker`) builds the task, then grades
JSON lines. An exception ends it, and the parent finds the traceback on stderr:
after a MemoryError or a deadline of the task's own nobody knows in what state
the libraries are, so no later item may meet it. For the same reason a process
that has grown large ends between two items.
"""

import collections
from collections.abc import Callable
import contextlib
import faulthandler
import json
import math
import operator
import os
import pathlib
import resource
import selectors
import signal
import subprocess
import sys
import time
import traceback
from typing import Any

from lapo_jax import plugins, types

_STARTUP = 120.0     # seconds for imports and for reading the data set
_MEMORY = 4 * 2**30  # bytes of address space of a process
_GROWTH = 2**29      # bytes it may have grown when it begins another item
_TIMEOUT = 124       # its exit status after a TimeoutError, as of timeout(1)
_MAX_REPLY = 2**20   # bytes
_ERRORS = 4000       # bytes kept of what it last wrote to stderr
_CHUNK = 2**16       # bytes per read: what a pipe holds
_INHERITED = ('PATH', 'HOME', 'LANG', 'LD_LIBRARY_PATH')


class Worker:
  """One process, seen from outside; only `close` waits for it.

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
        [sys.executable, '-P', '-m', 'lapo_jax.grading_worker'], bufsize=0,
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
    late = time.monotonic() > self.deadline
    if self._dead and self._process.returncode != _TIMEOUT:
      return 'crash'
    return 'timeout' if late or self._dead else ''

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


def serve() -> None:
  """Reads items from stdin until it ends, writes their grades to stdout."""
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
  replies.write(encode([None, {}]))
  large = _peak_memory() + _GROWTH
  for line in requests:
    item, completion, fields = json.loads(line)
    # An orphan in a hang has no parent to kill it. No signal and no lock of
    # the interpreter is needed for this one.
    faulthandler.dump_traceback_later(2 * deadline + 1, exit=True, file=2)
    try:
      found = grades(task.grade, read, completion, types.Example(**fields))
    except TimeoutError:
      traceback.print_exc()
      sys.stderr.flush()
      os._exit(_TIMEOUT)
    faulthandler.cancel_dump_traceback_later()
    replies.write(encode([item, found]))
    if _peak_memory() > large:
      return


def grades(grade: Callable, read: Callable | None, completion: str,
           example: types.Example) -> dict[str, float]:
  """What task and method find in a completion, checked."""
  found = dict(read(completion, example)) if read else {}
  found |= grade(completion, example)
  checked = {str(name): float(value) for name, value in found.items()}
  if not 0.0 <= checked['correct'] <= 1.0:
    raise ValueError(f'expected correct in [0, 1], got {checked["correct"]}.')
  if not all(math.isfinite(value) for value in checked.values()):
    raise ValueError(f'expected finite grades, got {checked}.')
  return checked


def _peak_memory() -> int:
  """Bytes."""
  try:
    status = pathlib.Path('/proc/self/status').read_text()
  except OSError:  # not Linux; there, bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  # Not ru_maxrss: on Linux a process starts with that of its parent.
  return 1024 * int(status.partition('VmHWM:')[2].split()[0])


def encode(message: Any) -> bytes:
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


if __name__ == '__main__':
  serve()
