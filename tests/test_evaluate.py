# SPDX-License-Identifier: Apache-2.0
"""Held-out accuracy and length: every problem once, whatever the batches."""

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

  def grade(self, completions, examples):
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
  part = evaluate.Part(task, 6, 10)
  assert isinstance(part, types.Task)
  assert len(part) == 4
  assert [part[i] for i in range(4)] == [task[i] for i in range(6, 10)]
  assert part.grade('', part[0]) == {'correct': 1.0, 'parsed': 1.0}
  train = evaluate.Part(task, 0, 6)
  assert not ({train[i].question for i in range(len(train))} &
              {part[i].question for i in range(len(part))})


@pytest.mark.parametrize('index', [4, 100, -1])
def test_a_part_ends_where_it_ends(index):
  with pytest.raises(IndexError):
    evaluate.Part(Task(10), 2, 6)[index]
