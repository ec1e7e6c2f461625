# SPDX-License-Identifier: Apache-2.0
"""Saving a training state, and restoring the newest one that is whole.

A checkpoint is one folder, `<serial>-step-<step>`, with two Orbax items:
`state`, the arrays, and `record`, a JSON text with the caller's `meta`, the
metric, and of every leaf its shape, dtype and fingerprint. Array bytes carry no
checksum on disk: the fingerprints are what tells a damaged checkpoint.

Orbax commits by renaming a finished folder (by a commit file on gs://), so a
process killed at any moment leaves whole checkpoints and ignorable leftovers.
Its `CheckpointManager` is not used: it refuses steps up to the latest and a
step that exists must be deleted before it is saved again, which a kill turns
into a loss; and it fails to start when one metric file is unreadable. Its
`Checkpointer`, below it, has none of this. Counting saves instead of steps
gives order: a save after a roll-back is simply newer than what it replaces,
which goes only once the new one is on disk.

Random states are never saved: they follow from (seed, step).
"""

from collections.abc import Callable, Iterator, Sequence
import contextlib
import gc
import json
import logging
import math
import os
import re
import sys
import time
from typing import Any, NamedTuple
import zlib

from absl import logging as absl_logging
from etils import epath
import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
from jaxtyping import Array, Shaped, UInt32
import numpy as np
import orbax.checkpoint as ocp

from lapo_jax import hosts

# How many of the newest checkpoints stay, beside the best one.
_NUM_LATEST = 2
_NAME = re.compile(r'(\d+)-step-(\d+)')


class DamagedError(RuntimeError):
  """What was saved is not what can be read."""


def save(folder: str | os.PathLike, step: int, state: Any, meta: dict,
         metric: float | None = None) -> None:
  """Writes a checkpoint and returns once it is on disk and committed.

  Keeps the latest two and the best by `metric`; checkpoints of this step or
  later ones, left over from before a roll-back, are replaced. Every process of
  a run calls this with its own view of the same arrays.

  Args:
    folder: where the run's checkpoints lie; made if missing.
    step: completed steps, names the checkpoint.
    state: tree of `jax.Array`, however sharded; no random keys.
    meta: what else to remember, as `json.dumps` takes it.
    metric: quality, higher is better; None or NaN = never the best.

  Raises:
    TypeError: `meta` is not JSON, or a leaf is not an array of numbers.
    ValueError: a leaf has no elements; Orbax stores none.
  """
  folder = _absolute(folder)
  for path, leaf in _leaves(state).items():
    if not isinstance(leaf, jax.Array) or jnp.issubdtype(
        leaf.dtype, jax.dtypes.prng_key):
      raise TypeError(f'state{path}: got {getattr(leaf, "dtype", leaf)}, '
                      'expected a jax.Array of numbers; random keys are made '
                      'again from (seed, step)')
  prints = fingerprint(state)
  if metric is not None and math.isnan(metric):
    metric = None
  text = json.dumps({
      'meta': meta,
      'metric': metric,
      'leaves': {path: [_describe(leaf), prints[path]]
                 for path, leaf in _leaves(state).items()},
  })
  record = {'text': text, 'crc32': zlib.crc32(text.encode())}
  serial = hosts.from_first(lambda: _make_way(folder))
  with _quiet(), ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as writer:
    writer.save(
        folder / f'{serial:06d}-step-{step}',
        args=ocp.args.Composite(state=ocp.args.StandardSave(state),
                                record=ocp.args.JsonSave(record)))
  if jax.process_index() == 0:
    _prune(folder, serial, step)
  multihost_utils.sync_global_devices('lapo_jax_checkpoint_pruned')


def restore_latest(folder: str | os.PathLike, like: Any,
                   field: str = '') -> tuple[Any, dict] | None:
  """Restores the newest checkpoint whose arrays are what was saved.

  A damaged one is passed over with a logged warning, for the next older.

  Args:
    folder: the folder given to `save`.
    like: tree of `jax.ShapeDtypeStruct`, each with the `sharding` to restore
      to; the shardings of the run that saved do not matter.
    field: restores this field of the saved state alone, e.g. 'params'; `like`
      is then its tree.

  Returns:
    (state, meta), or None when nothing has been saved.

  Raises:
    ValueError: the checkpoint is whole but of another tree, shape or dtype, or
      a leaf of `like` has no sharding.
    DamagedError: all checkpoints are damaged.
  """
  folder = _absolute(folder)
  for path, leaf in _leaves(like).items():
    if leaf.sharding is None:
      raise ValueError(f'like{path} has no sharding: got {leaf}, expected a '
                       'jax.ShapeDtypeStruct(shape, dtype, sharding=...)')
  # A listing is one host's view of a disk: process 0's counts for all.
  names = hosts.from_first(lambda: [
      entry.path.name for entry in _entries(folder) if entry.committed])
  reasons = []
  for entry in reversed([_entry(folder / name) for name in names]):
    record, reason = _attempt(_read_record, entry.path)
    if not reason:
      if field:
        record['leaves'] = {
            path.removeprefix(f'.{field}'): leaf
            for path, leaf in record['leaves'].items()
            if path.startswith((f'.{field}[', f'.{field}.'))}
      _check_same_tree(record, like, entry.path)
      state, reason = _attempt(_read_state, entry.path, like, field)
    if not reason:
      reason = _difference(state, record)
    if not reason:
      return state, record['meta']
    absl_logging.warning('Checkpoint of step %d is damaged, trying an older '
                         'one: %s (%s)', entry.step, entry.path, reason)
    reasons.append(f'step {entry.step}: {reason}')
  if reasons:
    raise DamagedError(f'all checkpoints in {folder} are damaged ('
                       f'{"; ".join(reasons)}); put back a copy, or start '
                       'over in an empty folder')
  return None


