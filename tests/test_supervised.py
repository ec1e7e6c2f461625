# SPDX-License-Identifier: Apache-2.0
"""The warm start minimises the likelihood of the tokens that weigh."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lapo_jax import sharding, supervised
from lapo_jax.models import qwen2

B, S = 8, 7


@pytest.fixture(scope='module')
def model(tiny_model):
  return tiny_model.clone(num_layers=1)


@pytest.fixture(scope='module')
def params(model, make_params):
  return make_params(model)


@pytest.fixture(scope='module')
def batch():
  """Rows of several lengths whose first two tokens are given."""
  rng = np.random.default_rng(0)
  lengths = np.array([7, 3, 5, 4, 7, 6, 3, 5])
  mask = np.arange(S) < lengths[:, None]
  learned = mask & (np.arange(S) >= 2)
  return {'tokens': rng.integers(0, 64, (B, S)).astype(np.int32), 'mask': mask,
          'weights': (learned / learned.sum()).astype(np.float32)}


def take_steps(model, params, batch, count, mesh=None):
  """The losses of `count` steps, and the parameters after them."""
  optimizer = optax.adam(1e-2)
  shardings = None
  opt_state = optimizer.init(jax.tree.map(jnp.asarray, params))
  if mesh is None:
    params, batch = jax.tree.map(jnp.asarray, (params, batch))
  else:
    places = sharding.partition(qwen2.PARTITION_RULES, qwen2.init_shapes(model),
                                mesh)
    shardings = (places, sharding.partition_like(
        places, jax.eval_shape(optimizer.init, params), mesh),
        sharding.batch(mesh))
    params = sharding.to_global(params, places)
    opt_state = jax.tree.map(jax.device_put, opt_state, shardings[1])
    batch = sharding.to_global(batch, shardings[2])
  step = supervised.make_supervised_fn(model, optimizer, shardings)
  losses = []
  for _ in range(count):
    params, opt_state, loss = step(params, opt_state, batch)
    losses.append(float(loss))
  return losses, jax.tree.map(np.asarray, params)


@pytest.fixture(scope='module')
def alone(model, params, batch):
  return take_steps(model, params, batch, 5)


def test_the_loss_is_the_mean_over_learned_tokens(model, params, batch, alone):
  total, count = 0.0, 0
  apply = jax.jit(lambda params, tokens: model.apply(
      {'params': params}, model.apply(
          {'params': params}, tokens, jnp.arange(S)[None],
          jnp.ones((1, S), bool))[0], method='unembed'))
  for tokens, weights in zip(batch['tokens'], batch['weights'], strict=True):
    # A later token changes no earlier logits: the padding may stay.
    logits = np.asarray(apply(params, tokens[None])[0], np.float64)
    for slot in np.flatnonzero(weights):
      before = logits[slot - 1]
      total -= before[tokens[slot]] - np.log(np.exp(before).sum())
      count += 1
  assert count == 24
  assert alone[0][0] == pytest.approx(total / count, rel=1e-5)


def test_the_loss_falls(alone):
  losses = alone[0]
  assert all(later < earlier for earlier, later in zip(
      losses, losses[1:], strict=False))
  assert losses[-1] < 0.8 * losses[0]


def test_eight_devices_are_one(model, params, batch, alone):
  losses, after = take_steps(model, params, batch, 5,
                             sharding.make_mesh(data=2, fsdp=2, tensor=2))
  np.testing.assert_allclose(losses, alone[0], rtol=1e-5)
  # Adam divides by the gradient's size: its rounding is not that of the loss.
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-3),
               after, alone[1])


def test_what_weighs_nothing_is_not_learned(model, params, batch, alone):
  # Other given tokens' targets and other padding: the first loss depends on
  # tokens that are attended or weigh, never on padding.
  other = {**batch, 'tokens': np.where(batch['mask'], batch['tokens'], 5)}
  assert take_steps(model, params, other, 1)[0] == pytest.approx(alone[0][:1])
