# SPDX-License-Identifier: Apache-2.0
r"""LASER, -D and -DE by hand: the steps, the difficulty, the renewed L."""

import jax
import numpy as np
import pytest

from lapo_jax import types
from lapo_jax.rewards import laser


def test_the_fixed_step_by_hand():
  correct = np.array([[1, 1, 0, 0, 0]])
  lengths = np.array([[4096, 4097, 10, 10, 5000]])
  boxed = np.array([[1, 1, 1, 0, 1]], np.float32)
  np.testing.assert_allclose(laser.reward(correct, lengths, boxed),
                             [[1.5, 1, -0.5, -1, -0.5]])
  # Without the text every completion has its box.
  np.testing.assert_allclose(laser.reward(correct, lengths),
                             [[1.5, 1, -0.5, -0.5, -0.5]])
  np.testing.assert_allclose(
      laser.reward(correct, lengths, target=10, bonus=0.25),
      [[1, 1, -0.5, -0.5, -0.5]])


@pytest.mark.parametrize('correct,expected', [
    pytest.param([1] * 3, [1.5, 1.5, 1], id='all'),
    pytest.param([0] * 3, [-0.5] * 3, id='none'),
    pytest.param([0, 0, 1], [-0.5, -0.5, 1], id='one, too long'),
])
def test_whole_groups(correct, expected):
  found = laser.reward(np.array([correct]), np.array([[5, 5, 9000]]))
  np.testing.assert_allclose(found, [expected])


def test_exploration_rewards_long_wrong_boxed_ones():
  correct = np.array([[1, 0, 0, 0, 0]])
  lengths = np.array([[50, 101, 101, 101, 100]])
  boxed = np.array([[1, 1, 1, 0, 1]])
  explores = np.array([[1, 1, 0, 1, 1]])
  # Correct within L; explores; repeats itself; has no box; is not longer.
  np.testing.assert_allclose(
      laser.reward(correct, lengths, boxed, np.array([100]), explores),
      [[1.5, 0, -0.5, -1, -0.5]])


def test_difficulty_bands():
  groups = np.arange(8)[None, :] < np.array([8, 6, 5, 3, 2, 0])[:, None]
  # Of 8: 6 is above 2/3 (5.33), 5 is not; 3 is above 1/3 (2.67), 2 is not.
  np.testing.assert_array_equal(laser.difficulty(groups), [0, 0, 1, 1, 2, 2])
  thirds = np.array([[1, 1, 0], [1, 0, 0], [0, 0, 0]])
  np.testing.assert_array_equal(laser.difficulty(thirds), [0, 1, 2])


def test_targets_are_renewed_from_coverage(outcomes):
  method = laser.make('difficulty', target=100, cap=400, num_candidates=4,
                      interval=2)
  step, state = jax.jit(method.apply), method.init(9)
  # Six completions: m is 4 for the easy group, 2 for the medium one.
  record = outcomes([[1] * 6, [1, 1, 1, 0, 0, 0]],
                    [[90, 150, 150, 250, 250, 350],
                     [90, 150, 250, 250, 350, 350]], boxed=np.ones((2, 6)))
  rewards, state = step(record, state)
  np.testing.assert_allclose(rewards.terms['length'],
                             [[0.5, 0, 0, 0, 0, 0]] * 2)
  np.testing.assert_allclose(state['targets'], [100, 100, 100])
  np.testing.assert_allclose(state['covered'],
                             [[1, 3, 5, 6], [1, 2, 4, 6], [0] * 4])
  _, state = step(record, state)
  # Easy, of 12: 2·4 < 12 ≤ 6·4, so 200. Medium: 4·2 < 12 ≤ 8·2, so 300.
  # No hard group was seen: the cap.
  np.testing.assert_allclose(state['targets'], [200, 300, 400])
  np.testing.assert_array_equal(state['covered'], np.zeros((3, 4)))
  np.testing.assert_array_equal(state['seen'], [0, 0, 0])
  rewards, state = step(record, state)
  np.testing.assert_allclose(rewards.terms['length'],
                             [[0.5, 0.5, 0.5, 0, 0, 0],
                              [0.5, 0.5, 0.5, 0, 0, 0]])
  assert int(state['steps']) == 3


def test_hard_groups_need_full_coverage(outcomes):
  method = laser.make('difficulty', cap=400, num_candidates=4, interval=1)
  record = outcomes([[1, 0, 0, 0, 0, 0]], [[10, 20, 30, 40, 50, 201]],
                    boxed=np.ones((1, 6)))
  _, state = method.apply(record, method.init(9))
  np.testing.assert_allclose(state['targets'], [400, 400, 300])


def test_exploration_end_to_end(outcomes):
  method = laser.make('exploration', target=100)
  record = outcomes([[1, 0, 0]], [[90, 200, 200]], boxed=np.ones((1, 3)),
                    repetitive=[[0, 0, 1]])
  rewards, _ = method.apply(record, method.init(9))
  np.testing.assert_allclose(rewards.total, [[1.5, 0, -0.5]])


def test_what_is_read_of_the_text():
  example = types.Example('', '')
  assert laser.make().read('so \\boxed{2}', example) == {'boxed': 1.0}
  assert laser.make().read('so 2', example) == {'boxed': 0.0}
  found = laser.make('exploration').read('wait no ' * 20, example)
  assert found == {'boxed': 0.0, 'repetitive': 1.0}


@pytest.mark.parametrize('words,expected', [
    pytest.param(['a'] * 8, False, id='too short to tell'),
    pytest.param([f'w{i}' for i in range(300)], False, id='no word twice'),
    # 40 words, n = 3: three words again 5 later, 5 < 40 // 3.
    pytest.param([f'w{i}' for i in range(32)] + list('abcde') + list('abc'),
                 True, id='near'),
    # The same three words 37 apart: not near, and no 6 words come again.
    pytest.param(list('abc') + [f'w{i}' for i in range(34)] + list('abc'),
                 False, id='far'),
    # 206 words, n = 4: twice is not often, but eight words come again.
    pytest.param(list('abcdefgh') + [f'w{i}' for i in range(190)] +
                 list('abcdefgh'), True, id='eight words again'),
    pytest.param(list('abcd') + [f'w{i}' for i in range(196)] + list('abcd'),
                 False, id='four words twice'),
    # 34 words, n = 3: a run of one word is no 3-gram; its 6-gram comes again.
    pytest.param([f'w{i}' for i in range(28)] + ['a'] * 6, False, id='run'),
    pytest.param([f'w{i}' for i in range(28)] + ['a'] * 7, True, id='long run'),
])
def test_repetition_rule(words, expected):
  assert laser.is_repetitive(words) == expected


def test_settings_are_checked():
  with pytest.raises(ValueError, match="'D'.*'difficulty'"):
    laser.make('D')
  with pytest.raises(ValueError, match='got 0 and 20'):
    laser.make(num_candidates=0)