def restore_first(places: Sequence[tuple[str | os.PathLike, Any]],
                  field: str = '') -> tuple[int, Any, dict] | None:
  """`restore_latest` of the first folder that holds a whole checkpoint.

  One whose checkpoints are all damaged is passed over with a logged warning.

  Args:
    places: (folder, like) of each, in the order in which they are tried.
    field: as in `restore_latest`.

  Returns:
    (its number among the places, state, meta), or None when nothing has been
    saved in any.

  Raises:
    ValueError: as `restore_latest`.
    DamagedError: some hold checkpoints, and all of these are damaged.
  """
  damaged = None
  for i, (folder, like) in enumerate(places):
    try:
      found = restore_latest(folder, like, field)
    except DamagedError as error:
      absl_logging.warning('%s', error)
      damaged = damaged or error
      continue
    if found is not None:
      return i, *found
  if damaged:
    raise damaged
  return None


def fingerprint(tree: Any) -> dict[str, int]:
  """A number in [0, 2³²) for every array, by path; equal bits, equal number.

    Σᵢ mix(bitsᵢ ⊕ mix(i))  mod 2³²,   i the position in the unsharded array

  It depends on the position of every value, and not on the sharding. `mix` is
  a bijection, so one changed value is always seen. (A plain product of value
  and position hash is not enough: with odd hashes, 1.0 and -1.0, which differ
  in the highest bit alone, could be swapped unseen.)

  """
  # One after the other: on a CPU with virtual devices, sums in flight at once
  # wait for one another's threads for ever.
  return {path: int(_fingerprint(leaf)) for path, leaf in _leaves(tree).items()}


@jax.jit
def _fingerprint(leaf: Shaped[Array, '...']) -> UInt32[Array, '']:
  """See `fingerprint`. A jit per leaf: layers share their few shapes."""
  if leaf.dtype == jnp.bool_:
    bits = leaf.astype(jnp.uint32)
  else:
    width = {1: jnp.uint8, 2: jnp.uint16}.get(leaf.dtype.itemsize, jnp.uint32)
    bits = jax.lax.bitcast_convert_type(leaf, width).astype(jnp.uint32)
  # Built from iotas, not reshaped: every device makes its own part.
  index = jnp.zeros(bits.shape, jnp.uint32)
  for axis, size in enumerate(bits.shape):
    iota = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
    index = index * np.uint32(size) + iota
  return jnp.sum(_mix(bits ^ _mix(index)), dtype=jnp.uint32)


def _mix(bits: UInt32[Array, '...']) -> UInt32[Array, '...']:
  """The finaliser of MurmurHash3, a bijection of uint32."""
  bits = (bits ^ (bits >> 16)) * np.uint32(0x85EBCA6B)
  bits = (bits ^ (bits >> 13)) * np.uint32(0xC2B2AE35)
  return bits ^ (bits >> 16)


class _Entry(NamedTuple):
  """A folder that a save made; not committed = the save was killed."""

  serial: int
  step: int
  committed: bool
  path: epath.Path


def _entries(folder: epath.Path) -> list[_Entry]:
  """The checkpoints in `folder`, oldest first, with what kills left over."""
  return sorted(_entry(path) for path in
                (folder.iterdir() if folder.exists() else ())
                if _NAME.match(path.name))


def _entry(path: epath.Path) -> _Entry:
  match = _NAME.match(path.name)
  whole = match.end() == len(path.name)
  committed = whole and ocp.utils.is_checkpoint_finalized(path)
  return _Entry(int(match[1]), int(match[2]), committed, path)


