# SPDX-License-Identifier: Apache-2.0
"""Several hosts: how they find one another, agree, and end together.

One process a host, all with the same program. What only one host can know, a
file that is there or the memory it has, never decides by itself: it is told
to all (`gather`), or process 0 decides for all (`from_first`), or an error on
one host becomes an error on all (`in_step`). With one process each of these
is nothing but its argument.

What JAX does when a process dies: collectives of gloo and NCCL raise at once
in the others, see `leave`; on TPUs they wait, until the coordination service
misses the dead one's heartbeats and ends the others, with a line that says
so. If it is process 0 that dies, which holds the service, it ends them at
once.
"""

from collections.abc import Callable, Mapping
import hashlib
import importlib.metadata
import json
import os
import pathlib
import platform
import re
import sys
import time
import traceback
from typing import Any, NoReturn, TypeVar

import jax
from jax.experimental import multihost_utils
import numpy as np

_T = TypeVar('_T')
# Where they start by hand: address of process 0, how many, which one.
_VARIABLES = ('JAX_COORDINATOR_ADDRESS', 'JAX_NUM_PROCESSES', 'JAX_PROCESS_ID')
_FLAGS = ('--coordinator=host:port', '--num_hosts', '--host')
# What a program that the same source makes depends on.
_LIBRARIES = ('jax', 'jaxlib', 'flax', 'optax', 'numpy')
_SWITCHES = ('XLA_FLAGS', 'LIBTPU_INIT_ARGS', 'JAX_DEFAULT_MATMUL_PRECISION')
# Bytes; messages are padded to few sizes, for each is a program.
_LEAST_MESSAGE = 256
# What JAX's error says when it is another process that has gone.
_GONE = re.compile(r'gloo|nccl|coordination|heartbeat|distributed service|'
                   r'barrier|connection (closed|reset|refused)|'
                   r'socket closed|preempted', re.IGNORECASE)


class ElsewhereError(ValueError):
  """Another host has found a mistake; its text is in the message."""


class Stopped(RuntimeError):
  """The hosts were asked to end; what is done has been saved."""


class NotFoundError(RuntimeError):
  """The other hosts do not answer, or not yet."""


def initialize(coordinator: str = '', num_hosts: int = 0, host: int = -1,
               heartbeat_seconds: int = 30) -> None:
  """Joins the other hosts, if there are any; before any other call of JAX.

  By hand all three are given, as arguments or by the variables
  JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID. With none of
  them, TPU pods (Compute Engine and GKE), Slurm and Open MPI are recognised.
  One host alone joins nothing; `num_hosts` 1 asks for that.

  Args:
    coordinator: host:port of process 0; the port is free there.
    num_hosts: how many; 0 = not said.
    host: which one this is, from 0; -1 = not said.
    heartbeat_seconds: after so long without a sign of life a process counts
      as dead and the others end.

  Raises:
    ValueError: only some of the three are given, or they do not fit.
    NotFoundError: the others do not answer.
  """
  given = _given(coordinator, num_hosts, host)
  if given is None and not (num_hosts != 1 and _cluster()):
    return
  settings: dict[str, Any] = {'heartbeat_timeout_seconds': heartbeat_seconds}
  if given is not None:
    address, count, index = given
    if count == 1:
      return
    settings |= {'coordinator_address': address, 'num_processes': count,
                 'process_id': index, 'cluster_detection_method': 'deactivate'}
  elif 'JAX_LOCAL_DEVICE_IDS' not in os.environ:
    # All of the host's devices: under Slurm and MPI, JAX would take one.
    settings['local_device_ids'] = []
  try:
    jax.distributed.initialize(**settings)
  except (RuntimeError, ValueError, OSError) as error:
    raise NotFoundError(
        f'the other hosts were not found: {_line(error)}. Give all of '
        f'{", ".join(_FLAGS)}, or --num_hosts=1 for this host alone.'
    ) from error


def gather(value: Any) -> list[Any]:
  """A JSON value of each host, by host.

  Raises:
    ElsewhereError: instead of calling this, a host has failed `in_step`.
  """
  return _exchange({'value': value})


def in_step(work: Callable[[], _T]) -> _T:
  """What `work` returns here; where it raises on one host, all raise.

  Raises:
    ElsewhereError: it raised on another host.
  """
  found = _telling(work)
  gather(None)
  return found


def from_first(work: Callable[[], _T]) -> _T:
  """What `work`, run on process 0 alone, returns: a JSON value, told to all.

  Raises:
    ElsewhereError: on the others, where it raised.
  """
  if jax.process_count() == 1:
    return work()
  first = jax.process_index() == 0
  return gather(_telling(work) if first else None)[0]


def compare(facts: Mapping[str, Any]) -> None:
  """Checks that facts, JSON values by name, are the same on every host.

  Raises:
    ValueError: they are not; it names the host and the facts.
  """
  digests = {name: hashlib.sha256(json.dumps(
      fact, sort_keys=True).encode()).hexdigest()
             for name, fact in facts.items()}
  first, *others = gather(digests)
  for host, theirs in enumerate(others, 1):
    differ = [name for name in sorted({*first, *theirs})
              if first.get(name) != theirs.get(name)]
    if differ:
      raise ValueError(
          f'host {host} differs from host 0 in its {", ".join(differ)}: every '
          'host must run the same code with the same config on the same data.')


