# SPDX-License-Identifier: Apache-2.0
"""The order of problems, prompts in their slots, grades on their groups."""

import jax
import numpy as np
import pytest
from toys import task as toy

from lapo_jax import grader, rollout, sharding, types
from lapo_jax import tokenizer as tokenizer_lib


@pytest.fixture(scope='module')
def tokenizer(model_folder):
  return tokenizer_lib.load(model_folder)


@pytest.fixture(scope='module')
def mesh():
  return sharding.make_mesh(data=-1, fsdp=1)


def epoch(num_examples, num_prompts, number, seed=0):
  """All that is chosen in an epoch, step after step."""
  steps = num_examples // num_prompts
  return np.concatenate([
      rollout.choose(num_examples, num_prompts, number * steps + i, seed)
      for i in range(steps)])


@pytest.mark.parametrize('num_examples, num_prompts', [
    (12, 4), (12, 12), (7, 1), (1, 1)])
def test_an_epoch_is_a_permutation(num_examples, num_prompts):
  for number in range(3):
    chosen = epoch(num_examples, num_prompts, number)
    np.testing.assert_array_equal(np.sort(chosen), np.arange(num_examples))


def test_no_problem_comes_twice_in_a_step_or_epoch():
  left_out = set(range(14))
  for number in range(20):
    chosen = epoch(14, 4, number)
    assert len(chosen) == len(set(chosen)) == 12
    assert chosen.min() >= 0 and chosen.max() < 14
    left_out -= set(chosen)
  assert not left_out  # by none of the epochs


def test_order_is_a_function_of_seed_and_step():
  for step in (0, 1, 7, 1000):
    first = rollout.choose(100, 8, step, 3)
    np.testing.assert_array_equal(first, rollout.choose(100, 8, step, 3))
  orders = [tuple(epoch(24, 8, number, seed))
            for seed in range(4) for number in range(4)]
  # Seed s + 1 is not seed s one epoch later.
  assert len(set(orders)) == len(orders)


def encode_fn(tokenizer, mesh, template='{question}', slots=64):
  batch, everywhere = sharding.batch(mesh), sharding.replicated(mesh)
  return rollout.make_encode_fn(
      tokenizer, template, slots, types.Prompts(
          tokens=batch, mask=batch, index=everywhere,
          target_lengths=everywhere))


def examples(*questions):
  return [types.Example(q, 'a', prefill=' now', target_length=i)
          for i, q in enumerate(questions)]


def test_prompts_are_padded_on_the_left(tokenizer, mesh):
  questions = ['é' * i for i in range(8)]
  encode = encode_fn(tokenizer, mesh, 'Q: {question} <think>')
  prompts = encode(examples(*questions), range(10, 18))
  assert prompts.tokens.shape == (8, 24)  # 23 tokens
  assert prompts.tokens.sharding.is_equivalent_to(sharding.batch(mesh), 2)
  tokens, mask = np.asarray(prompts.tokens), np.asarray(prompts.mask)
  for i, question in enumerate(questions):
    length = mask[i].sum()
    assert mask[i, 24 - length:].all()
    assert tokenizer.decode([tokens[i, 24 - length:]]) == [
        f'Q: {question} <think> now']
    assert (tokens[i, :24 - length] == tokenizer.pad_id).all()
  np.testing.assert_array_equal(prompts.index, range(10, 18))
  np.testing.assert_array_equal(prompts.target_lengths, range(8))


def test_braces_in_a_question_are_text(tokenizer, mesh):
  encode = encode_fn(tokenizer, mesh, '{question}!')
  prompts = encode(examples(*['{0} {question} {{x}}'] * 8), range(8))
  row = np.asarray(prompts.tokens)[0][np.asarray(prompts.mask)[0]]
  assert tokenizer.decode([row]) == ['{0} {question} {{x}}! now']


def test_the_chat_template_is_the_tokenizers(tokenizer, mesh):
  prompts = encode_fn(tokenizer, mesh, 'chat')(examples(*'abcdefgh'), range(8))
  row = np.asarray(prompts.tokens)[2][np.asarray(prompts.mask)[2]]
  assert tokenizer.decode([row]) == ['c <think> now']


