# SPDX-License-Identifier: Apache-2.0
"""What is sampled: models, prompts and forced lengths, alike for all peers.

Peers live in environments of their own: nothing here but numpy is imported.
"""

from typing import Any, NamedTuple

import numpy as np

GROUP_SIZE = 8
# Fields of `models.qwen2.Model`, and the prompt's length.
MODELS = {
    'a': (dict(vocab_size=512, width=128, num_layers=4, num_heads=4,
               num_kv_heads=2, mlp_width=384), 32),
    'b': (dict(vocab_size=8192, width=512, num_layers=8, num_heads=8,
               num_kv_heads=4, mlp_width=2048), 64),
}
# What devices share, a core each: rows where every core's cache has room for
# the weights, else the weights.
_AXES = {'a': 'data', 'b': 'tensor'}
_CAP = 128
_TAIL_CAP = 1024
_TAIL_SEED = 5


class Point(NamedTuple):
  """A model and the completions to be sampled from it.

  Attributes:
    model: 'a' or 'b'.
    rows: completions, B.
    tail: their lengths are heavy-tailed rather than all 128.
  """

  model: str
  rows: int
  tail: bool = False

  @property
  def fields(self) -> dict[str, Any]:
    """Of the model."""
    return MODELS[self.model][0]

  @property
  def axis(self) -> str:
    """Of the mesh, along which devices lie."""
    return _AXES[self.model]


POINTS = {
    'a64': Point('a', 64),
    'a256': Point('a', 256),
    'b32': Point('b', 32),
    'a_tail': Point('a', 256, tail=True),
    'b_tail': Point('b', 256, tail=True),
}


class Work(NamedTuple):
  """A point, written out.

  Attributes:
    prompts: int32 [P, L], full: no padding.
    lengths: int32 [B], tokens wanted of each completion.
    cap: tokens that a completion may have at most.
    num_slots: completions that our sampler decodes at once, 0 = all.
    data: devices that share rows, in our sampler and in the bare products.
    tensor: devices that share weights, likewise.
  """

  prompts: np.ndarray
  lengths: np.ndarray
  cap: int
  num_slots: int
  data: int
  tensor: int

  @property
  def rows(self) -> int:
    """Completions, B."""
    return len(self.lengths)

  @property
  def longest(self) -> int:
    """What a static batch decodes for every row."""
    return int(self.lengths.max())

  @property
  def row_prompts(self) -> np.ndarray:
    """int32 [B, L]."""
    return np.repeat(self.prompts, GROUP_SIZE, axis=0)

  @property
  def compared(self) -> np.ndarray:
    """Rows whose log-probs are compared: the first group, the longest's."""
    groups = {0, int(self.lengths.argmax()) // GROUP_SIZE}
    return np.concatenate([
        np.arange(group * GROUP_SIZE, (group + 1) * GROUP_SIZE)
        for group in sorted(groups)])


def make_work(point: Point, num_slots: int, devices: int = 1) -> Work:
  """The prompts and lengths of a point."""
  fields, prompt_slots = MODELS[point.model]
  rng = np.random.default_rng(0)
  prompts = rng.integers(
      0, fields['vocab_size'], (point.rows // GROUP_SIZE, prompt_slots))
  cap = _TAIL_CAP if point.tail else _CAP
  lengths = _tail(point.rows) if point.tail else np.full(point.rows, cap)
  mesh = {'data': 1, 'tensor': 1, point.axis: devices}
  return Work(prompts.astype(np.int32), lengths.astype(np.int32), cap,
              num_slots, **mesh)


def save(work: Work, path: str) -> None:
  """Writes it for another process."""
  np.savez(path, **work._asdict())


def load(path: str) -> Work:
  """What `save` wrote."""
  with np.load(path) as file:
    prompts, lengths, *numbers = (file[name] for name in Work._fields)
  return Work(prompts, lengths, *map(int, numbers))


def _tail(rows: int) -> np.ndarray:
  """Lognormal lengths; the longest is the cap, 10.1 times the mean."""
  drawn = np.random.default_rng(_TAIL_SEED).lognormal(0.0, 1.0, rows)
  return np.ceil(_TAIL_CAP * drawn / drawn.max())
