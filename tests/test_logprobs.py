# SPDX-License-Identifier: Apache-2.0
"""Log-probs made in parts are those of the logits, and so is their gradient."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np
import optax
import pytest

from lapo_jax import grpo, logprobs, types
from lapo_jax.models import qwen2

B, T, D, V = 4, 5, 16, 38
TEMPERATURE = 0.7


@pytest.fixture(scope='module')
def inputs():
  """Hidden states, table, tokens, and what the log-probs are weighed with."""
  rng = np.random.default_rng(0)
  normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  return (normal(B, T, D), normal(D, V),
          jnp.asarray(rng.integers(0, V, (B, T)), jnp.int32), normal(B, T))


def numbers(function, inputs):
  """(log-probs, entropies, gradients of hidden and table) of a function."""
  hidden, table, tokens, weights = inputs

  def loss(hidden, table):
    chosen, entropies = function(hidden, table, tokens)
    # The entropies have no gradient.
    return jnp.sum(weights * chosen) + jnp.sum(entropies), (chosen, entropies)

  gradients, found = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(hidden,
                                                                   table)
  return [np.asarray(x, np.float64) for x in (*found, *gradients)]


def whole(hidden, table, tokens):
  """The formulas, with all logits and JAX's own gradient."""
  logits = jnp.matmul(hidden, table.astype(hidden.dtype),
                      preferred_element_type=jnp.float32) / TEMPERATURE
  found = jax.nn.log_softmax(logits)
  chosen = jnp.take_along_axis(found, tokens[..., None], -1)[..., 0]
  return chosen, jax.lax.stop_gradient(-jnp.sum(jnp.exp(found) * found, -1))


def in_parts(most_logits, place=None):
  return functools.partial(logprobs.token_logprobs, temperature=TEMPERATURE,
                           most_logits=most_logits, place=place)


def assert_close(found, wanted, tolerance):
  for ours, theirs in zip(found, wanted, strict=True):
    scale = np.abs(theirs).max()
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * scale)


# All twenty tokens at once; three at a time, which leaves a part with two; one.
@pytest.mark.parametrize('most', [B * T * V, 3 * V + 1, 1])
def test_parts_are_the_whole(inputs, most):
  assert_close(numbers(in_parts(most), inputs), numbers(whole, inputs), 1e-6)


def test_bfloat16_states_are_summed_in_float32(inputs):
  hidden, table, tokens, weights = inputs
  # Numbers of few bits: products and sums are exact, but for the softmax.
  hidden = jnp.round(hidden * 4) / 4
  table = jnp.round(table * 4) / 4
  wanted = numbers(whole, (hidden, table, tokens, weights))
  for most in (B * T * V, 3 * V):
    found = numbers(in_parts(most), (hidden.astype(jnp.bfloat16), table,
                                     tokens, weights))
    assert_close(found[:2], wanted[:2], 1e-6)
    # d logits are rounded to 8 bits, their sums are not.
    assert_close(found[2:], wanted[2:], 4e-3)


def mesh_of(*sizes):
  return Mesh(np.array(jax.devices()).reshape(sizes), ('rows', 'slots', 'left'))


# The vocabulary over two devices, or four, which do not divide it.
@pytest.mark.parametrize('sizes,most', [
    ((2, 2, 2), 2 * V), ((2, 1, 4), B * T * V)], ids=str)
def test_eight_devices_are_one(inputs, sizes, most):
  place = NamedSharding(mesh_of(*sizes), PartitionSpec('rows', 'slots'))
  assert_close(numbers(in_parts(most, place), inputs), numbers(whole, inputs),
               1e-6)


def test_no_device_gathers_logits_and_the_table_is_summed_once(inputs):
  mesh = mesh_of(2, 2, 2)
  place = NamedSharding(mesh, PartitionSpec('rows', 'slots'))
  hidden, table, tokens, weights = inputs
  hidden, tokens, weights = (jax.device_put(x, place)
                             for x in (hidden[:, :4], tokens[:, :4],
                                       weights[:, :4]))
  table = jax.device_put(table, NamedSharding(mesh, PartitionSpec(None,
                                                                  'left')))
  loss = lambda hidden, table: jnp.sum(weights * in_parts(V, place)(
      hidden, table, tokens)[0])
  text = jax.jit(jax.grad(loss, (0, 1)), out_shardings=(
      place, table.sharding)).lower(hidden, table).compile().as_text()
  assert 'while(' in text and 'all-gather' not in text
  # A device has half of the vocabulary. What is summed inside of the loop over
  # its tokens are numbers a token.
  bodies, entry = text.split('ENTRY')
  sums = lambda part: [line for line in part.splitlines()
                       if 'all-reduce(' in line or 'all-reduce-start(' in line]
  assert sum('f32[16,19]' in line for line in sums(entry)) == 1
  assert sums(bodies) and not [line for line in sums(bodies) if '19]' in line]


def test_rows_that_do_not_divide_are_refused(inputs):
  place = NamedSharding(mesh_of(8, 1, 1), PartitionSpec('rows', 'slots'))
  with pytest.raises(ValueError, match='4 rows do not divide by the 8 devices'):
    in_parts(V, place)(*inputs[:3])


def test_the_memory_of_a_step_does_not_grow_by_the_logits():
  model = qwen2.Model(vocab_size=1 << 18, width=8, num_layers=1, num_heads=1,
                      num_kv_heads=1, mlp_width=8)
  sgd, params = optax.sgd(0.1), qwen2.init_shapes(model)
  shape = jax.ShapeDtypeStruct
  scalar = shape((), jnp.int32)
  state = types.TrainState(
      step=scalar, stage=scalar, nonfinite=scalar, params=params,
      opt_state=jax.eval_shape(sgd.init, params), reward_state=())
  update = grpo.make_update_fn(model, sgd, temperature=1.0, microbatch_size=1)

  def temporary(length):
    real, number = (shape((1, length), dtype) for dtype in (bool, jnp.float32))
    batch = types.Batch(
        types.Rollout(
            prompt_tokens=shape((1, 1), jnp.int32), completion_mask=real,
            prompt_mask=shape((1, 1), bool), action_mask=real,
            completion_tokens=shape((1, length), jnp.int32),
            sampler_logprobs=number),
        advantages=shape((1,), jnp.float32), old_logprobs=number,
        ref_logprobs=None, weights=number)
    compiled = update.lower(state, batch).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  # 512 tokens more are 537 MB of logits more.
  few, many = temporary(512), temporary(1024)
  assert few > 2**28 and many - few < 0.1 * 512 * model.vocab_size * 4
