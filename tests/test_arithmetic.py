# SPDX-License-Identifier: Apache-2.0
"""Every answer by hand arithmetic, no problem in both splits, fair grading."""

import collections
import importlib.util
import pathlib
import re
import sys

import numpy as np
import pytest

from lapo_jax import plugins, types
from lapo_jax.tasks import arithmetic

_TRACES = (pathlib.Path(__file__).parent.parent / 'experiments' /
           'tiny_reasoner' / 'traces.py')


def problems(split='train', count=1800, seed=0):
  task = arithmetic.make(split, count, seed)
  return [task.problem(i) for i in range(count)]


def brute_force(question):
  """The answer by counting, from the text of the question alone."""
  found = re.fullmatch(r'What is (\d+(?:[-+*]\d+)+)\?', question)
  first, *rest = re.findall(r'[-+*]?\d+', found[1])
  total = int(first)
  for part in rest:
    number = int(part[1:])
    if part[0] == '*':
      total = sum(total for _ in range(number))
    else:
      total += number if part[0] == '+' else -number
  return str(total)


@pytest.mark.parametrize('split', ['train', 'test'])
def test_answers_are_right_and_levels_take_turns(split):
  task = arithmetic.make(split, 1800)
  assert isinstance(task, types.Task) and len(task) == 1800
  for i in range(len(task)):
    example = task[i]
    assert example.answer == brute_force(example.question)
    assert example.level == str(1 + i % len(arithmetic.LEVELS))
    assert (example.prefill, example.target_length) == ('', 0)


def test_levels_are_different_skills():
  skills = collections.defaultdict(set)
  for problem in problems():
    symbol = arithmetic.LEVELS[problem.level - 1].symbol
    digits = sorted(len(str(operand)) for operand in problem.operands)
    skills[problem.level].add((symbol, *digits))
    assert problem.answer >= 0
  assert len(skills) == len(arithmetic.LEVELS) >= 5
  # One operation on operands of one size, and another one on each level.
  assert all(len(found) == 1 for found in skills.values())
  assert len(set.union(*skills.values())) == len(skills)


def canonical(problem):
  return problem.level, tuple(sorted(problem.operands))


def test_no_problem_is_in_both_splits_in_either_order():
  # Most products of the small levels are drawn in one split or the other.
  seen = {split: {canonical(p) for seed in range(3)
                  for p in problems(split, 6000, seed)}
          for split in ('train', 'test')}
  assert not seen['train'] & seen['test']
  for level in range(1, 1 + len(arithmetic.LEVELS)):
    assert all(any(x[0] == level for x in seen[s]) for s in seen)


def test_a_problem_is_a_function_of_seed_and_index():
  few, many = problems(count=60), problems(count=600)
  assert few == many[:60]
  task = arithmetic.make(num_examples=60)
  for i in reversed(range(60)):  # in any order of asking
    assert task.problem(i) == few[i]
  assert problems(count=60, seed=1) != few
  assert problems('test', 60) != few


def test_indices_end_where_the_task_does():
  task = arithmetic.make(num_examples=3)
  assert len(list(task)) == 3
  for index in (3, -1):
    with pytest.raises(IndexError):
      task[index]


@pytest.mark.parametrize('settings', [{'split': 'val'}, {'num_examples': 0}])
def test_wrong_settings_are_named(settings):
  with pytest.raises(ValueError, match=f'task.{next(iter(settings))}.*expect'):
    arithmetic.make(**settings)


@pytest.mark.parametrize('completion, correct, parsed', [
    (r' 7*48=336.</think> \boxed{336}', 1, 1),
    (r'</think> \boxed{336}', 1, 1),
    (r'</think> \boxed{335} no, \boxed{336}', 1, 1),
    (r'</think> \boxed{0336.0}', 1, 1),
    (r'</think> \boxed{336} or \boxed{1}', 0, 1),
    (r'</think> \boxed{-336}', 0, 1),
    (r'</think> \boxed{33}6', 0, 1),
    (r'</think> \boxed{7*48}', 0, 1),
    (r'</think> \boxed{}', 0, 0),
    (r'</think> 336', 0, 0),
    (r' the answer is \boxed{336}', 0, 0),             # thoughts never closed
    (r' \boxed{336}</think>', 0, 0),                   # in thought only
    (r'</think> \boxed{336}<think>', 0, 0),            # and opened again
    (r'</think> \boxed{336', 0, 0),
    ('', 0, 0),
    ('</think>\\boxed{' + '9' * 10**6 + '}', 0, 0),
    ('</think>\\boxed{9**9**9**9}', 0, 1),
    ("</think>\\boxed{__import__('os').abort()}", 0, 1),
    # A box too far from the end to be looked for.
    ('</think>' + '{' * 10**5 + '\\boxed{336' + '}' * 10**5, 0, 0),
    ('\ud800</think>\\boxed{\x1b[2J\ud800}', 0, 1),
    ('</think>\\boxed{\u0663\u0663\u0666}', 0, 1),      # digits of others
])
def test_grade(completion, correct, parsed):
  task = arithmetic.make(num_examples=1)
  example = types.Example('What is 7*48?', '336', level='4')
  assert task.grade(completion, example) == {
      'correct': correct, 'parsed': parsed}


def load_traces():
  spec = importlib.util.spec_from_file_location('traces', _TRACES)
  module = importlib.util.module_from_spec(spec)
  sys.modules['traces'] = module  # dataclasses look their module up
  try:
    spec.loader.exec_module(module)
  finally:
    del sys.modules['traces']
  return module


def test_what_the_embedded_model_imitates_is_graded_correct():
  traces = load_traces()
  task = plugins.make('tasks', 'arithmetic', num_examples=1200)
  rng = np.random.default_rng(0)
  count = lambda text: len(text) // 2
  lengths = collections.defaultdict(list)
  budgets = 0
  for i in range(len(task)):
    prefill, completion = traces.trace(task.problem(i), rng, count,
                                       traces.Mixture())
    assert task.grade(completion, task[i])['correct'] == 1.0, completion
    # Every equation in the working holds.
    for left, right in re.findall(r'([\d+*-]+)=(\d+)', completion):
      assert brute_force(f'What is {left}?') == right, completion
    lengths[task[i].level].append(len(completion))
    budgets += bool(prefill)
  assert 0.3 < budgets / len(task) < 0.5
  # The working grows with the level's difficulty, a terse answer does not.
  hardest = str(len(arithmetic.LEVELS))
  assert np.mean(lengths[hardest]) > 1.5 * np.mean(lengths['1'])
  assert all(min(x) < 25 for x in lengths.values())