def test_slots_come_in_buckets_up_to_the_cap(tokenizer, mesh):
  encode = encode_fn(tokenizer, mesh, slots=50)
  for length, slots in ((1, 16), (16, 16), (17, 24), (33, 48), (50, 50)):
    question = 'x' * (length - len(' now'))
    if length >= 4:
      rows = examples(*[question] * 8)
    else:
      rows = [types.Example('x', 'a')] * 8
    assert encode(rows, range(8)).tokens.shape == (8, slots)


def test_a_prompt_is_never_cut(tokenizer, mesh):
  encode = encode_fn(tokenizer, mesh, slots=20)
  rows = examples(*['short'] * 5, 'x' * 17, *['short'] * 2)
  with pytest.raises(ValueError, match='problem 105 has 21 tokens.* hold 20'):
    encode(rows, range(100, 108))


def test_a_template_needs_its_place(tokenizer, mesh):
  with pytest.raises(ValueError, match=r'\{question\}'):
    encode_fn(tokenizer, mesh, 'Q: {}')


class Grader(grader.Grader):
  """Verdicts by a letter, without processes."""

  def __init__(self):
    self.items = []

  def grade(self, completions, rows, whole=True):
    del whole
    self.items = list(zip(completions, rows, strict=True))
    return [{'verdict': 'timeout' if 'T' in text else 'crash' if 'C' in text
             else 'correct', 'correct': 1.0, 'parsed': 1.0,
             'boxed': float('b' in text)} for text, _ in self.items]


def samples(tokenizer, mesh, texts, slots=8):
  """A rollout with these completions; '$' is a stop token, then comes pad."""
  tokens = np.full((len(texts), slots), tokenizer.pad_id, np.int32)
  mask = np.zeros(tokens.shape, bool)
  for i, text in enumerate(texts):
    row = tokenizer.encode([text.rstrip('$')])[0]
    row += [tokenizer.eos_ids[0]] * text.count('$')
    tokens[i, :len(row)], mask[i, :len(row)] = row, True
  rows = sharding.to_global((tokens, mask), sharding.batch(mesh))
  return types.Rollout(
      prompt_tokens=rows[0], prompt_mask=rows[1], completion_tokens=rows[0],
      completion_mask=rows[1], action_mask=rows[1], sampler_logprobs=rows[0])


def prompts_of(mesh, count):
  index = sharding.to_global(np.arange(count, dtype=np.int32),
                             sharding.replicated(mesh))
  return types.Prompts(tokens=None, mask=None, index=index + 40,
                       target_lengths=index)


TEXTS = ['b$', 'bc$', 'bcdefgh$', 'bcdefghi', '$', 'T$', 'C$', 'Tabcdefg',
         *['b$'] * 8]


@pytest.fixture(scope='module')
def graded(tokenizer, mesh):
  fake = Grader()
  found = rollout.grade(samples(tokenizer, mesh, TEXTS), prompts_of(mesh, 4),
                        examples('p', 'q', 'r', 's'), fake, tokenizer)
  return found, fake


def test_truncated_is_wrong_whatever_the_text_says(graded):
  outcomes = graded[0].outcomes
  np.testing.assert_array_equal(
      outcomes.correct[:2], [[1, 1, 1, 0], [1, 1, 1, 0]])
  np.testing.assert_array_equal(
      outcomes.truncated[:2], [[0, 0, 0, 1], [0, 0, 0, 1]])
  assert graded[0].verdicts[3] == graded[0].verdicts[7] == 'truncated'
  assert graded[0].verdicts[0] == 'correct'


def test_lengths_count_the_stop_token(graded):
  np.testing.assert_array_equal(graded[0].outcomes.lengths[:2],
                                [[2, 3, 8, 8], [1, 2, 2, 8]])


def test_text_is_without_the_stop_token_and_meets_its_example(graded):
  found, fake = graded
  assert found.texts == [text.rstrip('$') for text in TEXTS]
  np.testing.assert_array_equal(found.rows, np.arange(16))
  assert [example.question for _, example in fake.items] == [
      q for q in 'pqrs' for _ in range(4)]


