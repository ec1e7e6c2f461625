# SPDX-License-Identifier: Apache-2.0
"""L1 by hand: exact, maximum with both slopes, and what the prompt says."""

import numpy as np
import pytest

from lapo_jax.rewards import l1


@pytest.mark.parametrize('correct,lengths,expected', [
    # n = 500. 300 off: 1 − 0.09. Wrong and cut at 4096: −3e-4 · 3596.
    pytest.param([1, 1, 1, 0, 0], [500, 800, 200, 500, 4096],
                 [1, 0.91, 0.91, 0, -1.0788], id='mixed'),
    pytest.param([1, 1], [400, 1500], [0.97, 0.7], id='all'),
    pytest.param([0, 0], [400, 1500], [-0.03, -0.3], id='none'),
    pytest.param([0, 1], [500, 4500], [0, -0.2], id='one, beaten by a wrong'),
    pytest.param([1, 0], [500, 500], [1, 0], id='equal'),
])
def test_exact_by_hand(correct, lengths, expected):
  found = l1.reward(np.array([correct]), np.array([lengths]), np.array([500]))
  np.testing.assert_allclose(found, [expected], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize('slope,expected', [
    # α(n − l) = 0.6, 0.15, 0, −0.15, −0.6; plus ½, cut to [0, 1].
    ('paper', [1.0, 0.65, 0.5, 0.35, 0.0, 0.0]),
    # Half of it: 0.3, 0.075, 0, −0.075, −0.3.
    ('code', [0.8, 0.575, 0.5, 0.425, 0.2, 0.0]),
])
def test_maximum_by_hand(slope, expected):
  lengths = np.array([[500, 2000, 2500, 3000, 4500, 100]])
  correct = np.array([[1, 1, 1, 1, 1, 0]])
  found = l1.maximum(correct, lengths, np.array([2500]), slope=slope)
  np.testing.assert_allclose(found, [expected], rtol=1e-5, atol=1e-6)
  np.testing.assert_array_equal(
      l1.reward(correct, lengths, np.array([2500]), mode='maximum',
                slope=slope), found)


def test_mixed_reads_the_parity_of_n():
  correct, lengths = np.ones((2, 2)), np.array([[501, 1501], [500, 1500]])
  found = l1.reward(correct, lengths, np.array([501, 500]), mode='mixed')
  # Odd: at most 501, ½ and ½ − 0.3. Even: exactly 500, 1 and 1 − 0.3.
  np.testing.assert_allclose(found, [[0.5, 0.2], [1, 0.7]], rtol=1e-5)


@pytest.mark.parametrize('mode', l1.MODES)
def test_terms_add_up_to_the_reward(mode, outcomes):
  record = outcomes([[1, 0, 1]], [[400, 700, 900]], targets=[501])
  rewards, _ = l1.make(mode).apply(record, ())
  assert sorted(rewards.terms) == ['correct', 'length']
  np.testing.assert_allclose(
      rewards.total, l1.reward(record.correct, record.lengths,
                               record.target_lengths, mode=mode), atol=1e-6)


def test_the_prompt_states_n(told):
  example = told(l1.make(low=7, high=7))
  assert example.question == 'Add. Think for 7 tokens.'
  assert example.target_length == 7
  assert (told(l1.make('maximum', low=7, high=7)).question ==
          'Add. Think for maximum 7 tokens.')
  mixed = l1.make('mixed', low=1, high=100)
  drawn = [told(mixed, seed=seed) for seed in range(50)]
  for example in drawn:
    odd = example.target_length % 2 == 1
    assert ('maximum' in example.question) == odd
  assert 10 < sum('maximum' in e.question for e in drawn) < 40


def test_n_is_drawn_from_the_whole_range(told):
  method = l1.make(low=100, high=103)
  numbers = {told(method, seed=seed).target_length for seed in range(60)}
  assert numbers == {100, 101, 102, 103}


def test_unknown_settings_name_the_legal_ones():
  with pytest.raises(ValueError, match="'max'.*'maximum'"):
    l1.make('max')
  with pytest.raises(ValueError, match="'steep'.*'paper'"):
    l1.make(slope='steep')
  with pytest.raises(ValueError, match='low 0 and high 9'):
    l1.make(low=0, high=9)
