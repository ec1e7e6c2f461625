# SPDX-License-Identifier: Apache-2.0
"""Pools on a machine without their kernel: XLA gathers each row's pages."""

import jax
import jax.numpy as jnp


def attend(queries, pages, lengths, table):
  """What `pools.attend` is."""
  rows, heads, width = queries.shape
  own = pages[jnp.clip(table, 0, pages.shape[0] - 1), ..., :width].reshape(
      rows, -1, pages.shape[2] // 2, 2, width)
  grouped = queries.reshape(rows, own.shape[2], -1, width)
  scores = jnp.einsum('nkre,ncke->nkrc', grouped, own[:, :, :, 0],
                      preferred_element_type=jnp.float32) * width**-0.5
  real = jnp.arange(own.shape[1])[None] < lengths[:, None]
  weights = jax.nn.softmax(
      jnp.where(real[:, None, None], scores, -1e30)).astype(pages.dtype)
  mixed = jnp.einsum('nkrc,ncke->nkre', weights, own[:, :, :, 1]).reshape(
      queries.shape)
  return jnp.where(lengths[:, None, None] > 0, mixed, 0)
