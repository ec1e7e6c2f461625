# SPDX-License-Identifier: Apache-2.0
"""The contract's laws, tried on every file of `rewards/`; none is listed.

Those that hold of whatever groups are in `test_properties`.
"""

import functools
import inspect
import pathlib

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from lapo_jax import plugins, types

P, G, N, T = 3, 8, 10, 4096
GRADES = ('mixed', 'all', 'none', 'one')

# Methods whose papers let a wrong completion out-score a correct one by its
# length alone, and why; `test_only_listed_methods_let_a_wrong_one_win`.
WRONG_MAY_WIN = {
    'l1': 'LCPO-Exact subtracts the distance to n from wrong ones too',
    'shorter_better': 'the distance to SOL counts for wrong ones too',
    'lead': 'r_l counts for wrong ones too; the terms meet after normalising',
    'leash': 'only length beyond the target costs, without a bound above 0',
    'hbpo': 'beyond its budget a correct one may get less than 0',
}

# What `reward` may ask for besides grades and lengths.
ARGUMENTS = {
    'target_lengths': np.full(P, 500, np.int32),
    'history': np.full(P, 700, np.int32),
    'budgets': np.full((P, G), 512, np.int32),
    'efforts': np.full(P, 0.75, np.float32),
    'alignment': np.full((P, G), 0.25, np.float32),
    'repeated': np.full((P, G), 0.125, np.float32),
    'scores': np.full((P, G), -0.5, np.float32),
    'strength': 0.2,
}


@pytest.fixture(params=plugins.names('rewards'))
def name(request):
  return request.param


@pytest.fixture
def method(name):
  return made(name)


@functools.cache
def made(name):
  return plugins.make('rewards', name)


@functools.cache
def step(name):
  """`apply`, compiled once for all tests."""
  return jax.jit(made(name).apply)


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
  extras.update({key: value.reshape(P, G)
                 for key, value in measured(method).items()})
  return types.Outcomes(
      correct=jnp.asarray(correct, jnp.float32),
      lengths=jnp.asarray(np.where(truncated, T, lengths), jnp.int32),
      truncated=jnp.asarray(truncated),
      prompt_index=jnp.array([7, 0, 4], jnp.int32),
      target_lengths=jnp.full((P,), 500, jnp.int32),
      extras=extras)


def measured(method):
  """What `measure` finds in a rollout of equally likely tokens, [B]."""
  one = jnp.ones((P * G, 4), jnp.int32)
  rollout = types.Rollout(one, one > 0, one, one > 0, one > 0, -1.0 * one)
  logprob_fn = lambda r: -jnp.ones(r.completion_tokens.shape)
  encode = lambda examples, indices: types.Prompts(
      one[:len(examples)], one[:len(examples)] > 0,
      jnp.asarray(indices), jnp.zeros(len(examples), jnp.int32))
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
def test_shapes_and_finite(name, method, how, equal):
  lengths = np.full((P, G), 300) if equal else None
  state = method.init(N)
  with jax.debug_nans(True):
    rewards, new_state = step(name)(graded(method, how, lengths), state)
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
def test_what_is_kept_of_a_problem_is_kept_of_those_drawn_again(name, method,
                                                                how):
  outcomes, state = graded(method, how), method.init(N)
  _, expected = step(name)(outcomes, state)
  # A memory of problems moves alike; one of batches is of what is trained on.
  per_problem = all(leaf.shape == (N,) for leaf in jax.tree.leaves(state))
  jax.tree.map(
      lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6),
      method.remember(outcomes, state), expected if per_problem else state)


@pytest.mark.parametrize('how', GRADES)
def test_jit_changes_nothing(name, method, how):
  outcomes, state = graded(method, how), method.init(N)
  expected = step(name)(outcomes, state)
  with jax.disable_jit():
    plain = method.apply(outcomes, state)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5,
                                                       atol=1e-6),
               plain, expected)


