# SPDX-License-Identifier: Apache-2.0
"""LAPO by hand: both rewards, the table M(q) over visits, the sentences."""

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from lapo_jax import types
from lapo_jax.advantages import from_rewards, group_advantages
from lapo_jax.rewards import lapo

LONG = [100, 200, 300, 400, 500, 600, 700, 800]
SIGMA_OFF = 0.8 * np.exp(-0.5)  # β times the Gaussian one σ away


def outcomes(correct, lengths, index, targets=None):
  """Outcomes of groups of problems `index`."""
  correct = jnp.asarray(correct, jnp.float32)
  targets = [0] * len(index) if targets is None else targets
  return types.Outcomes(
      correct=correct, lengths=jnp.asarray(lengths, jnp.int32),
      truncated=jnp.zeros(correct.shape, bool),
      prompt_index=jnp.asarray(index, jnp.int32),
      target_lengths=jnp.asarray(targets, jnp.int32))


def told(method, state, index, question='Add.'):
  """What `instruct` makes of problem `index`, memory on the host."""
  return method.instruct(types.Example(question, '2'), index,
                         jax.device_get(state), np.random.default_rng(0))


@pytest.mark.parametrize('correct,lengths,expected', [
    # Band 310 to 590 (ranks 2.1 and 4.9): 300 and 600 lie 10 outside.
    pytest.param([1] * 8, LONG, [1, 1, 1.63, 1.7, 1.7, 1.63, 1, 1], id='all'),
    # Correct 100, 140, 260: band 124 to 188.
    pytest.param([1, 0, 1, 0, 1, 0], [100, 50, 140, 4096, 260, 150],
                 [1 + 0.7 * 0.76, 0, 1.7, 0, 1 + 0.7 * 0.28, 0], id='mixed'),
    pytest.param([0, 0, 1, 0], [9, 9, 4000, 9], [0, 0, 1.7, 0], id='one'),
    pytest.param([0] * 4, [1, 2, 3, 4096], [0] * 4, id='none'),
    pytest.param([1, 1, 0, 1], [50] * 4, [1.7, 1.7, 0, 1.7], id='equal'),
    # The truncated completion is wrong, its length in no statistic.
    pytest.param([1, 1, 0], [100, 110, 4096],
                 [1 + 0.7 * 0.97, 1 + 0.7 * 0.97, 0], id='truncated'),
    # A grade above ½ is correct for the band and stays itself in the sum.
    pytest.param([0.75, 0.5], [80, 80], [0.75 + 0.7, 0.5], id='graded'),
])
def test_discovery_by_hand(correct, lengths, expected):
  correct = np.array([correct], np.float32)
  lengths = np.array([lengths], np.int32)
  np.testing.assert_allclose(lapo.reward(correct, lengths), [expected],
                             rtol=1e-6)
  np.testing.assert_array_equal(lapo.discovery(correct, lengths),
                                lapo.reward(correct, lengths))


def test_discovery_settings_act():
  correct, lengths = jnp.ones((1, 8), jnp.int32), jnp.array([LONG])
  # Ranks 0 and 7: everything is in the band.
  np.testing.assert_allclose(
      lapo.reward(correct, lengths, alpha=0.5, low=0.0, high=1.0),
      np.full((1, 8), 1.5))
  np.testing.assert_allclose(
      lapo.reward(correct, lengths, alpha=1, slope=20)[0, 2], 1.5, rtol=1e-6)


@pytest.mark.parametrize('dtype', [np.float32, np.int32, bool])
def test_internalisation_by_hand(dtype):
  correct = np.array([[1, 1, 1, 0, 1], [0, 0, 0, 0, 0]], dtype)
  lengths = np.array([[200, 320, 80, 200, 4000], [1, 2, 3, 4, 5]])
  reward = lapo.reward(correct, lengths, np.array([200, 3]))
  np.testing.assert_allclose(
      reward, [[1.8, 1 + SIGMA_OFF, 1 + SIGMA_OFF, 0, 1], [0] * 5], rtol=1e-6)
  np.testing.assert_array_equal(
      lapo.internalisation(correct, lengths, np.array([200, 3])), reward)
  narrow = lapo.reward(correct, lengths, np.array([200, 3]), beta=0.7,
                       sigma=60.0)
  assert float(narrow[0, 1]) == pytest.approx(1 + 0.7 * np.exp(-2), rel=1e-6)


