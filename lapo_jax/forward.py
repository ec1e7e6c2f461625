# SPDX-License-Identifier: Apache-2.0
"""The training forward pass: rows of tokens in, their log-probs out.

Scores, updates and warm starts share it. Parameters are held in the model's
param_dtype; `ready` makes of them what the pass reads, once for all the
microbatches of a step, and `restore` brings gradients back.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jaxtyping import Array, Float, Int

from lapo_jax import attention, logprobs, ops, sharding, stacking


def make(model: Any, shardings: tuple[Any, Any] | None,
         **settings: Any) -> 'Forward':
  """A `Forward` of a model.

  Args:
    model: a model family's module.
    shardings: of the parameters and of the batch; None on one device.
    **settings: other fields.
  """
  if shardings is None:
    return Forward(model, **settings)
  params, batch = shardings
  return Forward(model, places=params, slots=sharding.slots(batch.mesh),
                 **settings)


class Forward(NamedTuple):
  """A model's pass over whole rows.

  Attributes:
    model: a model family's module.
    temperature: of sampling: the policy is softmax(logits / temperature); 0
      stands for 1.
    places: shardings of the parameters; None on one device.
    slots: how [B, S] lies on the mesh, see `attention.Whole`.
  """

  model: Any
  temperature: float = 1.0
  places: Any = None
  slots: NamedSharding | None = None

  def ready(self, params: Any) -> Any:
    """The parameters as the pass reads them.

    Of stacked layers the matrices are cast to the model's dtype, which is
    what fsdp then gathers.
    """
    if not stacking.is_stacked(params):
      return params
    # Norms are computed in float32: their scales stay as they are.
    layers = jax.tree.map(
        lambda x: x.astype(self.model.dtype) if x.ndim > 2 else x,
        params['layers'])
    return self._lay({**params, 'layers': layers})

  def __call__(self, ready: Any, tokens: Int[Array, 'B S'],
               segments: Int[Array, 'B S'], start: int
               ) -> tuple[Float[Array, 'B T'], Float[Array, 'B T']]:
    """(log-probs, entropies) of the tokens from slot `start` > 0 on.

    The slot before a token predicts it. What the first token of a segment
    gets means nothing, nor what padding gets.
    """
    variables, num_slots = {'params': ready}, tokens.shape[1]
    whole, segments = map(self._spread, (tokens, segments))
    hidden, _ = self.model.apply(
        variables, whole, ops.positions_from_segments(segments),
        cache=attention.Whole(segments, self.slots))
    table = self.model.apply(variables, method='output_table')
    return logprobs.token_logprobs(
        hidden[:, start - 1:num_slots - 1], table, tokens[:, start:],
        temperature=self.temperature or 1.0, place=self.slots)

  def zeros(self, ready: Any) -> Any:
    """A sum of no gradients, in float32."""
    return self._lay(jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32),
                                  ready))

  def add(self, total: Any, grads: Any) -> Any:
    """The sum with the gradients of one more microbatch."""
    return self._lay(jax.tree.map(lambda x, y: x + y.astype(x.dtype), total,
                                  grads))

  def restore(self, total: Any, params: Any) -> Any:
    """A sum of gradients in the parameters' dtypes."""
    return jax.tree.map(lambda x, like: x.astype(like.dtype), total, params)

  def _spread(self, rows: Int[Array, 'B S']) -> Int[Array, 'B S2']:
    """Rows over the mesh, padded to slots that its devices divide."""
    if self.slots is None:
      return rows
    parts = self.slots.mesh.shape['sequence']
    if parts == 1:
      return rows
    # Whole blocks of the attention kernels, where they are few beside the row.
    unit = parts * 128 if rows.shape[1] >= parts * 1024 else parts
    filler = ((0, 0), (0, -rows.shape[1] % unit))
    return jax.lax.with_sharding_constraint(jnp.pad(rows, filler), self.slots)

  def _lay(self, tree: Any) -> Any:
    """The tree where the parameters lie."""
    if self.places is None:
      return tree
    return jax.lax.with_sharding_constraint(tree, self.places)
