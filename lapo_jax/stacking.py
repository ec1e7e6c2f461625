# SPDX-License-Identifier: Apache-2.0
"""Parameters with one tree for all layers, `layers`, its leaves [layers, …].

A loop over the layers reads them so. Where the train state holds them so too,
the programs that score and update, the optimizer's part among them, are as
large for two layers as for a hundred. Which leaves belong together is known
to the model, see its `stack`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec


def is_stacked(params: Any) -> bool:
  """Whether a tree of parameters, or of anything per parameter, is stacked."""
  return 'layers' in params


def shapes(model: Any, tree: Any) -> Any:
  """The stacked parameters' shapes, of the shapes of those by layer."""
  return model.stack(tree, lambda leaves: jax.ShapeDtypeStruct(
      (len(leaves), *leaves[0].shape), leaves[0].dtype))


def places(model: Any, tree: Any) -> Any:
  """Likewise their shardings: each layer lies as it did, whole layers."""
  return model.stack(tree, lambda leaves: _whole_layers(leaves[0]))


def stack(model: Any, params: Any) -> Any:
  """Parameters on devices by layer -> stacked; the former are given up.

  One leaf after the other, so that no second copy of the model is held.
  """

  def join(leaves):
    place = leaves[0].sharding
    if isinstance(place, NamedSharding):
      place = _whole_layers(place)
    joined = jax.jit(lambda *leaves: jnp.stack(leaves),
                     out_shardings=place)(*leaves)
    for leaf in leaves:
      leaf.delete()
    return joined

  return model.stack(params, join)


def _whole_layers(place: NamedSharding) -> NamedSharding:
  """Of one layer -> of all of them, stacked in front."""
  return NamedSharding(place.mesh, PartitionSpec(None, *place.spec))