def test_a_wrong_completion_never_beats_a_correct_one():
  rng = np.random.default_rng(0)
  correct = rng.random((200, 8)) < 0.5
  correct[:, 0], correct[:, 1] = True, False
  lengths = rng.integers(1, 4097, (200, 8))
  for targets in (None, rng.integers(1, 4097, 200)):
    reward = np.asarray(lapo.reward(correct, lengths, targets))
    assert (np.where(correct, reward, np.inf).min(1) >=
            np.where(correct, -np.inf, reward).max(1) + 1.0).all()


def test_terms_add_up_to_the_reward():
  rng = np.random.default_rng(0)
  record = outcomes(rng.random((4, 8)) < 0.5, rng.integers(1, 2000, (4, 8)),
                    [3, 1, 0, 2], rng.integers(1, 2000, 4))
  for stage, targets in (('discovery', None),
                         ('internalisation', record.target_lengths)):
    method = lapo.make(stage)
    rewards, _ = method.apply(record, method.init(4))
    assert sorted(rewards.terms) == ['correct', 'length']
    np.testing.assert_allclose(
        rewards.total, lapo.reward(record.correct, record.lengths, targets),
        rtol=1e-6)


def test_the_table_follows_every_visit_of_discovery():
  method = lapo.make('discovery', cap=1000)
  step, state = jax.jit(method.apply), method.init(5)
  np.testing.assert_array_equal(state['target'], [1000] * 5)
  _, state = step(outcomes([[1, 1, 1, 0], [0, 0, 0, 0]],
                           [[100, 140, 260, 30], [9] * 4], [3, 1]), state)
  np.testing.assert_allclose(state['target'], [1000, 1000, 1000, 140, 1000])
  np.testing.assert_allclose(state['low'], [1000, 1000, 1000, 124, 1000])
  np.testing.assert_allclose(state['high'], [1000, 1000, 1000, 188, 1000])
  # The other way round: looked up by id, and refreshed even if longer.
  _, state = step(outcomes([[1, 0, 0, 0], [1, 1, 0, 0]],
                           [[700, 1, 1, 1], [400, 500, 1, 1]], [1, 3]), state)
  np.testing.assert_allclose(state['target'], [1000, 700, 1000, 450, 1000])
  # Solved before, not today: unsolved again.
  _, state = step(outcomes([[0] * 4], [[5] * 4], [3]), state)
  np.testing.assert_allclose(state['target'], [1000, 700, 1000, 1000, 1000])
  np.testing.assert_allclose(state['high'], [1000, 700, 1000, 1000, 1000])


def test_internalisation_takes_over_the_table_and_lowers_it():
  discover = lapo.make('discovery', cap=1000)
  method = lapo.make('internalisation', cap=1000)
  state = discover.init(4)
  _, state = discover.apply(outcomes([[1, 1], [1, 0]], [[300, 400], [90, 80]],
                                     [2, 0]), state)
  assert jax.tree.structure(state) == jax.tree.structure(method.init(4))
  step = jax.jit(method.apply)

  def visit(correct, lengths, state):
    """Problem 2: what the prompt states, the length rewards, the new table."""
    n = told(method, state, 2).target_length
    record = outcomes([correct], [lengths], [2], [n])
    rewards, state = step(record, state)
    return n, np.asarray(rewards.terms['length'])[0], state

  # A longer group: M(q) stays.
  n, length, state = visit([1, 1], [350, 470], state)
  assert n == 350
  np.testing.assert_allclose(length, [0.8, SIGMA_OFF], rtol=1e-6)
  np.testing.assert_allclose(state['target'], [90, 1000, 350, 1000])
  # A shorter one: this step is still rewarded around 350 …
  n, length, state = visit([1, 0], [230, 350], state)
  assert n == 350
  np.testing.assert_allclose(length, [SIGMA_OFF, 0], rtol=1e-6)
  # … and the next prompt states 230.
  n, length, state = visit([0, 0], [10, 20], state)
  assert n == 230
  np.testing.assert_array_equal(length, [0, 0])
  # Nothing correct: unchanged.
  n, _, state = visit([1, 1], [100, 200], state)
  assert n == 230
  np.testing.assert_allclose(state['target'], [90, 1000, 150, 1000])
  np.testing.assert_allclose(state['low'], [90, 1000, 130, 1000])


