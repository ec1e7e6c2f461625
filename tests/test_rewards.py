# SPDX-License-Identifier: Apache-2.0
"""The contract's laws, tried on every file of `rewards/`; none is listed."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lapo_jax import plugins, types

P, G, N, T = 3, 8, 10, 4096
GRADES = ('mixed', 'all', 'none', 'one')


@pytest.fixture(params=plugins.names('rewards'))
def name(request):
  return request.param


@pytest.fixture
def method(name):
  return plugins.make('rewards', name)


def graded(method, how='mixed', lengths=None):
  """Outcomes of P groups, with the extras that the method asks for."""
  rng = np.random.default_rng(GRADES.index(how))
  correct = {'mixed': np.arange(G) % 3 > 0, 'all': np.ones(G, bool),
             'none': np.zeros(G, bool), 'one': np.arange(G) == 2}[how]
  correct = np.tile(correct, (P, 1))
  if lengths is None:
    lengths = rng.integers(1, T, (P, G))
  truncated = ~correct & (np.arange(G) == 0)
  example = types.Example('1 + 1', '2')
  extras = {key: jnp.full((P, G), value, jnp.float32) for key, value in
            method.read('so it is \\boxed{2}', example).items()}
  extras.update(measured(method))
  return types.Outcomes(
      correct=jnp.asarray(correct, jnp.float32),
      lengths=jnp.asarray(np.where(truncated, T, lengths), jnp.int32),
      truncated=jnp.asarray(truncated),
      prompt_index=jnp.array([7, 0, 4], jnp.int32),
      target_lengths=jnp.full((P,), 500, jnp.int32),
      extras=extras)


def measured(method):
  """What `measure` finds in a rollout of equally likely tokens."""
  one = jnp.ones((P * G, 4), jnp.int32)
  rollout = types.Rollout(one, one > 0, one, one > 0, one > 0, -1.0 * one)
  logprob_fn = lambda r: -jnp.ones(r.completion_tokens.shape)
  encode = lambda examples: types.Prompts(
      one[:len(examples)], one[:len(examples)] > 0,
      jnp.arange(len(examples)), jnp.zeros(len(examples), jnp.int32))
  return method.measure(rollout, logprob_fn, encode)


def test_every_setting_has_a_default(name):
  module = plugins.module('rewards', name)
  assert isinstance(module.make(), types.Reward)
  assert callable(module.reward)
  parameters = inspect.signature(module.make).parameters
  assert set(plugins.defaults('rewards', name)) == set(parameters)
  assert module.__doc__ and 'Departures' in module.__doc__


@pytest.mark.parametrize('how', GRADES)
@pytest.mark.parametrize('equal', [False, True])
def test_shapes_and_finite(method, how, equal):
  lengths = np.full((P, G), 300) if equal else None
  state = method.init(N)
  with jax.debug_nans(True):
    rewards, new_state = jax.jit(method.apply)(graded(method, how, lengths),
                                               state)
  assert rewards.total.shape == (P, G)
  for term in rewards.terms.values():
    assert term.shape == (P, G) and term.dtype == jnp.float32
  if rewards.keep is not None:
    assert rewards.keep.shape == (P, G) and rewards.keep.dtype == bool
  if rewards.weights is not None:
    assert set(rewards.weights) == set(rewards.terms)
  assert all(np.isfinite(leaf).all()
             for leaf in jax.tree.leaves((rewards.total, new_state)))


@pytest.mark.parametrize('how', GRADES)
def test_jit_changes_nothing(method, how):
  outcomes, state = graded(method, how), method.init(N)
  expected = jax.jit(method.apply)(outcomes, state)
  with jax.disable_jit():
    plain = method.apply(outcomes, state)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5,
                                                       atol=1e-6),
               plain, expected)


@pytest.mark.parametrize('how', GRADES)
def test_the_order_within_a_group_does_not_matter(method, how):
  outcomes, state = graded(method, how), method.init(N)
  order = np.random.default_rng(5).permutation(G)
  shuffle = lambda tree: jax.tree.map(lambda x: x[:, order], tree)
  shuffled = outcomes.replace(
      correct=outcomes.correct[:, order], lengths=outcomes.lengths[:, order],
      truncated=outcomes.truncated[:, order], extras=shuffle(outcomes.extras))
  rewards, new_state = method.apply(outcomes, state)
  other, other_state = method.apply(shuffled, state)
  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
  close(other.total, rewards.total[:, order])
  if rewards.keep is not None:
    np.testing.assert_array_equal(other.keep, rewards.keep[:, order])
  jax.tree.map(close, other_state, new_state)


def test_memory_keeps_its_structure_and_owns_its_buffers(method):
  state = method.init(N)
  shapes = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
  # A donated state must not hold one buffer twice.
  step = jax.jit(method.apply, donate_argnums=1)
  expected = shapes(state)
  for how in GRADES:
    _, state = step(graded(method, how), state)
    assert shapes(state) == expected


def test_groups_do_not_see_one_another(method):
  outcomes, state = graded(method), method.init(N)
  rewards, _ = method.apply(outcomes, state)
  changed = outcomes.replace(
      correct=outcomes.correct.at[1].set(1 - outcomes.correct[1]),
      lengths=outcomes.lengths.at[1].set(1))
  other, _ = method.apply(changed, state)
  for name, term in rewards.terms.items():
    np.testing.assert_array_equal(other.terms[name][::2], term[::2])


def test_instruct_takes_memory_from_the_host(method):
  example = types.Example('1 + 1', '2')
  memory = jax.device_get(method.init(N))
  told = method.instruct(example, 3, memory, np.random.default_rng(0))
  assert isinstance(told, types.Example)
  assert isinstance(told.target_length, int)
  assert (told.answer, told.level) == (example.answer, example.level)