def test_extras_by_name(graded):
  extras = graded[0].outcomes.extras
  assert sorted(extras) == ['boxed', 'crash', 'parsed', 'timeout']
  np.testing.assert_array_equal(extras['timeout'][1], [0, 1, 0, 1])
  np.testing.assert_array_equal(extras['crash'][1], [0, 0, 1, 0])
  np.testing.assert_array_equal(extras['boxed'][0], [1, 1, 1, 1])
  np.testing.assert_array_equal(graded[0].outcomes.prompt_index,
                                [40, 41, 42, 43])
  np.testing.assert_array_equal(graded[0].outcomes.target_lengths,
                                [0, 1, 2, 3])


def test_what_was_graded_ahead_is_not_graded_again(tokenizer, mesh, graded):
  class Progress:
    def __init__(self, rows):
      self.finished = np.array(rows)

    def read(self):
      tokens, mask = (np.asarray(x) for x in (whole.completion_tokens,
                                              whole.completion_mask))
      return self.finished, tokens[self.finished], mask[self.finished].sum(-1)

  whole, calls = samples(tokenizer, mesh, TEXTS), []

  class Counting(Grader):
    def grade(self, completions, rows, whole=True):
      calls.append((len(completions), whole))
      return super().grade(completions, rows)

  fake, rows = Counting(), examples('p', 'q', 'r', 's')
  with rollout.Ahead(fake, tokenizer, rows, 4) as ahead:
    for part in ([5, 0, 12], [], [3]):
      ahead.watch(Progress(part))
    found = rollout.grade(whole, prompts_of(mesh, 4), rows, fake, tokenizer,
                          ahead)
  assert calls == [(3, False), (1, False), (12, False)]
  assert found.texts == graded[0].texts
  assert found.verdicts == graded[0].verdicts
  jax.tree.map(np.testing.assert_array_equal, found.outcomes,
               graded[0].outcomes)


def test_every_stop_token_stops(tokenizer, mesh):
  assert len(tokenizer.eos_ids) > 1
  rollout_ = samples(tokenizer, mesh, ['ab'] * 8, slots=3)
  last = np.array(tokenizer.eos_ids)[np.arange(8)]
  tokens = np.asarray(rollout_.completion_tokens).copy()
  tokens[:, 2] = last
  tokens, mask = sharding.to_global((tokens, np.ones((8, 3), bool)),
                                    sharding.batch(mesh))
  found = rollout.grade(
      rollout_.replace(completion_tokens=tokens, completion_mask=mask),
      prompts_of(mesh, 2), examples('p', 'q'), Grader(), tokenizer)
  assert not np.asarray(found.outcomes.truncated).any()


def test_the_shares_of_hosts_tile_the_batch(mesh):
  batch = sharding.to_global(np.arange(16 * 3).reshape(16, 3),
                             sharding.batch(mesh))
  rows, values = sharding.local_rows(batch)
  np.testing.assert_array_equal(rows, np.arange(16))
  np.testing.assert_array_equal(values, batch)
  # A tensor axis holds copies: each row is still graded once.
  copies = sharding.make_mesh(data=2, fsdp=2, tensor=2)
  rows, values = sharding.local_rows(sharding.to_global(
      np.arange(16), sharding.batch(copies)))
  np.testing.assert_array_equal(rows, np.arange(16))
  np.testing.assert_array_equal(values, np.arange(16))
  # What hosts contribute lands on its rows.
  order = np.random.default_rng(0).permutation(16)
  np.testing.assert_array_equal(
      sharding.from_hosts(order, order[:, None] * 2.0, 16)[:, 0],
      2.0 * np.arange(16))


def test_the_real_grader_agrees(tokenizer, mesh):
  task = toy.make()
  rows = [task[i] for i in range(4)]
  with grader.Grader(('toys.task', {})) as workers:
    found = rollout.grade(samples(tokenizer, mesh, TEXTS), prompts_of(mesh, 4),
                          rows, workers, tokenizer)
  expected = [task.grade(text.rstrip('$'), rows[b // 4])['correct']
              for b, text in enumerate(TEXTS)]
  whole = ~np.asarray(found.outcomes.truncated).reshape(-1)
  np.testing.assert_array_equal(
      np.asarray(found.outcomes.correct).reshape(-1), expected * whole)
  assert jax.tree.all(jax.tree.map(
      lambda x: x.shape[0] == 4, found.outcomes))
