# SPDX-License-Identifier: Apache-2.0
"""Held-out accuracy and length: every problem once, whatever the batches.

And the statistics of both, by literal numbers and by counting.
"""

import itertools
import math

import jax
import numpy as np
import pytest

from lapo_jax import evaluate, grader, rollout, sharding, types
from lapo_jax import tokenizer as tokenizer_lib

_LEVELS = ('hard', 'easy', 'easy', '')


class Task:
  """Completions of problem i are i % 4 letters and a stop token."""

  def __init__(self, count):
    self._count = count

  def __len__(self):
    return self._count

  def __getitem__(self, index):
    assert 0 <= index < self._count
    return types.Example(f'q{index}', str(index), level=_LEVELS[index % 4])

  def grade(self, completion, example):
    return {'correct': float(int(example.answer) % 3 == 0), 'parsed': 1.0}


class Grader(grader.Grader):
  """The task's grading without processes."""

  def __init__(self, task):
    self._task = task
    self.asked = []

  def grade(self, completions, examples, whole=True):
    assert whole
    self.asked += [example.question for example in examples]
    return [{'verdict': '', **self._task.grade(text, example)}
            for text, example in zip(completions, examples, strict=True)]


@pytest.fixture(scope='module')
def tokenizer(model_folder):
  return tokenizer_lib.load(model_folder)


def make(tokenizer, task, batch_size, num_samples=1):
  """(evaluate, grader, keys and temperatures that the sampler got)."""
  mesh = sharding.make_mesh(data=-1, fsdp=1)
  batch, everywhere = sharding.batch(mesh), sharding.replicated(mesh)
  encode = rollout.make_encode_fn(
      tokenizer, '{question}', 16, types.Prompts(
          tokens=batch, mask=batch, index=everywhere,
          target_lengths=everywhere))
  calls, slots = [], 3

  def sample(params, prompts, key, temperature):
    calls.append((params, jax.random.key_data(key).tolist(),
                  float(temperature)))
    lengths = np.repeat(np.asarray(prompts.index) % 4, num_samples)
    tokens = np.full((len(lengths), slots), tokenizer.eos_ids[0], np.int32)
    for i, length in enumerate(lengths):
      tokens[i, :length] = tokenizer.encode(['a' * slots])[0][:length]
    mask = np.arange(slots)[None] <= lengths[:, None]
    tokens, mask = sharding.to_global((tokens, mask), batch)
    return types.Rollout(tokens, mask, tokens, mask, mask, tokens)

  workers = Grader(task)
  return evaluate.make_evaluate_fn(
      sample, encode, task, workers, tokenizer, batch_size=batch_size,
      temperature=0.7, key=jax.random.key(5)), workers, calls


def by_hand(count):
  """Problem i: length min(i % 4 + 1, 3), truncated when i % 4 = 3."""
  index = np.arange(count)
  lengths = np.minimum(index % 4 + 1, 3)
  truncated = index % 4 == 3
  correct = (index % 3 == 0) & ~truncated
  means = lambda rows: {'accuracy': correct[rows].mean(),
                        'mean_tokens': lengths[rows].mean()}
  easy = (index % 4 == 1) | (index % 4 == 2)
  return {**means(index >= 0), 'truncated': truncated.mean(),
          'by_level': {'easy': means(easy), 'hard': means(index % 4 == 0)}}


@pytest.mark.parametrize('count, batch_size', [
    (16, 16), (16, 8), (17, 8), (13, 8), (5, 16)])
