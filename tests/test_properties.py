# SPDX-License-Identifier: Apache-2.0
"""Laws of every method, on whatever groups hypothesis can think of."""

import functools

import hypothesis
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_rewards import WRONG_MAY_WIN, G, N, P, made, measured, step

from lapo_jax import advantages, plugins, types
from lapo_jax.rewards import repetition, sar

T = 16384
NAMES = plugins.names('rewards')

# Examples are the same on every machine and are not timed.
few = functools.partial(
    hypothesis.settings, derandomize=True, deadline=None, database=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow])
grades = st.sampled_from([0.0, 1.0])


@st.composite
def outcomes(draw, name, grade=grades):
  """Graded groups; lengths at the ends and anywhere between."""
  method = made(name)
  fill = lambda dtype, values: draw(arrays.arrays(dtype, (P, G),
                                                  elements=values))
  truncated = fill(bool, st.booleans()) & fill(bool, st.booleans())
  correct = np.where(truncated, 0.0, fill(np.float32, grade))
  lengths = fill(np.int32, st.one_of(
      st.sampled_from([1, 2, T]), st.integers(1, T)))
  found = {*method.read('', types.Example('', '')), *measured(method)}
  return types.Outcomes(
      correct=correct.astype(np.float32),
      lengths=np.where(truncated, T, lengths).astype(np.int32),
      truncated=truncated,
      prompt_index=np.array([3, 1, 8], np.int32),
      target_lengths=draw(arrays.arrays(np.int32, P,
                                        elements=st.integers(1, T))),
      extras={key: np.maximum(fill(np.float32, grades), correct)
              for key in sorted(found)})


def regroup(record, move):
  """The record with `move` done to everything of shape [P, G]."""
  return record.replace(
      correct=move(record.correct), lengths=move(record.lengths),
      truncated=move(record.truncated),
      extras={key: move(value) for key, value in record.extras.items()})


@pytest.mark.parametrize('name', NAMES)
@few(max_examples=15)
@hypothesis.given(st.data())
def test_rewards_and_memory_are_finite(name, data):
  state = made(name).init(N)
  any_grade = st.floats(0, 1, width=32, allow_subnormal=False)
  with jax.debug_nans(True):
    for _ in range(2):  # the second step meets a memory
      rewards, state = step(name)(data.draw(outcomes(name, any_grade)), state)
  for leaf in jax.tree.leaves((rewards, rewards.total, state)):
    assert np.isfinite(leaf).all()


@pytest.mark.parametrize('name', NAMES)
@few(max_examples=15)
@hypothesis.given(st.data())
def test_the_order_within_a_group_does_not_matter(name, data):
  state = made(name).init(N)
  _, state = step(name)(data.draw(outcomes(name)), state)
  record = data.draw(outcomes(name))
  order = np.array(data.draw(st.permutations(range(G))))
  rewards, after = step(name)(record, state)
  moved, moved_after = step(name)(regroup(record, lambda x: x[:, order]), state)
  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
  close(moved.total, rewards.total[:, order])
  if rewards.keep is not None:
    # Ties are broken by order: as many are kept, and of the same lengths.
    kept = lambda lengths, keep: np.sort(np.where(keep, lengths, 0), axis=1)
    np.testing.assert_array_equal(
        kept(record.lengths[:, order], moved.keep),
        kept(record.lengths, rewards.keep))
  jax.tree.map(close, moved_after, after)


@pytest.mark.parametrize('name', NAMES)
@few(max_examples=10)
@hypothesis.given(st.data())
def test_other_groups_change_no_term(name, data):
  state = made(name).init(N)
  record, other = (data.draw(outcomes(name)) for _ in range(2))
  mixed = jax.tree.map(lambda a, b: np.concatenate([a[:1], b[1:]]), record,
                       other)
  rewards, _ = step(name)(record, state)
  mixed_rewards, _ = step(name)(mixed, state)
  for key, term in rewards.terms.items():
    np.testing.assert_array_equal(mixed_rewards.terms[key][0], term[0])


@pytest.mark.parametrize('name', sorted(set(NAMES) - set(WRONG_MAY_WIN)))
@few(max_examples=25)
@hypothesis.given(st.data())
def test_length_alone_lifts_no_wrong_one_above_a_right_one(name, data):
  state = made(name).init(N)
  for _ in range(2):
    record = data.draw(outcomes(name))
    # All but length and grade is equal within a group, as if none was cut.
    record = regroup(record, np.asarray).replace(
        truncated=np.zeros((P, G), bool),
        extras={key: np.repeat(value.max(1, keepdims=True), G, axis=1)
                for key, value in record.extras.items()})
    rewards, state = step(name)(record, state)
    right = record.correct > 0.5
    worst = np.where(right, rewards.total, np.inf).min(axis=1)
    best = np.where(right, -np.inf, rewards.total).max(axis=1)
    assert (best <= worst + 1e-5).all()


@few(max_examples=25)
@hypothesis.given(st.data())
def test_dropped_completions_are_absent(data):
  rewards = data.draw(arrays.arrays(
      np.float32, (P, G), elements=st.floats(-4, 4, width=16)))
  left = data.draw(st.sampled_from([2, 5]))
  keep = np.tile(np.arange(G) < left, (P, 1))
  for baseline in advantages.BASELINES:
    whole = advantages.group_advantages(rewards, keep, baseline=baseline)
    np.testing.assert_array_equal(whole[:, left:], np.zeros((P, G - left)))
    np.testing.assert_allclose(
        whole[:, :left], advantages.group_advantages(
            rewards[:, :left], baseline=baseline), rtol=1e-4, atol=1e-4)


@few(max_examples=25)
@hypothesis.given(st.data())
def test_padding_changes_nothing_that_is_read_of_tokens(data):
  slots, more = 12, 20
  length = data.draw(arrays.arrays(np.int32, (3,),
                                   elements=st.integers(0, slots)))
  fill = lambda width, high: data.draw(arrays.arrays(
      np.int32, (3, width), elements=st.integers(0, high)))
  short = np.arange(slots)[None] < length[:, None]
  long = np.arange(more)[None] < length[:, None]
  tokens = fill(slots, 2)
  padded = np.concatenate([np.where(short, tokens, fill(slots, 2)),
                           fill(more - slots, 2)], axis=1)
  np.testing.assert_array_equal(
      repetition.repeated_share(tokens, short, 2),
      repetition.repeated_share(padded, long, 2))
  given, alone = -tokens / 2, -fill(slots, 8) / 4
  widen = lambda x: np.pad(x, ((0, 0), (0, more - slots)),
                           constant_values=-99.0)
  np.testing.assert_allclose(
      sar.self_alignment(jnp.float32(given), jnp.float32(alone), short),
      sar.self_alignment(jnp.float32(widen(given)), jnp.float32(widen(alone)),
                         long), rtol=1e-5, atol=1e-6)
