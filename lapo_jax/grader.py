# SPDX-License-Identifier: Apache-2.0
"""Grades hostile text in processes of its own: one verdict per item, no hang.

Each worker is a fresh interpreter (`grading_worker`) with a scrubbed
environment and a memory limit. It builds the task, and the method whose
`read` it runs, from names and settings; all else travels as JSON lines over
pipes. A worker holds one item at a time, so an item's deadline is its own; a
round trip costs about a tenth of a millisecond.

After any fault (deadline passed, process dead, exception in the task, which
may be a TimeoutError of the task's own deadline) the worker is killed and
replaced. If that worker had graded before, what broke it
may have been left behind by an earlier item: the item is tried once more, and
what happens on the fresh worker is its verdict.

The wall is the process: a task that executes model text can still forge
grades inside its worker. Ours do not; see `tasks/_answers.py`.
"""

import collections
from collections.abc import Callable, Collection, Sequence
import selectors
import time
from typing import Any

from absl import logging

from lapo_jax import grading_worker, types

VERDICTS = ('correct', 'wrong', 'unparsed', 'timeout', 'crash')

_ALARM = 0.01               # share of faults in a call that is logged
_LOGGED = 500               # characters of it that are logged for an item
_FEW = 8                    # completions that may all crash by themselves


class GradingError(RuntimeError):
  """What grades is at fault, not what is graded."""


class Grader:
  """A task's grading, and a method's `read`, in worker processes.

  Workers start at the first `grade`, or at `start`; they end with `close`,
  with the `with` block, or when this process dies.

  Attributes:
    counts: number of items of the last call, by verdict.
  """

  def __init__(self, task: tuple[str, dict],
               reward: tuple[str, dict] | None = None,
               num_workers: int = 1, deadline: float = 5.0,
               names: Collection[str] = ()):
    """Keeps the settings; starts nothing.

    Args:
      task: name of the task and the settings of its `make`, JSON values.
      reward: the same of the method whose `read` is wanted, None = no read.
      num_workers: processes.
      deadline: seconds an item may take.
      names: grades that every item shall have, should all of a call fail.

    Raises:
      ValueError: no workers, no time, or settings that JSON cannot hold.
    """
    if num_workers < 1 or deadline <= 0:
      raise ValueError('expected num_workers >= 1 and deadline > 0 seconds, '
                       f'got {num_workers} and {deadline}.')
    try:
      self._hello = grading_worker.encode([task, reward, deadline])
    except (TypeError, ValueError) as error:
      raise ValueError('expected settings of JSON values only, got '
                       f'{task} and {reward}: {error}') from error
    self._num_workers = num_workers
    self._deadline = deadline
    self._names = tuple(names)
    self._selector = selectors.DefaultSelector()
    self._workers: list[grading_worker.Worker] = []
    self.counts = dict.fromkeys(VERDICTS, 0)

  def __enter__(self) -> 'Grader':
    return self

  def __exit__(self, *error: Any) -> None:
    self.close()

  def start(self) -> None:
    """Starts the workers that are not running, and does not wait for them."""
    while len(self._workers) < self._num_workers:
      self._workers.append(grading_worker.Worker(self._selector, self._hello))

  def close(self) -> None:
    """Ends the workers; a later `grade` starts new ones."""
    while self._workers:
      self._workers.pop().close()

  def grade(self, completions: list[str], examples: list[types.Example],
            whole: bool = True) -> list[dict[str, Any]]:
    """Grades completions, each against its example.

    Args:
      completions: their texts.
      examples: one for each.
      whole: whether this is all that there is; of a part of it the caller
        gives the verdicts to `check`, with those of the others.

    Returns:
      For each completion, in order: 'verdict', one of `VERDICTS`; 'correct'
      in [0, 1]; the task's other grades and what the method read, floats by
      name (of one name, the task's stands). The verdict 'correct' means full
      marks. All items of a call have the same names: what a timeout or crash
      hid is 0.0.

    Raises:
      ValueError: not as many examples as completions.
      RuntimeError: a worker cannot start; the message ends with its stderr.
      GradingError: every completion crashed its worker.
    """
    if len(completions) != len(examples):
      raise ValueError(f'got {len(completions)} completions and '
                       f'{len(examples)} examples, expected one for each.')

    def line(item: int) -> bytes:
      return grading_worker.encode(
          [item, completions[item], vars(examples[item])])

    try:
      results = self._run(len(completions), line)
    except BaseException:
      self.close()  # what is in flight must not answer the next call
      raise
    found = [results[item] for item in range(len(completions))]
    self.counts = dict.fromkeys(VERDICTS, 0)
    for result in found:
      self.counts[result['verdict']] += 1
    if whole:
      self.check([result['verdict'] for result in found])
    zeros = dict.fromkeys(
        (*self._names, *(name for result in found for name in result)), 0.0)
    return [zeros | result for result in found]

  def check(self, verdicts: Sequence[str]) -> None:
    """Says so when faults are no longer rare: they are scored as wrong.

    Args:
      verdicts: of all that was to be graded, in whatever parts.

    Raises:
      GradingError: every completion crashed its worker.
    """
    total = len(verdicts)
    timeouts, crashes = (sum(verdict == fault for verdict in verdicts)
                         for fault in ('timeout', 'crash'))
    if crashes == total >= _FEW:
      raise GradingError(
          f'grading: each of {total} completions crashed its worker, which is '
          'no fault of theirs: mend `grade` of the task or `read` of the '
          'method by the warnings above, and give the same command again.')
    if timeouts + crashes > _ALARM * total:
      logging.warning(
          'grading: %d timeouts and %d crashes in %d items, over %g %%: their '
          'grades are 0, read the warnings above.', timeouts, crashes, total,
          100 * _ALARM)

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
    fault = worker.fault()  # the dead say more
    if not worker.ready:
      raise RuntimeError(f'a grading worker did not start ({fault}):\n{said}')
    fresh = grading_worker.Worker(self._selector, self._hello)
    fresh.expect_start()
    self._workers.insert(slot, fresh)
    if worker.item is not None and worker.num_graded:
      fresh.item = worker.item
    elif worker.item is not None:
      results[worker.item] = {'verdict': fault, 'correct': 0.0}
      logging.warning('grading: %s on item %d. %s', fault, worker.item,
                      said[-_LOGGED:])


def _verdict(grades: dict[str, float]) -> str:
  """The verdict on an item that was graded."""
  if grades['correct'] == 1.0:
    return 'correct'
  return 'wrong' if grades.get('parsed', 1.0) else 'unparsed'
