# SPDX-License-Identifier: Apache-2.0
"""Methods as TRL calls them: lists in, a float for each completion out."""

import jax.numpy as jnp
import numpy as np
import pytest

from lapo_jax import plugins, trl_adapter
from lapo_jax.rewards import hapo, repetition, shorter_better

G, EOS = 4, 99

REFUSED = {
    'sar': 'sar needs log-probs',
    'drpo': 'drpo needs log-probs',
    'dot': 'dot cuts completions',
    'sas': 'sas cuts completions or silences tokens',
    'e1': 'e1 writes more into a prompt',
}


def ids(*lengths, cut=()):
  """Tokens of completions; those at the places `cut` lack the stop token."""
  return [list(range(length - 1)) + [7 if i in cut else EOS]
          for i, length in enumerate(lengths)]


def call(function, completion_ids, prompts=None, completions=None, **columns):
  """As `GRPOTrainer._calculate_rewards` of TRL 1.16 does."""
  count = len(completion_ids)
  return function(
      prompts=prompts or [f'problem {b // G}' for b in range(count)],
      completions=completions or [f'text {b}' for b in range(count)],
      completion_ids=completion_ids, trainer_state=object(),
      log_extra=lambda *a: None, log_metric=lambda *a: None, **columns)


def make(name='shorter_better', correct='correct', **settings):
  return trl_adapter.RewardFunction(
      name, correct=correct, num_generations=G, eos_token_ids=EOS, **settings)


def test_a_tokenizer_without_a_stop_token_is_refused():
  with pytest.raises(ValueError, match='eos_token_ids.*one id or several'):
    trl_adapter.RewardFunction('accuracy', correct='correct',
                               num_generations=G, eos_token_ids=[])


@pytest.mark.parametrize('grade', [float('nan'), 5.0, -1])
def test_a_grade_is_a_share(grade):
  with pytest.raises(ValueError, match=f'the grade {grade}: expected one in'):
    call(make(), ids(3, 5, 9, 4), correct=[0, grade, 1, None])


def test_the_loops_numbers():
  lengths, correct = [3, 5, 9, 4, 2, 2, 8, 6], [0, 1, 1, 0, 0, 0, 0, 0]
  found = call(make(beta=0.1), ids(*lengths), correct=correct)
  assert all(type(reward) is float for reward in found)
  # SOL is 5 in the first group, the mean 4.5 in the second.
  np.testing.assert_allclose(
      found, [-0.2, 2, 1.6, -0.1, -0.25, -0.25, -0.35, -0.15], rtol=1e-6)
  np.testing.assert_allclose(found, np.ravel(shorter_better.reward(
      np.reshape(correct, (2, G)), np.reshape(lengths, (2, G)), beta=0.1)))


def test_tokens_may_come_as_arrays():
  lists = ids(3, 5, 9, 4, cut=(2,))
  correct = [1, 1, 1, 0]
  arrays = [jnp.asarray(row) for row in lists]
  assert (call(make('kimi'), arrays, correct=correct) ==
          call(make('kimi'), lists, correct=correct))


@pytest.mark.parametrize('name', plugins.names('rewards'))
def test_every_method_fits_or_says_why_not(name):
  settings = {'num_examples': 9}
  settings |= {'gfpo': {'k': 2}, 'qlpo': {'m': 2}}.get(name, {})
  if name in REFUSED:
    with pytest.raises(ValueError, match=REFUSED[name]):
      make(name, **settings)
    return
  function = make(name, **settings)
  assert function.__name__ == name
  found = call(function, ids(3, 5, 9, 4, 2, 2, 8, 6),
               correct=[0, 1, 1, 0, 0, 0, 0, 1], index=[5] * G + [2] * G,
               target_lengths=[512] * 2 * G)
  assert len(found) == 2 * G and np.isfinite(found).all()


def test_grades_come_from_a_function_of_the_same_contract():
  def solved(completions, answer, log_extra, **unused):
    assert callable(log_extra)
    return [float(text == right)
            for text, right in zip(completions, answer, strict=True)]

  found = call(make('accuracy', correct=solved), ids(2, 2, 2, 2),
               completions=['4', '5', '4', ''], answer=['4'] * G)
  assert found == [1.0, 0.0, 1.0, 0.0]
  with pytest.raises(ValueError, match='1 grades of 4'):
    call(make('accuracy', correct=lambda **unused: [1.0]), ids(2, 2, 2, 2))


def test_a_truncated_completion_is_wrong():
  found = call(make('accuracy'), ids(2, 3, 4, 5, cut={1, 3}), correct=[1] * G)
  assert found == [1.0, 0.0, 1.0, 0.0]
  # An empty one has no stop token either; several tokens may stop.
  both = trl_adapter.RewardFunction('accuracy', correct='correct',
                                    num_generations=2, eos_token_ids=(EOS, 7))
  assert call(both, [[1, 7], []], prompts=['a', 'a'],
              correct=[1, 1]) == [1.0, 0.0]


