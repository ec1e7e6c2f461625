# SPDX-License-Identifier: Apache-2.0
"""What an evaluation asks: which problems, how often, under which prompts.

A pass is the problems of one benchmark under one kind of prompt. Passes that
state a budget which fits nothing ("I will answer the question with 500
tokens.") ask some of the same problems again: a model that has internalised
its length hardly moves.
"""

from collections.abc import Iterator, Mapping
import hashlib
import os
from typing import Any, NamedTuple

import numpy as np

from lapo_jax import grader as grader_lib
from lapo_jax import plugins, types

_STATED = ' I will answer the question with {} tokens.'


class Pass(NamedTuple):
  """Problems of a benchmark under one kind of prompt.

  Attributes:
    name: of the benchmark.
    budget: tokens stated in the prompt, 0 = none.
    task: its problems, and how to grade them.
    grader: of that task.
    problems: their ids, in the order in which they are sampled.
    num_samples: completions of each.
  """

  name: str
  budget: int
  task: types.Task
  grader: grader_lib.Grader
  problems: np.ndarray
  num_samples: int

  @property
  def key(self) -> tuple[str, int]:
    """What tells it from the others."""
    return self.name, self.budget

  @property
  def label(self) -> str:
    return f'{self.name} told {self.budget}' if self.budget else self.name

  def example(self, problem: int) -> types.Example:
    """A problem as this pass asks it."""
    example = self.task[problem]
    if not self.budget:
      return example
    return example.replace(
        prefill=example.prefill + _STATED.format(self.budget))

  def fingerprint(self) -> str:
    """Changes with any of its problems or their ids."""
    digest = hashlib.sha256()
    for problem in np.sort(self.problems).tolist():
      text = f'{problem}\0{self.task[problem]!r}\0'
      digest.update(text.encode('utf-8', 'backslashreplace'))
    return digest.hexdigest()[:16]


class Chunk(NamedTuple):
  """A batch of problems; of each the samples `first`, `first` + 1, …"""

  work: Pass
  problems: np.ndarray
  first: int


def passes(benchmarks: Mapping[str, Mapping[str, Any]], *, data: str,
           num_samples: int, num_problems: int, seed: int,
           grader: Mapping[str, Any],
           conflict: Mapping[str, Any]) -> list[Pass]:
  """The benchmarks, then one of them under each stated budget.

  Args:
    benchmarks: by name, each with 'task', its 'settings' and 'num_samples'.
    data: folder of the paths among the settings.
    num_samples: of every benchmark, 0 = its own.
    num_problems: of each benchmark, chosen by the seed; 0 = all.
    seed: chooses problems.
    grader: settings of `grader.Grader`.
    conflict: 'budgets' to state, the 'benchmark', 'num_problems' of it and
      'num_samples', at most the benchmark's own.

  Raises:
    ValueError: numbers or names that do not fit, or a task that refuses.
  """
  _check(benchmarks, conflict)
  found = []
  for name, entry in benchmarks.items():
    settings = dict(entry['settings'])
    if settings.get('path'):
      settings['path'] = os.path.join(data, settings['path'])
    try:
      task = plugins.make('tasks', entry['task'], **settings)
    except ValueError as error:
      raise ValueError(f'benchmark {name!r}: {error}') from error
    problems = _choose(np.arange(len(task)), num_problems, seed)
    # Alike in length, so that a batch needs few slots; ties by id.
    order = np.argsort([len(task[int(i)].question) for i in problems],
                       kind='stable')
    found.append(Pass(name, 0, task, grader_lib.Grader(
        (entry['task'], settings), **grader), problems[order],
                      num_samples or entry['num_samples']))
  for whole in found[:] if conflict['budgets'] else ():
    if whole.name == conflict['benchmark']:
      chosen = _choose(np.sort(whole.problems), conflict['num_problems'], seed)
      problems = whole.problems[np.isin(whole.problems, chosen)]
      samples = min(conflict['num_samples'], whole.num_samples)
      found += [whole._replace(budget=budget, problems=problems,
                               num_samples=samples)
                for budget in conflict['budgets']]
  return found


def chunks(work: Pass, batch_size: int, group_size: int) -> Iterator[Chunk]:
  """A pass in pieces, all samples of a batch before the next batch."""
  for start in range(0, len(work.problems), batch_size):
    for first in range(0, work.num_samples, group_size):
      yield Chunk(work, work.problems[start:start + batch_size], first)


def _choose(problems: np.ndarray, count: int, seed: int) -> np.ndarray:
  """`count` of the problems in their order; 0 or too many = all."""
  if not 0 < count < len(problems):
    return problems
  order = np.random.default_rng((seed, len(problems))).permutation(problems)
  return np.sort(order[:count])


def _check(benchmarks: Mapping[str, Mapping[str, Any]],
           conflict: Mapping[str, Any]) -> None:
  if not benchmarks:
    raise ValueError('benchmarks: got none, expected at least one.')
  for name, entry in benchmarks.items():
    if entry['num_samples'] < 1:
      raise ValueError(f'benchmarks.{name}.num_samples {entry["num_samples"]}: '
                       'expected at least 1.')
  budgets = conflict['budgets']
  if (not all(isinstance(budget, int) and budget > 0 for budget in budgets) or
      len(set(budgets)) < len(budgets)):
    raise ValueError(f'conflict.budgets {budgets}: expected numbers of tokens, '
                     'each once, such as (500, 3500), or ().')
  if budgets and conflict['benchmark'] not in benchmarks:
    raise ValueError(f'conflict.benchmark {conflict["benchmark"]!r}: expected '
                     f'one of {sorted(benchmarks)}.')