def test_an_unsolved_problem_centres_on_its_own_median():
  method = lapo.make('internalisation', cap=1000)
  state = method.init(3)
  assert told(method, state, 1).target_length == 1000
  rewards, state = method.apply(
      outcomes([[1, 1, 1, 0], [0] * 4], [[80, 200, 320, 200], [7] * 4],
               [1, 2], [1000, 1000]), state)
  np.testing.assert_allclose(
      rewards.terms['length'],
      [[SIGMA_OFF, 0.8, SIGMA_OFF, 0], [0] * 4], rtol=1e-6)
  np.testing.assert_allclose(state['target'], [1000, 200, 1000])


@pytest.mark.parametrize('statistic,expected', [
    ('median', 140.0), ('mean', 500 / 3), ('min', 100.0)])
@pytest.mark.parametrize('stage', lapo.STAGES)
def test_statistics(stage, statistic, expected):
  method = lapo.make(stage, statistic=statistic)
  _, state = method.apply(outcomes([[1, 0, 1, 1]], [[260, 5, 100, 140]], [0],
                                   [4096]), method.init(1))
  assert float(state['target'][0]) == pytest.approx(expected)


@pytest.mark.parametrize('guidance,question,prefill', [
    ('exact', 'Add.', ' I will answer the question with 140 tokens.'),
    ('range', 'Add.', ' I will answer the question with 124 to 188 tokens.'),
    ('outside', 'Add. Answer the question with 140 tokens.', ''),
    ('implicit', 'Add.', ''),
])
def test_guidance(guidance, question, prefill):
  method = lapo.make('internalisation', guidance=guidance)
  state = {'target': jnp.array([4096.0, 140.9]),
           'low': jnp.array([4096.0, 124.2]),
           'high': jnp.array([4096.0, 188.5])}
  example = told(method, state, 1)
  assert (example.question, example.prefill) == (question, prefill)
  assert example.target_length == 140 and example.answer == '2'


def test_discovery_states_nothing():
  method = lapo.make()
  example = types.Example('Add.', '2')
  assert told(method, method.init(2), 1) == example


def test_in_an_all_correct_group_alpha_cancels():
  correct, lengths = np.ones((1, 8), np.float32), np.array([LONG])
  weak = group_advantages(lapo.reward(correct, lengths, alpha=0.01), eps=0.0)
  strong = group_advantages(lapo.reward(correct, lengths, alpha=0.7), eps=0.0)
  np.testing.assert_allclose(weak, strong, atol=1e-3)
  rewards, _ = lapo.make().apply(outcomes(correct, lengths, [0]),
                                 lapo.make().init(1))
  # Term by term the constant term is silent, the other has its own sd.
  decoupled = from_rewards(rewards, lengths, decoupled=True)
  np.testing.assert_allclose(decoupled, strong, atol=1e-2)


def test_unknown_settings_name_the_legal_ones():
  with pytest.raises(ValueError, match="'third'.*'discovery'"):
    lapo.make('third')
  with pytest.raises(ValueError, match="'none'.*'implicit'"):
    lapo.make(guidance='none')
  with pytest.raises(ValueError, match="'mode'.*'median'"):
    lapo.make(statistic='mode')
  for settings in ({'low': 30.0, 'high': 70.0}, {'low': 0.9, 'high': 0.1}):
    with pytest.raises(ValueError, match='0 <= low <= high <= 1'):
      lapo.make(**settings)
  for settings in ({'slope': 0.0}, {'sigma': -5.0}, {'sigma': float('nan')}):
    with pytest.raises(ValueError, match='expected tokens above 0'):
      lapo.make(**settings)
  with pytest.raises(TypeError, match='sigma'):
    lapo.reward(jnp.ones((1, 2)), jnp.ones((1, 2)), sigma=1.0)


def test_wrong_shapes_are_named_without_the_type_checker():
  ones = jnp.ones((2, 3))
  jaxtyping.config.update('jaxtyping_disable', True)
  try:
    with pytest.raises(ValueError, match=r'\(2, 3\), lengths \(2, 1\)'):
      lapo.reward(ones, ones[:, :1])
    with pytest.raises(ValueError, match=r'target_lengths.*\(3,\).*\(2, 3\)'):
      lapo.reward(ones, ones, jnp.ones(3))
  finally:
    jaxtyping.config.update('jaxtyping_disable', False)