def test_memory_keeps_its_structure_and_owns_its_buffers(method):
  state = method.init(N)
  shapes = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
  # A donated state must not hold one buffer twice.
  donating = jax.jit(method.apply, donate_argnums=1)
  expected = shapes(state)
  for how in GRADES:
    _, state = donating(graded(method, how), state)
    assert shapes(state) == expected


def test_instruct_takes_memory_from_the_host(method):
  example = types.Example('1 + 1', '2')
  memory = jax.device_get(method.init(N))
  told = method.instruct(example, 3, memory, np.random.default_rng(0))
  assert isinstance(told, types.Example)
  assert isinstance(told.target_length, int)
  assert (told.answer, told.level) == (example.answer, example.level)


def arguments(name, rng):
  """Positional arguments of the method's `reward`, as NumPy holds them."""
  reward = plugins.module('rewards', name).reward
  required = [key for key, parameter in
              inspect.signature(reward).parameters.items()
              if parameter.default is inspect.Parameter.empty and
              parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
  assert required[:2] == ['correct', 'lengths']
  correct = (np.arange(P * G) % 3 > 0).reshape(P, G).astype(np.float32)
  return [correct, rng.integers(1, T, (P, G)).astype(np.int32),
          *(ARGUMENTS[key] for key in required[2:])]


def test_numpy_in_the_same_out(name):
  reward = plugins.module('rewards', name).reward
  values = arguments(name, np.random.default_rng(0))
  found = reward(*values)
  assert isinstance(found, jax.Array) and found.dtype == jnp.float32
  assert found.shape == (P, G)
  np.testing.assert_array_equal(
      reward(*(jnp.asarray(value) for value in values)), found)


def test_vmap_over_seeds_is_a_loop(name):
  reward = plugins.module('rewards', name).reward
  seeds = [arguments(name, np.random.default_rng(i)) for i in range(3)]
  found = jax.vmap(reward)(*(np.stack(each) for each in
                             zip(*seeds, strict=True)))
  for one, values in zip(found, seeds, strict=True):
    np.testing.assert_allclose(one, reward(*values), rtol=1e-5, atol=1e-6)


def test_gradients_are_finite(name):
  reward = plugins.module('rewards', name).reward
  correct, lengths, *rest = arguments(name, np.random.default_rng(0))
  lengths = lengths.astype(np.float32)
  lengths[1] = 300.0
  slope = jax.jit(jax.grad(
      lambda lengths, correct: jnp.sum(reward(correct, lengths, *rest))))
  for grades in (correct, np.ones_like(correct), np.zeros_like(correct)):
    assert np.isfinite(slope(lengths, grades)).all()


def test_sweeping_a_number_compiles_nothing(name):
  reward = plugins.module('rewards', name).reward
  values = arguments(name, np.random.default_rng(0))
  numbers = {key: parameter.default for key, parameter in
             inspect.signature(reward).parameters.items()
             if type(parameter.default) in (int, float)}
  reward(*values, **{key: 1.0 * value for key, value in numbers.items()})
  before = reward._cache_size()
  reward(*values, **{key: 1.5 * value for key, value in numbers.items()})
  assert reward._cache_size() == before


@pytest.fixture
def unchecked():
  """As for users, who do not run under the type checker."""
  jaxtyping.config.update('jaxtyping_disable', True)
  yield
  jaxtyping.config.update('jaxtyping_disable', False)


def test_wrong_shapes_are_told_at_trace_time(name, unchecked):
  reward = plugins.module('rewards', name).reward
  correct, lengths, *rest = arguments(name, np.random.default_rng(0))
  traced = lambda *values: jax.eval_shape(jax.jit(reward), *values)
  with pytest.raises(ValueError, match=r'correct.*\(3, 8\).*ths \(3, 1\)'):
    traced(correct, lengths[:, :1], *rest)
  with pytest.raises(ValueError, match=r'correct.*\(8,\), lengths \(8,\)'):
    traced(correct[0], lengths[0], *rest)
  for i, value in enumerate(rest):
    if np.ndim(value):
      with pytest.raises(ValueError, match=r'\(1,.*\(3|\(3,.*\(1,'):
        traced(correct, lengths, *rest[:i], value[:1], *rest[i + 1:])


def test_what_is_no_number_is_told(name, unchecked):
  reward = plugins.module('rewards', name).reward
  correct, lengths, *rest = arguments(name, np.random.default_rng(0))
  with pytest.raises(ValueError, match='correct is a list.*numpy.asarray'):
    reward(correct.tolist(), lengths, *rest)
  with pytest.raises(ValueError, match='lengths is a list'):
    reward(correct, lengths.tolist(), *rest)
  with pytest.raises(ValueError, match='lengths is bool.*the order is'):
    reward(lengths, correct > 0, *rest)
  # The differences of some wrap around, others round thousands.
  for kind in (np.uint16, np.uint32, np.int8, np.float16, jnp.bfloat16):
    with pytest.raises(ValueError, match=f'lengths is {kind.__name__}.*int32'):
      reward(correct, lengths.astype(kind), *rest)
  with pytest.raises(ValueError, match='correct is complex64.*real numbers'):
    reward(correct.astype(np.complex64), lengths, *rest)


def test_grades_may_be_of_any_kind(name):
  reward = plugins.module('rewards', name).reward
  correct, lengths, *rest = arguments(name, np.random.default_rng(0))
  np.testing.assert_allclose(reward(correct > 0, lengths, *rest),
                             reward(correct, lengths, *rest), rtol=1e-6,
                             atol=1e-6)
  for dtype in (np.int8, np.float16, jnp.bfloat16):
    found = jax.eval_shape(reward, correct.astype(dtype), lengths, *rest)
    assert found.shape == (P, G) and found.dtype == jnp.float32


def public_functions(name):
  module = plugins.module('rewards', name)
  return [(key, value) for key, value in vars(module).items()
          if inspect.isfunction(inspect.unwrap(value)) and
          value.__module__ == module.__name__ and not key.startswith('_')]


def test_every_public_docstring_tells_all(name):
  for key, function in public_functions(name):
    doc = function.__doc__
    told = [line.strip().split(':')[0] for line in doc.splitlines()
            if line.startswith('    ')]
    for argument in inspect.signature(function).parameters.values():
      stars = '**' if argument.kind is inspect.Parameter.VAR_KEYWORD else ''
      assert stars + argument.name in told, f'{key}: {argument.name}'
    if isinstance(function, type(jax.jit(len))):
      # Formula, shape, unit, paper, errors.
      for part in ('https://', '[P', 'Raises:\n    ValueError'):
        assert part in doc.replace('[B', '[P'), key
      assert any(sign in doc for sign in '=←≥/'), key
      assert 'lengths' not in told or 'tokens' in doc, key


def test_only_listed_methods_let_a_wrong_one_win(name, method):
  """By its length: everything else that is known of a group is equal."""
  rng = np.random.default_rng(0)
  state, found = method.init(N), False
  for _ in range(20):
    outcomes = graded(method, lengths=rng.integers(1, 4 * T, (P, G)))
    outcomes = outcomes.replace(truncated=jnp.zeros((P, G), bool))
    rewards, state = step(name)(outcomes, state)
    total, right = np.asarray(rewards.total), np.asarray(outcomes.correct) > 0
    worst = np.where(right, total, np.inf).min(axis=1)
    best = np.where(right, -np.inf, total).max(axis=1)
    found |= bool((best > worst + 1e-6).any())
  assert found == (name in WRONG_MAY_WIN)


def test_the_methods_of_the_list_exist():
  assert set(WRONG_MAY_WIN) <= set(plugins.names('rewards'))


def test_the_readmes_lines_run():
  block = (pathlib.Path(__file__).parent.parent / 'README.md').read_text()
  block = block.split('## As a library')[1].split('```python\n')[1]
  names = {'correct': np.array([[1, 0, 1]]),
           'lengths': np.array([[300, 400, 500]])}
  exec(block.split('```')[0], names)
  np.testing.assert_allclose(names['rewards'], [[2, -0.1, 1.8]], rtol=1e-6)
  np.testing.assert_allclose(names['advantages'].sum(), 0, atol=1e-6)
