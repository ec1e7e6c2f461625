# SPDX-License-Identifier: Apache-2.0
"""Arithmetic at six levels of difficulty: a test bench that needs no download.

Each level is a different skill, so that a small model is sure of the first
and unsure of the last, and the working that a level needs grows with it:

  1  numbers from their places   300+80+6
  2  two-digit sums              47+38
  3  two-digit differences       83-47
  4  one digit times two         7*48
  5  four-digit sums             4837+9386
  6  one digit times three       7*486

A problem is a pure function of (seed, index). Whether a problem belongs to
the training or to the held-out split is a function of its operands alone, so
no held-out problem is ever trained on, whatever the seeds.
"""

from collections.abc import Callable
import dataclasses
import zlib

import numpy as np

from lapo_jax import types
from lapo_jax.tasks import _answers

# One problem in this many is held out.
_HELD_OUT = 5
_SPLITS = ('train', 'test')


@dataclasses.dataclass(frozen=True)
class Level:
  """A skill: how operands are drawn, written and evaluated."""

  symbol: str
  draw: Callable[[np.random.Generator], tuple[int, ...]]
  evaluate: Callable[..., int]


def _difference(rng: np.random.Generator) -> tuple[int, int]:
  a, b = _draw(rng, _TWO, _TWO)
  return max(a, b), min(a, b)


def _draw(rng: np.random.Generator, *ranges: tuple[int, int]) -> tuple:
  return tuple(int(rng.integers(low, high + 1)) for low, high in ranges)


def _places(rng: np.random.Generator) -> tuple[int, int, int]:
  hundreds, tens, ones = _draw(rng, *3 * [(1, 9)])
  return 100 * hundreds, 10 * tens, ones


_TWO, _THREE, _FOUR = (10, 99), (100, 999), (1000, 9999)
LEVELS = (
    Level('+', _places, lambda a, b, c: a + b + c),
    Level('+', lambda rng: _draw(rng, _TWO, _TWO), lambda a, b: a + b),
    Level('-', _difference, lambda a, b: a - b),
    Level('*', lambda rng: _draw(rng, (2, 9), _TWO), lambda a, b: a * b),
    Level('+', lambda rng: _draw(rng, _FOUR, _FOUR), lambda a, b: a + b),
    Level('*', lambda rng: _draw(rng, (2, 9), _THREE), lambda a, b: a * b),
)


@dataclasses.dataclass(frozen=True)
class Problem:
  """A drawn problem: `level` counts from 1."""

  level: int
  operands: tuple[int, ...]

  @property
  def question(self) -> str:
    symbol = LEVELS[self.level - 1].symbol
    return f'What is {symbol.join(map(str, self.operands))}?'

  @property
  def answer(self) -> int:
    return LEVELS[self.level - 1].evaluate(*self.operands)


class Arithmetic:
  """`num_examples` problems, the levels in turn."""

  def __init__(self, split: str, num_examples: int, seed: int):
    self._split = split
    self._num_examples = num_examples
    self._seed = seed

  def __len__(self) -> int:
    return self._num_examples

  def problem(self, index: int) -> Problem:
    """The problem with this index."""
    if not 0 <= index < self._num_examples:
      raise IndexError(f'problem {index} of {self._num_examples}')
    level = 1 + index % len(LEVELS)
    rng = np.random.default_rng((self._seed, index))
    while True:
      drawn = Problem(level, LEVELS[level - 1].draw(rng))
      if _is_held_out(drawn) == (self._split == 'test'):
        return drawn

  def __getitem__(self, index: int) -> types.Example:
    drawn = self.problem(index)
    return types.Example(question=drawn.question, answer=str(drawn.answer),
                         level=str(drawn.level))

  def grade(self, completion: str, example: types.Example) -> dict[str, float]:
    """Correct if the last boxed number after the thinking is the answer."""
    answer = _answers.last_boxed(_answers.after_thinking(completion))
    correct = answer is not None and _answers.equal(answer, example.answer)
    return {'correct': float(correct), 'parsed': float(answer is not None)}


def make(split: str = 'train', num_examples: int = 1024,
         seed: int = 0) -> Arithmetic:
  """The task.

  Args:
    split: 'train' or 'test'; no problem is in both.
    num_examples: problems, spread evenly over the levels.
    seed: draws the problems.

  Raises:
    ValueError: unknown split, or no examples.
  """
  if split not in _SPLITS:
    raise ValueError(f'task.split {split!r}: expected one of {_SPLITS}.')
  if num_examples < 1:
    raise ValueError(f'task.num_examples {num_examples}: expected at least 1.')
  return Arithmetic(split, num_examples, seed)


def _is_held_out(problem: Problem) -> bool:
  # Sorted operands: 47 * 86 must not be trained on when 86 * 47 is held out.
  name = f'{problem.level}:{sorted(problem.operands)}'
  return zlib.crc32(name.encode()) % _HELD_OUT == 0
