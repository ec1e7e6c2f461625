# SPDX-License-Identifier: Apache-2.0
"""The mesh, and where arrays lie on it: the only room that knows.

Four axes: `data` (copies of the model), `fsdp` (parameters cut, batch cut),
`sequence` (the slots of a row cut, for long completions; parameters cut like
`fsdp`, since their gradients are summed over it anyway) and `tensor` (layers
cut). Big arrays are sharded by the model family's rules or over the batch
axes; everything shaped [P, G] is replicated. While a model samples, `sequence`
is one more batch axis: a step has one token a row.

`jax.jit` with shardings is what used to be called pjit.
"""

from collections.abc import Callable, Sequence
import contextlib
import math
import os
import pathlib
import re
from typing import Any

import flax.traverse_util
import jax
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np

AXES = ('data', 'fsdp', 'sequence', 'tensor')
# Bytes that a container may have, with version 2 of cgroups.
_CONTAINER = pathlib.Path('/sys/fs/cgroup/memory.max')
_BATCH_AXES = ('data', 'fsdp')
_SAMPLING_AXES = (*_BATCH_AXES, 'sequence')

# (regex on the parameter's path, how its axes lie on the mesh)
Rules = Sequence[tuple[str, PartitionSpec]]


def make_mesh(data: int = 1, fsdp: int = -1, sequence: int = 1,
              tensor: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
  """A mesh over all devices; one axis may be -1, "what is left".

  Of several TPU slices, the slow network between them carries `data` alone:
  each has whole copies of the model.

  Raises:
    ValueError: the axes do not multiply to the number of devices, or `data`
      does not to whole slices.
  """
  devices = jax.devices() if devices is None else devices
  asked = dict(zip(AXES, (data, fsdp, sequence, tensor), strict=True))
  sizes = list(asked.values())
  known = math.prod(s for s in sizes if s != -1)
  if sizes.count(-1) == 1 and known and len(devices) % known == 0:
    sizes[sizes.index(-1)] = len(devices) // known
  if math.prod(sizes) != len(devices) or min(sizes) < 1:
    raise ValueError(
        f'mesh {asked} does not fit {len(devices)} devices: expected axes '
        'whose product is that number; -1 takes what is left.')
  slices = len({getattr(d, 'slice_index', 0) for d in devices})
  # On GPUs a slice is a host: the order of devices puts `data` between them.
  if slices == 1 or devices[0].platform != 'tpu':
    grid = mesh_utils.create_device_mesh(
        sizes, devices=devices, allow_split_physical_axes=True)
  elif sizes[0] % slices:
    raise ValueError(
        f'mesh {asked} makes {sizes[0]} copies of the model on {slices} '
        f'slices: expected data to be a multiple of {slices}.')
  else:
    grid = mesh_utils.create_hybrid_device_mesh(
        [sizes[0] // slices, *sizes[1:]], [slices, 1, 1, 1], devices=devices,
        allow_split_physical_axes=True)
  # An Auto mesh by construction: jax.make_mesh's default axes are Explicit.
  return Mesh(grid, AXES)


def partition(rules: Rules, shapes: Any, mesh: Mesh) -> Any:
  """A NamedSharding for each parameter, by the first rule that matches.

  What a rule cuts over `fsdp` is cut over `sequence` too, or else over `fsdp`
  alone; an axis that does not divide evenly is left whole.

  Raises:
    ValueError: a parameter that no rule covers.
  """
  flat = flax.traverse_util.flatten_dict(shapes, sep='/')
  found = {path: NamedSharding(mesh, _fit(_rule(rules, path), leaf.shape,
                                          mesh))
           for path, leaf in flat.items()}
  return flax.traverse_util.unflatten_dict(found, sep='/')


def partition_like(params_shardings: Any, tree_shapes: Any, mesh: Mesh) -> Any:
  """Shardings of a tree that holds copies of the parameters' tree.

  An optimizer's moments lie as their parameters do; all else is replicated.
  """
  flat = flax.traverse_util.flatten_dict(params_shardings, sep='/')

  def sharding(path, leaf):
    keys = [str(getattr(k, 'key', '')) for k in path]
    for start in range(len(keys)):
      name = '/'.join(keys[start:])
      if name in flat and leaf.ndim:
        return flat[name]
    return replicated(mesh)

  return jax.tree_util.tree_map_with_path(sharding, tree_shapes)


def for_sampling(shardings: Any) -> Any:
  """The same shardings with `fsdp` dropped: decode would gather each step."""

  def drop(sharding):
    spec = (None if axes in ('fsdp', ('fsdp', 'sequence')) else axes
            for axes in sharding.spec)
    return NamedSharding(sharding.mesh, PartitionSpec(*spec))

  return jax.tree.map(drop, shardings)


def batch(mesh: Mesh) -> NamedSharding:
  """Rows cut over the batch axes."""
  return NamedSharding(mesh, PartitionSpec(_BATCH_AXES))


def sampling_batch(mesh: Mesh) -> NamedSharding:
  """Rows while they are sampled: cut over `sequence` too."""
  return NamedSharding(mesh, PartitionSpec(
      _SAMPLING_AXES if mesh.shape['sequence'] > 1 else _BATCH_AXES))


def slots(mesh: Mesh) -> NamedSharding:
  """[B, S, ...] in a forward pass: rows over the batch axes, slots cut."""
  return NamedSharding(mesh, PartitionSpec(_BATCH_AXES, 'sequence'))


def replicated(mesh: Mesh) -> NamedSharding:
  """The whole array on every device."""
  return NamedSharding(mesh, PartitionSpec())


def along(axis: str | None, function: Callable, cut: Sequence[int | None],
          out: Sequence[int]) -> Callable:
  """A function that each device of a mesh axis runs on its own part.

  For kernels, which the compiler does not cut. Called within `jax.shard_map`,
  where every other axis of the mesh is manual already.

  Args:
    axis: of the mesh; None = the function as it is.
    function: of arrays; returns a tuple of them.
    cut: which dimension of each argument lies over the axis; None = it is
      whole everywhere.
    out: likewise of each result.
  """
  if axis is None:
    return function
  spec = lambda dim: (PartitionSpec() if dim is None else
                      PartitionSpec(*[None] * dim, axis))
  return jax.shard_map(
      function, in_specs=tuple(map(spec, cut)), out_specs=tuple(map(spec, out)),
      axis_names={axis}, check_vma=False)


def batch_devices(mesh: Mesh) -> int:
  """Into how many parts a batch is cut."""
  return math.prod(mesh.shape[axis] for axis in _BATCH_AXES)


def sampling_devices(mesh: Mesh) -> int:
  """Into how many parts a batch is cut while it is sampled."""
  return math.prod(mesh.shape[axis] for axis in _SAMPLING_AXES)


def head_parts(kv_heads: int, tensor: int) -> int:
  """Into how many parts a tensor axis cuts key heads: all of it, or 1."""
  return tensor if kv_heads % tensor == 0 else 1


def device_memory(mesh: Mesh) -> int:
  """Bytes of memory that each of the mesh's devices has, the least of them.

  A CPU's devices share the host's, or what its container may have of it.
  """
  devices = [d for d in mesh.devices.flat if d.process_index ==
             jax.process_index()]
  stats = [d.memory_stats() for d in devices]
  if all(s and 'bytes_limit' in s for s in stats):
    return min(s['bytes_limit'] for s in stats)
  memory = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
  with contextlib.suppress(OSError, ValueError):  # no such file, or 'max'
    memory = min(memory, int(_CONTAINER.read_text()))
  return memory // len(devices)


def to_global(tree: Any, shardings: Any) -> Any:
  """Host arrays, the same on every host, as device arrays."""

  def put(array, sharding):
    array = np.asarray(array)
    return jax.make_array_from_callback(array.shape, sharding,
                                        lambda index: array[index])

  if isinstance(shardings, jax.sharding.Sharding):
    return jax.tree.map(lambda array: put(array, shardings), tree)
  return jax.tree.map(put, tree, shardings)


def local_rows(array: jax.Array) -> tuple[np.ndarray, np.ndarray]:
  """(row numbers, rows) of a batch-sharded array that this host holds.

  A row that several devices hold comes once.
  """
  parts = {}
  for shard in array.addressable_shards:
    start = shard.index[0].start or 0
    if start not in parts:
      parts[start] = np.asarray(shard.data)
  rows = [np.arange(start, start + len(parts[start]))
          for start in sorted(parts)]
  return np.concatenate(rows), np.concatenate(
      [parts[start] for start in sorted(parts)])


def from_hosts(rows: np.ndarray, values: np.ndarray,
               num_rows: int) -> np.ndarray:
  """[B] numbers of which each host knows those of its rows."""
  whole = np.zeros((num_rows, *values.shape[1:]), values.dtype)
  whole[rows] = values
  if jax.process_count() == 1:
    return whole
  known = np.zeros(num_rows, bool)
  known[rows] = True
  every, knew = multihost_utils.process_allgather((whole, known))
  first = np.argmax(knew, axis=0)
  return every[first, np.arange(num_rows)]


def _rule(rules: Rules, path: str) -> PartitionSpec:
  for pattern, spec in rules:
    if re.fullmatch(pattern, path):
      return spec
  raise ValueError(f'no partition rule covers the parameter {path}: add one '
                   'to the PARTITION_RULES of its model family.')


def _fit(spec: PartitionSpec, shape: Sequence[int],
         mesh: Mesh) -> PartitionSpec:

  def fitting(axis, size):
    divides = lambda *axes: size % math.prod(mesh.shape[a] for a in axes) == 0
    if axis == 'fsdp' and mesh.shape['sequence'] > 1 and divides(
        'fsdp', 'sequence'):
      return 'fsdp', 'sequence'
    return axis if axis and divides(axis) else None

  return PartitionSpec(*(fitting(axis, size)
                         for axis, size in zip(spec, shape, strict=False)))
