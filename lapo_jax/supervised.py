# SPDX-License-Identifier: Apache-2.0
"""The sharded step of a weighted token likelihood, for warm starts.

  L = −Σ_bt w_bt · log π(token_bt | earlier tokens)
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lapo_jax import forward as forward_lib


def make_supervised_fn(
    model: Any, optimizer: optax.GradientTransformation,
    shardings: tuple[Any, Any, Any] | None = None) -> Callable:
  """A jitted `(params, opt_state, batch) -> (params, opt_state, loss)`.

  Args:
    model: a model family's module.
    optimizer: any optax transformation.
    shardings: of params, opt_state and batch; None on one device.

  Returns:
    The step; it donates params and opt_state. `batch` is a dict of `tokens`
    int32 [B, S], `mask` bool [B, S] (real tokens) and `weights` float32
    [B, S], 0 on tokens that are given rather than learned; of sum 1, they make
    the loss nats a token. The loss is float32 [].
  """

  forward = forward_lib.make(model, shardings and
                             (shardings[0], shardings[2]))

  def loss_fn(params, batch):
    segments = batch['mask'].astype(jnp.int32)
    logprobs, _ = forward(params, batch['tokens'], segments, 1)
    return -jnp.sum(batch['weights'][:, 1:] * logprobs)

  def step(params, opt_state, batch):
    loss, grads = jax.value_and_grad(loss_fn)(params, batch)
    updates, opt_state = optimizer.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, loss

  if shardings is None:
    return jax.jit(step, donate_argnums=(0, 1))
  params, opt_state, batch = shardings
  return jax.jit(step, in_shardings=shardings,
                 out_shardings=(params, opt_state, None),
                 donate_argnums=(0, 1))