def _make_way(folder: epath.Path) -> int:
  """Deletes what unfinished saves have left; the number of the next one.

  Before it writes: on a full disk each attempt would leave as much again.
  """
  entries = _entries(folder)
  for entry in entries:
    if not entry.committed:
      entry.path.rmtree()
  # They count: a deletion that others do not see yet must not be in the way.
  return 1 + max((entry.serial for entry in entries), default=0)


def _prune(folder: epath.Path, serial: int, step: int) -> None:
  """Deletes all but the latest, the best and foreign files."""
  entries = _entries(folder)
  valid = [entry for entry in entries if entry.committed and
           (entry.step < step or entry.serial == serial)]
  keep = valid[-_NUM_LATEST:]
  scored = []
  for entry in valid:
    # Whoever cannot say how good it is is not the best. Reading it here, not
    # remembering it, is what makes a resumed run know its best.
    with contextlib.suppress(Exception):
      metric = _read_record(entry.path)['metric']
      if metric is not None:
        scored.append((metric, entry))
  if scored:
    keep.append(max(scored)[1])
  for entry in entries:
    if entry not in keep:
      entry.path.rmtree()


# The readers call Orbax's handlers and not its `Checkpointer`, which makes all
# processes meet: `_prune` reads in one process alone, and after damage that
# only one of them sees, the others would wait for it.


def _read_record(path: epath.Path) -> dict:
  """What `save` noted beside the arrays; ValueError if it has changed."""
  record = ocp.JsonCheckpointHandler().restore(path / 'record')
  if zlib.crc32(record['text'].encode()) != record['crc32']:
    raise ValueError('the checksum of its record differs')
  return json.loads(record['text'])


def _read_state(path: epath.Path, like: Any, field: str) -> Any:
  """The arrays, or those of one field, on the shardings of `like`."""
  item = {field: like} if field else like
  args = ocp.args.PyTreeRestore(
      item=item, partial_restore=bool(field),
      restore_args=ocp.checkpoint_utils.construct_restore_args(item))
  with _quiet(), contextlib.closing(ocp.PyTreeCheckpointHandler()) as handler:
    state = handler.restore(path / 'state', args=args)
  return state[field] if field else state


def _difference(state: Any, record: dict) -> str:
  """Where the restored arrays are not what was saved; '' = nowhere."""
  for name, got in fingerprint(state).items():
    expected = record['leaves'][name][1]
    if got != expected:
      return f'fingerprint of {name}: got {got}, expected {expected}'
  return ''


def _check_same_tree(record: dict, like: Any, path: epath.Path) -> None:
  """ValueError naming the first leaf in which the two differ."""
  saved = {name: text for name, (text, _) in record['leaves'].items()}
  wanted = {name: _describe(leaf) for name, leaf in _leaves(like).items()}
  for name in sorted(saved.keys() | wanted.keys()):
    got, expected = (x.get(name, 'no such leaf') for x in (saved, wanted))
    if got != expected:
      raise ValueError(
          f'{path} is of another model: {name}: got {got}, expected '
          f'{expected}; use the config that saved it, or an empty folder')


def _attempt(read: Callable, *args: Any) -> tuple[Any, str]:
  """(result, ''), or (None, why it failed in this or another process).

  Damage shows as any error, from a missing file to a bad parse. All processes
  must take the same turn, or those that can read wait for those that cannot.
  """
  value, reason = None, ''
  hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
  try:
    value = read(*args)
  except Exception as error:
    message = ' '.join(str(error).split())
    reason = f'{type(error).__name__}: {message[:300]}'
  finally:
    # Orbax closes its event loop at the first failure, and each other read in
    # flight then prints a traceback nobody can catch. One reason is enough.
    if reason:
      time.sleep(0.05)
      gc.collect()
    sys.unraisablehook = hook
  every = hosts.gather(reason)
  reason = reason or next((f'host {host}: {found}' for host, found in
                           enumerate(every) if found), '')
  return value, reason


def _leaves(tree: Any) -> dict[str, Any]:
  """The leaves by path, e.g. `.params['embed']`."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


def _describe(leaf: Any) -> str:
  """E.g. 'float32[2,3]'."""
  return f'{leaf.dtype}[{",".join(map(str, leaf.shape))}]'


def _absolute(folder: str | os.PathLike) -> epath.Path:
  """Orbax takes no relative paths; gs:// ones are absolute as they stand."""
  remote = '://' in os.fspath(folder)
  return epath.Path(folder if remote else os.path.abspath(folder))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """Drops what Orbax logs below a warning: dozens of lines a save."""
  def keep(line: logging.LogRecord) -> bool:
    return line.levelno >= logging.WARNING or 'orbax' not in line.pathname
  logger = absl_logging.get_absl_logger()
  logger.addFilter(keep)
  try:
    yield
  finally:
    logger.removeFilter(keep)