def test_a_group_without_grades_has_no_rewards_and_touches_nothing():
  function = make('hapo', num_examples=3)
  found = call(function, ids(3, 5, 9, 4, 2, 2, 8, 6),
               correct=[None, 1, 1, 0, 1, 0, 0, 0], index=[1] * G + [2] * G)
  assert found[:G] == [None] * G and found[G:] == [1.0, 0.0, 0.0, 0.0]
  np.testing.assert_array_equal(np.asarray(function.state) < 100,
                                [False, False, True])
  assert call(function, ids(3, 3, 3, 3), correct=[None] * G,
              index=[0] * G) == [None] * G


def test_memory_is_found_again_by_the_problems_id():
  function = make('hapo', num_examples=3)
  call(function, ids(10, 20, 30, 40), correct=[1, 1, 0, 0], index=[2] * G)
  later = ids(5, 10, 15, 40)
  found = call(function, later, correct=[1, 1, 1, 0], index=[2] * G)
  np.testing.assert_allclose(found, np.ravel(hapo.reward(
      np.array([[1, 1, 1, 0]]), np.array([[5, 10, 15, 40]]),
      np.array([10]))), rtol=1e-6)
  saved = np.asarray(function.state)
  again = make('hapo', num_examples=3)
  again.state = saved
  kwargs = {'correct': [1, 0, 0, 0], 'index': [2] * G}
  assert call(again, later, **kwargs) == call(function, later, **kwargs)


def test_texts_and_tokens_are_read():
  messages = [[{'role': 'assistant', 'content': text}]
              for text in ('\\boxed{1}', 'one', '\\boxed{1}', 'none')]
  found = call(make('laser', target=4), ids(4, 4, 9, 9), completions=messages,
               correct=[1, 0, 1, 0])
  assert found == [1.5, -1.0, 1.0, -1.0]
  tokens = [[5, 5, 5, EOS], [1, 2, 3, EOS], [5, EOS], [1, 2, 1, 2, EOS]]
  found = call(make('repetition', n=1), tokens, correct=[1, 1, 0, 0])
  shares = np.array([[0.5, 0, 0, 0.4]], np.float32)
  np.testing.assert_allclose(found, np.ravel(repetition.reward(
      np.array([[1, 1, 0, 0]]), np.ones((1, G)), shares)), rtol=1e-6)


def test_what_is_left_out_of_its_group_has_no_advantage():
  found = call(make('gfpo', k=3), ids(3, 5, 9, 4, 2, 2, 8, 6),
               correct=[0, 1, 1, 0, 1, 1, 0, 1])
  # The longest of each group is out; 0, 1, 0 and 1, 1, 1 are left. TRL takes
  # the mean of a group from it, which is none.
  sd = np.sqrt(1 / 3) + 1e-4
  np.testing.assert_allclose(
      found, [-1 / 3 / sd, 2 / 3 / sd, 0, -1 / 3 / sd, 0, 0, 0, 0], rtol=1e-6)
  assert abs(sum(found[:G])) < 1e-6


def test_what_is_missing_is_named():
  four = ids(2, 2, 2, 2)
  with pytest.raises(ValueError, match='hapo remembers.*num_examples'):
    make('hapo')
  with pytest.raises(ValueError, match=r"needs a column `index`.*\['correct'"):
    call(make('hapo', num_examples=3), four, correct=[1] * G)
  with pytest.raises(ValueError, match='index is 1 and 2 for.*one prompt'):
    call(make('hapo', num_examples=3), four, correct=[1] * G,
         index=[1, 2, 1, 1])
  with pytest.raises(ValueError, match='index 3 to 3.*0 to 2'):
    call(make('hapo', num_examples=3), four, correct=[1] * G, index=[3] * G)
  with pytest.raises(ValueError, match='l1 needs a column `target_lengths`'):
    call(make('l1'), four, correct=[1] * G)
  with pytest.raises(ValueError, match='needs a column `grade`'):
    call(make(correct='grade'), four)


def test_groups_that_are_torn_are_refused():
  with pytest.raises(ValueError, match='the 6 that came'):
    call(make(), ids(2, 2, 2, 2, 2, 2), correct=[1] * 6)
  with pytest.raises(ValueError, match='the 4 that came'):
    call(make(), ids(2, 2, 2, 2), prompts=['a', 'a', 'b', 'b'],
         correct=[1] * G)


def test_a_memory_is_not_torn_over_processes(monkeypatch):
  monkeypatch.setenv('WORLD_SIZE', '2')
  with pytest.raises(ValueError, match='lead has a memory, and each of 2'):
    make('lead')
  make('shorter_better')
