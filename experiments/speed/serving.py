# SPDX-License-Identifier: Apache-2.0
"""A peer in a process and an environment of its own, asked in JSON lines.

It loads the weights once and then waits for one request at a time: runs of
several peers can take turns while none of them has to start again.
"""

from collections.abc import Callable
import importlib.metadata
import json
import os
import subprocess
import sys
import time
from typing import Any, Protocol

import numpy as np

from experiments.speed import points

# Nothing is fetched or reported, nothing compiled before is used again.
_SETTINGS = {
    'JAX_PLATFORMS': 'cpu', 'CUDA_VISIBLE_DEVICES': '',
    'HF_HUB_OFFLINE': '1', 'HF_HUB_DISABLE_TELEMETRY': '1',
    'TOKENIZERS_PARALLELISM': 'false',
    # Freed memory stays with the process. A cache that grows by copying is
    # freed at every step, and new pages from the system can cost more than
    # the step.
    'MALLOC_MMAP_MAX_': '0', 'MALLOC_TRIM_THRESHOLD_': str(10**11)}
_LEFT_OUT = ('JAX_COMPILATION_CACHE_DIR', 'JAX_NUM_CPU_DEVICES',
             'OMP_NUM_THREADS', 'XLA_FLAGS')


class Peer(Protocol):
  """A sampler or trainer; made with a model's folder and its work."""

  # Distributions whose versions are reported.
  libraries: tuple[str, ...]

  def run(self, seed: int) -> dict[str, Any]:
    """Does its work once; returns when all of it is done.

    'facts' of what it returns are reported: numbers by name, of which
    `<part>_seconds` is the time of a part of the run.
    """

  def compared(self, result: dict[str, Any]) -> dict[str, np.ndarray]:
    """What others are to have alike, by name; not timed.

    Of a sampler tokens and logprobs [n, longest] of `work.compared`.
    """


def serve(make: Callable[[str, Any], Peer],
          load: Callable[[str], Any] = points.load) -> None:
  """Runs a peer whenever a line asks for it, until there are no more.

  Args:
    make: the peer, of a model's folder and its work.
    load: reads the work from a file.
  """
  # Libraries print to stdout.
  replies = os.fdopen(os.dup(1), 'w')
  os.dup2(2, 1)

  def reply(**values):
    print(json.dumps(values), file=replies, flush=True)

  folder, work = sys.argv[1:]
  peer = make(folder, load(work))
  reply(versions={name: importlib.metadata.version(name)
                  for name in peer.libraries})
  for line in sys.stdin:
    request = json.loads(line)
    start = time.perf_counter()
    result = peer.run(request['seed'])
    seconds = time.perf_counter() - start
    if request['compared']:
      np.savez(request['compared'], **peer.compared(result))
    reply(seconds=seconds, facts=result['facts'])


class Process:
  """The other end of `serve`."""

  def __init__(self, python: str, module: str, folder: str, work: str):
    kept = {name: value for name, value in os.environ.items()
            if name not in _LEFT_OUT}
    self._process = subprocess.Popen(
        [python, '-W', 'ignore', '-m', module, folder, work],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**kept, **_SETTINGS})
    self._module = module
    self.versions = self._read()['versions']

  def run(self, seed: int, compared: str = '') -> dict[str, Any]:
    """One run: its seconds and facts; `compared` goes to a file if named."""
    print(json.dumps({'seed': seed, 'compared': compared}),
          file=self._process.stdin, flush=True)
    return self._read()

  def cpu_seconds(self) -> float:
    """CPU time so far, of all its threads."""
    with open(f'/proc/{self._process.pid}/stat') as file:
      # The name, in brackets, may hold spaces.
      fields = file.read().rpartition(')')[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf('SC_CLK_TCK')

  def close(self) -> None:
    """Ends the process."""
    self._process.stdin.close()
    self._process.wait()

  def _read(self) -> dict[str, Any]:
    line = self._process.stdout.readline()
    if not line:
      raise RuntimeError(f'{self._module} ended with code '
                         f'{self._process.wait()}; see what it printed.')
    return json.loads(line)
