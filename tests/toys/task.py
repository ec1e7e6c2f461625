# SPDX-License-Identifier: Apache-2.0
"""A task that random weights solve now and then: the text's bytes decide."""

from lapo_jax import types


class Toy:
  """Problems in three levels; the splits differ in their questions."""

  def __init__(self, split, num_examples):
    self._split, self._num_examples = split, num_examples

  def __len__(self):
    return self._num_examples

  def __getitem__(self, index):
    return types.Example(question=f'{self._split} {index}?', answer=str(index),
                         level=str(1 + index % 3))

  def grade(self, completion, example):
    number = sum(completion.encode()) + int(example.answer)
    return {'correct': float(number % 5 < 3), 'parsed': 1.0}


def make(split: str = 'train', num_examples: int = 18) -> Toy:
  """`num_examples` problems of 'train' or 'test'."""
  return Toy(split, num_examples)