@pytest.mark.parametrize('num_samples', [1, 2])
def test_every_problem_counts_once(tokenizer, count, batch_size, num_samples):
  run, workers, _ = make(tokenizer, Task(count), batch_size, num_samples)
  found, expected = run('params'), by_hand(count)
  assert found.keys() == expected.keys()
  levels, others = found.pop('by_level'), expected.pop('by_level')
  assert found == pytest.approx(expected)
  assert list(levels) == ['easy', 'hard']  # sorted; none for no level
  for name in levels:
    assert levels[name] == pytest.approx(others[name])
  # The filler was graded and dropped.
  batches = -(-count // batch_size)
  assert len(workers.asked) == batches * batch_size * num_samples


def test_two_evaluations_draw_the_same_numbers(tokenizer):
  run, _, calls = make(tokenizer, Task(20), 8)
  assert run('a') == run('a')
  assert calls[:3] == calls[3:]
  # But no two batches of one evaluation do.
  assert len({tuple(key) for _, key, _ in calls}) == 3
  assert {round(temperature, 6) for _, _, temperature in calls} == {0.7}


def test_scalars_by_name():
  part = {'accuracy': 0.5, 'mean_tokens': 7.0}
  found = {**part, 'truncated': 0.25, 'by_level': {'easy': part}}
  assert evaluate.scalars(found, 'sums') == {
      'eval/sums/accuracy': 0.5, 'eval/sums/length': 7.0,
      'eval/sums/truncated': 0.25, 'eval/sums/accuracy/easy': 0.5,
      'eval/sums/length/easy': 7.0}
  assert evaluate.scalars({**found, 'by_level': {}}, 'x').keys() == {
      'eval/x/accuracy', 'eval/x/length', 'eval/x/truncated'}


def test_a_part_is_a_task():
  task = Task(10)
  part = evaluate.Part(task, range(6, 10))
  assert isinstance(part, types.Task)
  assert len(part) == 4
  assert [part[i] for i in range(4)] == [task[i] for i in range(6, 10)]
  assert part.grade('', part[0]) == {'correct': 1.0, 'parsed': 1.0}
  train = evaluate.Part(task, [0, 1, 2, 3, 4, 5])
  assert not ({train[i].question for i in range(len(train))} &
              {part[i].question for i in range(len(part))})


@pytest.mark.parametrize('index', [4, 100, -1])
def test_a_part_ends_where_it_ends(index):
  with pytest.raises(IndexError):
    evaluate.Part(Task(10), range(2, 6))[index]


# ---- Statistics.


@pytest.mark.parametrize('n, c, k, expected', [
    (1, 1, 1, 1.0), (1, 0, 1, 0.0), (4, 1, 1, 0.25), (4, 1, 2, 0.5),
    (4, 2, 2, 5 / 6), (4, 1, 4, 1.0), (4, 0, 4, 0.0), (4, 3, 2, 1.0),
    (10, 3, 5, 11 / 12), (32, 1, 8, 0.25), (32, 16, 1, 0.5),
])
def test_pass_at_k_of_literal_numbers(n, c, k, expected):
  assert evaluate.pass_at_k(n, c, k) == pytest.approx(expected, abs=1e-12)


def test_pass_at_k_is_the_share_of_all_subsets():
  n = 6
  for c, k in itertools.product(range(n + 1), range(1, n + 1)):
    subsets = list(itertools.combinations(range(n), k))
    share = np.mean([min(subset) < c for subset in subsets])
    assert evaluate.pass_at_k(n, c, k) == pytest.approx(share, abs=1e-12)


def test_pass_at_k_of_many_problems():
  n, c = np.array([4, 4, 2]), np.array([1, 4, 0])
  np.testing.assert_allclose(evaluate.pass_at_k(n, c, 2), [0.5, 1.0, 0.0])
  # What came back counts, not what was asked for.
  assert evaluate.pass_at_k(3, 1, 1) == pytest.approx(1 / 3)
  # It is unbiased: pass@1 is the mean of c/n.
  np.testing.assert_allclose(evaluate.pass_at_k(n, c, 1), c / n)
  # Exact where the product is long.
  assert evaluate.pass_at_k(2000, 1, 1000) == pytest.approx(0.5)


@pytest.mark.parametrize('n, c, k', [(4, 1, 5), (4, 1, 0), (4, 5, 1),
                                     (4, -1, 1), ([4, 2], [1, 1], 3)])
def test_pass_at_k_refuses(n, c, k):
  with pytest.raises(ValueError, match='expected'):
    evaluate.pass_at_k(n, c, k)


def test_pass_at_1_and_its_standard_error():
  # Shares 0, 0.5, 1, 0.5: sd √(1/6), over √4.
  mean, error = evaluate.pass_at_1(np.full(4, 2), np.array([0, 1, 2, 1]))
  assert mean == 0.5 and error == pytest.approx(math.sqrt(1 / 6) / 2)
  # More samples of the same problems are no more problems.
  again = evaluate.pass_at_1(np.full(4, 200), np.array([0, 100, 200, 100]))
  assert again == pytest.approx((mean, error))
  assert evaluate.pass_at_1(np.array([3, 1]), np.array([1, 1]))[0] == (
      pytest.approx(2 / 3))
  mean, error = evaluate.pass_at_1(np.array([4]), np.array([1]))
  assert mean == 0.25 and math.isnan(error)
  with pytest.raises(ValueError, match='expected'):
    evaluate.pass_at_1(np.array([0, 1]), np.array([0, 1]))


def test_length_statistics():
  found = evaluate.length_statistics(
      np.array([True, False, True, False]), np.array([10, 20, 30, 100]),
      np.array([False, False, False, True]))
  assert found == {'mean_tokens': 40.0, 'median_tokens': 25.0,
                   'correct_tokens': 20.0, 'wrong_tokens': 60.0,
                   'truncated': 0.25}
  nothing = evaluate.length_statistics(np.array([True]), np.array([7]),
                                       np.array([False]))
  assert math.isnan(nothing['wrong_tokens'])
  assert nothing['correct_tokens'] == nothing['median_tokens'] == 7.0


def test_aes_of_published_averages():
  # LAPO-I against its base, DeepSeek-R1-Distill-Qwen-1.5B.
  shorter, better = (8086 - 4775) / 8086, (59.1 - 57.9) / 57.9
  assert evaluate.aes(59.1, 4775, 57.9, 8086) == pytest.approx(
      shorter + 3 * better)
  assert evaluate.aes(59.1, 4775, 57.9, 8086) == pytest.approx(0.4716, abs=1e-4)
  # Accuracy lost weighs five, gained three.
  assert evaluate.aes(0.45, 100, 0.5, 100) == pytest.approx(-0.5)
  assert evaluate.aes(0.55, 100, 0.5, 100) == pytest.approx(0.3)
  assert evaluate.aes(0.5, 50, 0.5, 100) == pytest.approx(0.5)
  assert evaluate.aes(0.5, 200, 0.5, 100) == pytest.approx(-1.0)
  assert math.isnan(evaluate.aes(0.5, 100, 0.0, 100))
  assert math.isnan(evaluate.aes(0.5, 100, 0.5, 0.0))


class Questions(list):
  """A task of questions."""

  def __getitem__(self, index):
    return types.Example(super().__getitem__(index), '')

  def grade(self, completion, example):
    return {}


@pytest.mark.parametrize('a, b', [
    ('What is 47-8?', 'what is $47 - 8$ ?'),
    (r'Let $x=\frac{1}{2}$.', r'let \(x = \frac{1}{2}\) .'),
    (r'\left( 3,\, y \right)', '(3, y)'),
    ('two\n\nlines', 'Two lines'),
    (r'a\quad b~c\ d\;e\!f', 'a b c d e f'),
])
def test_a_question_written_in_another_way_is_shared(a, b):
  assert evaluate.shared_questions(Questions([a]), Questions(['x', b])) == [0]


@pytest.mark.parametrize('a, b', [
    ('What is 47-8?', 'What is 478?'), ('What is 47-8?', 'What is 47+8?'),
    ('4 7', '47'), ('now here', 'nowhere'), (r'\leftarrow', 'arrow'),
    (r'$x_1$', r'$x_2$'), ('(1, 2)', '[1, 2]'), (r'\frac12', r'\frac21'),
])
def test_another_question_is_not_shared(a, b):
  assert evaluate.shared_questions(Questions([a]), Questions([b])) == []


def test_every_shared_question_is_found():
  held_out = Questions(['b?', 'a?', 'c?'])
  task = Questions(['A?', 'z', 'B?', 'a ?'])
  assert evaluate.shared_questions(task, held_out) == [0, 2, 3]
  assert evaluate.shared_questions(Questions(), held_out) == []
