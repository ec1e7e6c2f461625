# SPDX-License-Identifier: Apache-2.0
"""Accuracy and length on held-out problems, overall and by level.

The task's own grade, never the training reward. Prompts state no budget, and
every evaluation of a run draws the same random numbers: what differs between
two of them is the policy.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from lapo_jax import grader as grader_lib
from lapo_jax import rollout, types
from lapo_jax import tokenizer as tokenizer_lib

# What an evaluation finds: accuracy in [0, 1], mean_tokens, truncated in
# [0, 1], and the first two again by level.
Found = dict[str, Any]


class Part:
  """The examples `start` to `stop` of a task, numbered from 0."""

  def __init__(self, task: types.Task, start: int, stop: int):
    self._task, self._start, self._stop = task, start, stop

  def __len__(self) -> int:
    return self._stop - self._start

  def __getitem__(self, index: int) -> types.Example:
    if not 0 <= index < len(self):  # the neighbours are another part's
      raise IndexError(f'problem {index} of {len(self)}')
    return self._task[self._start + index]

  def grade(self, completion: str, example: types.Example) -> dict[str, float]:
    return self._task.grade(completion, example)


def make_evaluate_fn(sample: Callable, encode: Callable, task: types.Task,
                     grader: grader_lib.Grader,
                     tokenizer: tokenizer_lib.Tokenizer, *, batch_size: int,
                     temperature: float, key: jax.Array) -> Callable:
  """A `params -> Found` over all examples of the task.

  Args:
    sample: the sampler; its group size is the number of samples a problem.
    encode: of `rollout.make_encode_fn`.
    task: the held-out problems.
    grader: of that task.
    tokenizer: the model's.
    batch_size: problems that are sampled together.
    temperature: of sampling, 0 is greedy.
    key: of the random numbers.
  """
  count = len(task)
  # The last batch is filled up with the first problems, which are dropped.
  starts = range(0, count, batch_size)
  turns = [np.arange(start, start + batch_size) for start in starts]

  def evaluate(params: Any) -> Found:
    parts = []
    for i, turn in enumerate(turns):
      indices = turn % count
      examples = [task[int(index)] for index in indices]
      prompts = encode(examples, indices)
      samples = sample(params, prompts, jax.random.fold_in(key, i),
                       np.float32(temperature))
      graded = rollout.grade(samples, prompts, examples, grader, tokenizer)
      outcomes = graded.outcomes
      parts.append([np.asarray(x)[turn < count] for x in (
          outcomes.correct, outcomes.lengths, outcomes.truncated)])
    correct, lengths, truncated = (np.concatenate(x)
                                   for x in zip(*parts, strict=True))
    levels = [task[i].level for i in range(count)]
    return {**_means(correct, lengths), 'truncated': float(truncated.mean()),
            'by_level': _by_level(correct, lengths, levels)}

  return evaluate


def scalars(found: Found, task_name: str) -> dict[str, float]:
  """The findings by metric name, `eval/<task>/…`."""
  prefix = f'eval/{task_name}'
  named = {f'{prefix}/accuracy': found['accuracy'],
           f'{prefix}/length': found['mean_tokens'],
           f'{prefix}/truncated': found['truncated']}
  for level, part in found['by_level'].items():
    named[f'{prefix}/accuracy/{level}'] = part['accuracy']
    named[f'{prefix}/length/{level}'] = part['mean_tokens']
  return named


def _means(correct: np.ndarray, lengths: np.ndarray) -> dict[str, float]:
  return {'accuracy': float(correct.mean(dtype=np.float64)),
          'mean_tokens': float(lengths.mean(dtype=np.float64))}


def _by_level(correct: np.ndarray, lengths: np.ndarray,
              levels: Sequence[str]) -> dict[str, dict[str, float]]:
  rows = {level: np.array([x == level for x in levels])
          for level in sorted(set(levels)) if level}
  return {level: _means(correct[mine], lengths[mine])
          for level, mine in rows.items()}