def compare_start(config: str) -> None:
  """Checks that every host runs the same code with the same config, a text.

  Before anything is built: hosts that differ would ask one another for
  different things.

  Raises:
    ValueError: as `compare`.
  """
  if jax.process_count() > 1:
    compare({**software(), 'config': config})


def software() -> dict[str, Any]:
  """What this host runs: versions, switches, and a digest of the package."""
  digest = hashlib.sha256()
  root = pathlib.Path(__file__).parent
  for file in sorted(root.rglob('*.py')):
    digest.update(str(file.relative_to(root)).encode() + file.read_bytes())
  return {
      'versions': {'python': platform.python_version(),
                   **{name: importlib.metadata.version(name)
                      for name in _LIBRARIES}},
      'switches': {name: os.environ.get(name, '') for name in _SWITCHES},
      'code': digest.hexdigest()}


def asked_to_stop(step: int) -> bool:
  """Whether all hosts end after this step: one of them was sent SIGTERM.

  Called after every step, or chunk of an evaluation. JAX tells the others and
  chooses the step, a few ahead of the signal. One process alone is ended by
  the signal itself.
  """
  return (jax.process_count() > 1 and
          multihost_utils.reached_preemption_sync_point(step))


def leave(error: BaseException) -> NoReturn:
  """Ends this process at once, for it cannot go on without the others.

  One line if another host has gone, else the traceback first. The usual end
  would wait for the dead.
  """
  lost = isinstance(error, RuntimeError) and _GONE.search(str(error))
  if not lost:
    traceback.print_exception(error)
  what = 'another host is gone' if lost else 'failed'
  print(f'{name()}: {what} ({_line(error)}). The same command, on all hosts '
        'again, goes on from the last checkpoint.', file=sys.stderr)
  sys.stdout.flush()
  sys.stderr.flush()
  if jax.process_index() == 0:
    time.sleep(2)  # with it the service ends, and the others' words
  os._exit(3)


def several() -> bool:
  """Whether `initialize` has found other hosts; touches no device else."""
  return jax.distributed.is_initialized() and jax.process_count() > 1


def name() -> str:
  """How a line on stderr begins: which host says it, if there are several."""
  if several():
    return f'lapo_jax: host {jax.process_index()} of {jax.process_count()}'
  return 'lapo_jax'


def _given(coordinator: str, num_hosts: int,
           host: int) -> tuple[str, int, int] | None:
  """(address, count, index) as given by hand, None without."""
  address, count, index = (os.environ.get(name, '') for name in _VARIABLES)
  found = (coordinator or address, str(num_hosts or count),
           str(host) if host >= 0 else index)
  if num_hosts == 1 or not any(found):
    return None
  if not all(found):
    lacking = [flag for flag, value in zip(_FLAGS, found, strict=True)
               if not value]
    raise ValueError(f'several hosts need all of {", ".join(_FLAGS)} (or of '
                     f'{", ".join(_VARIABLES)}); got no {lacking[0]}.')
  if not (found[1].isdigit() and found[2].isdigit() and
          int(found[2]) < int(found[1]) and re.search(r':\d+$', found[0])):
    raise ValueError(f'coordinator {found[0]}, {found[1]} hosts, host '
                     f'{found[2]}: expected host:port and a host from 0 to '
                     'the number of hosts - 1.')
  return found[0], int(found[1]), int(found[2])


def _cluster() -> bool:
  """Whether JAX can find the other hosts by itself, and there may be any."""
  variable = lambda name, default='': os.environ.get(name, default)
  several = lambda name: variable(name, '1') not in ('', '0', '1')
  workers = variable('TPU_PROCESS_ADDRESSES', variable('TPU_WORKER_HOSTNAMES'))
  if (several('OMPI_COMM_WORLD_SIZE') or several('MEGASCALE_NUM_SLICES') or
      (several('SLURM_NTASKS') and variable('SLURM_STEP_NODELIST')) or
      ',' in workers):
    return True
  # A TPU VM: only its metadata server knows whether it is one of several.
  devices = pathlib.Path('/dev')
  return (variable('JAX_PLATFORMS') in ('', 'tpu', 'tpu,cpu') and not workers
          and not variable('TPU_SKIP_MDS_QUERY') and
          (any(devices.glob('accel[0-9]*')) or
           any(devices.glob('vfio/[0-9]*'))))


def _telling(work: Callable[[], _T]) -> _T:
  """What `work` returns; what it raises is told to the others' `gather`."""
  try:
    return work()
  except Exception as error:
    # A second word would have nobody to hear it.
    if jax.process_count() > 1 and not getattr(error, 'told', False):
      error.told = True
      _exchange({'error': _line(error)})
    raise


def _exchange(message: dict[str, Any]) -> list[Any]:
  """The values of all messages; raises where one tells of an error."""
  if jax.process_count() == 1:
    return [message['value']]
  data = json.dumps(message).encode()
  sizes = multihost_utils.process_allgather(np.int32(len(data)))
  width = _LEAST_MESSAGE
  while width < sizes.max():
    width *= 2
  row = np.frombuffer(data.ljust(width), np.uint8)
  messages = [json.loads(bytes(row)) for row in
              multihost_utils.process_allgather(row)]
  errors = [f'host {host}: {found["error"]}'
            for host, found in enumerate(messages) if 'error' in found]
  if errors and 'error' not in message:
    error = ElsewhereError('; '.join(errors))
    error.told = True
    raise error
  return [found.get('value') for found in messages]


def _line(error: BaseException) -> str:
  return ' '.join(str(error).split()) or type(error).__name__
