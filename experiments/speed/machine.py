# SPDX-License-Identifier: Apache-2.0
"""The machine, and who uses it; Linux, where /proc says so."""

import os
import pathlib
import platform
import time
from typing import Any

import numpy as np

from experiments.speed import serving

# Cores that anything else may use.
QUIET = 0.1
_PATIENCE = 600.0


def describe() -> dict[str, Any]:
  """Facts that a report keeps."""
  lines = pathlib.Path('/proc/cpuinfo').read_text().splitlines()
  models = {line.partition(':')[2].strip() for line in lines
            if line.startswith('model name')}
  return {'cpu': ', '.join(sorted(models)),
          'cores': len(os.sched_getaffinity(0)),
          'system': platform.platform(), 'python': platform.python_version()}


class Watch:
  """How many cores a peer, those that wait, and all else use.

  Args:
    running: the peer.
    waiting: those that wait.
  """

  def __init__(self, running: serving.Process, waiting: list):
    self._running = running
    self._waiting = waiting
    self._before = self._read()

  def cores(self) -> list[float]:
    """CPU seconds per second since the last time: of the three."""
    now = self._read()
    passed, self._before = now - self._before, now
    return (passed[1:] / passed[0]).tolist()

  def wait(self) -> None:
    """Until nothing else runs here, or for ten minutes."""
    end = time.monotonic() + _PATIENCE
    others = QUIET
    while others >= QUIET and time.monotonic() < end:
      self._before = self._read()
      time.sleep(1)
      others = self.cores()[2]

  def _read(self) -> np.ndarray:
    running = self._running.cpu_seconds()
    waiting = sum(peer.cpu_seconds() for peer in self._waiting)
    line = pathlib.Path('/proc/stat').read_text().splitlines()[0]
    user, nice, system, _, _, *interrupts = map(int, line.split()[1:8])
    machine = (user + nice + system + sum(interrupts)) / os.sysconf(
        'SC_CLK_TCK')
    return np.array([time.monotonic(), running, waiting,
                     machine - running - waiting - time.process_time()])
