# SPDX-License-Identifier: Apache-2.0
"""Accuracy and length on held-out problems, and the statistics of both.

The task's own grade, never the training reward. Prompts state no budget, and
every evaluation of a run draws the same random numbers: what differs between
two of them is the policy.

The statistics are plain numpy: pass@1 with its standard error, pass@k, lengths
by outcome, and AES, which weighs tokens saved against accuracy lost.
"""

from collections.abc import Callable, Sequence
import math
import re
from typing import Any

import jax
import numpy as np

from lapo_jax import grader as grader_lib
from lapo_jax import rollout, types
from lapo_jax import tokenizer as tokenizer_lib

# What an evaluation finds: accuracy in [0, 1], mean_tokens, truncated in
# [0, 1], and the first two again by level.
Found = dict[str, Any]

# What two publishers of one problem write differently: the marks around LaTeX,
# the size of brackets, and the spaces that it asks for.
_LEVELLED = re.compile(
    r'\\(?:left|right|quad|qquad)(?![a-z])|\\[()\[\],;:!> ]|[$~]')
_NEEDLESS_SPACE = re.compile(r'(?<!\w) | (?!\w)')


class Part:
  """Some examples of a task, numbered from 0."""

  def __init__(self, task: types.Task, indices: Sequence[int]):
    self._task, self._indices = task, indices

  @property
  def manifest(self) -> dict[str, Any]:
    """The task's, {} if it has none."""
    return getattr(self._task, 'manifest', {})

  def __len__(self) -> int:
    return len(self._indices)

  def __getitem__(self, index: int) -> types.Example:
    if not 0 <= index < len(self):  # the neighbours are another part's
      raise IndexError(f'problem {index} of {len(self)}')
    return self._task[self._indices[index]]

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


def pass_at_1(num_samples: np.ndarray,
              num_correct: np.ndarray) -> tuple[float, float]:
  """The mean of c/n over problems, and its standard error.

  The samples of a problem are alike, problems are not: the error is that of a
  mean over problems, √(Σ(c/n − mean)² / (P − 1) / P). NaN for one problem.

  Args:
    num_samples: samples that came back, n, one number a problem.
    num_correct: correct ones among them, c.

  Raises:
    ValueError: a problem without samples, or c not within 0 … n.
  """
  n, c = _counts(num_samples, num_correct, least=1)
  shares = c / n
  spread = shares.std(ddof=1) if shares.size > 1 else math.nan
  return float(shares.mean()), float(spread / math.sqrt(shares.size))


def pass_at_k(num_samples: Any, num_correct: Any,
              k: int) -> np.ndarray | np.float64:
  """The chance that one of k samples is correct, one number a problem.

  1 − Π_{i=n−c+1..n} (1 − k/i): of the n samples that came back, k are drawn
  without putting them back, which makes it unbiased (arXiv:2107.03374).

  Args:
    num_samples: samples that came back, n; a number or an array.
    num_correct: correct ones among them, c.
    k: from 1 to the least n.

  Raises:
    ValueError: k > n, or c not within 0 … n.
  """
  if k < 1:
    raise ValueError(f'pass@k with k = {k}: expected k >= 1.')
  n, c = _counts(num_samples, num_correct, least=k)
  i = np.arange(1, n.max(initial=0) + 1)
  inside = (i > (n - c)[..., None]) & (i <= n[..., None])
  return 1.0 - np.prod(np.where(inside, 1.0 - k / i, 1.0), axis=-1)


def length_statistics(correct: np.ndarray, lengths: np.ndarray,
                      truncated: np.ndarray) -> dict[str, float]:
  """Tokens of all completions, of the correct and of the wrong ones.

  A truncated completion counts with the cap, so a mean is to be read beside
  the truncated share. NaN is the mean of nothing.
  """
  mean = lambda x: float(x.mean(dtype=np.float64)) if x.size else math.nan
  return {'mean_tokens': mean(lengths),
          'median_tokens': float(np.median(lengths)) if lengths.size else
                           math.nan,
          'correct_tokens': mean(lengths[correct]),
          'wrong_tokens': mean(lengths[~correct]),
          'truncated': mean(truncated)}


def aes(accuracy: float, tokens: float | int, base_accuracy: float,
        base_tokens: float | int) -> float:
  """Accuracy-efficiency score of averages over benchmarks, against a base.

  ΔL + 3·ΔA if ΔA ≥ 0, else ΔL − 5·|ΔA|, where ΔL = (L_base − L) / L_base and
  ΔA = (A − A_base) / A_base. NaN where the base has no accuracy or no tokens.
  """
  if not (base_accuracy > 0 and base_tokens > 0):
    return math.nan
  shorter = (base_tokens - tokens) / base_tokens
  better = (accuracy - base_accuracy) / base_accuracy
  return shorter + (3.0 if better >= 0 else 5.0) * better


def shared_questions(task: types.Task, held_out: types.Task) -> list[int]:
  """Indices of the training questions that are held out too.

  Compared without case, the marks around LaTeX, spacing commands and blanks
  that part no words. Digits and operators count: `47-8` is not `478`.
  """
  known = {_normalised(held_out[i].question) for i in range(len(held_out))}
  return [i for i in range(len(task))
          if _normalised(task[i].question) in known]


def _normalised(question: str) -> str:
  text = _LEVELLED.sub(' ', question.lower())
  return _NEEDLESS_SPACE.sub('', ' '.join(text.split()))


def _counts(num_samples: Any, num_correct: Any,
            least: int) -> tuple[np.ndarray, np.ndarray]:
  """n and c as arrays of one shape, checked."""
  n, c = np.broadcast_arrays(np.asarray(num_samples), np.asarray(num_correct))
  if np.any(n < least):
    raise ValueError(f'pass@{least} of {n.min()} samples: expected at least '
                     f'{least} for every problem.')
  if np.any((c < 0) | (c > n)):
    raise ValueError('expected correct samples between 0 and the samples of '
                     f'the problem, got {c.tolist()} of {n.tolist()}.')
  return n, c


def _means(correct: np.ndarray, lengths: np.ndarray) -> dict[str, float]:
  return {'accuracy': float(correct.mean(dtype=np.float64)),
          'mean_tokens': float(lengths.mean(dtype=np.float64))}


def _by_level(correct: np.ndarray, lengths: np.ndarray,
              levels: Sequence[str]) -> dict[str, dict[str, float]]:
  rows = {level: np.array([x == level for x in levels])
          for level in sorted(set(levels)) if level}
  return {level: _means(correct[mine], lengths[mine])
          for level, mine in rows.items()}
