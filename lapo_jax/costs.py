# SPDX-License-Identifier: Apache-2.0
"""What chips can do, and what a training step asks of them at the least.

The operations of a step are counted from its shapes, not read from compiled
programs: XLA counts the body of a loop once, and decoding and the update are
loops. Counted are products of matrices and attention, the backward pass as
twice the forward one; recomputation, norms, sampling, grading and the traffic
between chips are not, so the times are floors.

The table of chips holds what a device of JAX is: a whole chip.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp

from lapo_jax import ops, paging, sharding


class Chip(NamedTuple):
  """What its maker says.

  Attributes:
    flops: a second, bfloat16.
    bandwidth: bytes a second, of its memory.
    memory: bytes that the compiler gives out.
    topologies: shapes of slices that are rented.
  """

  flops: float
  bandwidth: float
  memory: int
  topologies: tuple[str, ...]


_FLAT = ('1x1', '2x2', '2x4', '4x4', '4x8', '8x8', '8x16', '16x16')
_CUBIC = ('2x2x1', '2x2x2', '2x4x4', '4x4x4', '4x4x8', '4x8x8', '8x8x8',
          '8x8x16')
# docs.cloud.google.com/tpu/docs/{v5e,v6e,v5p}, November 2026; the memory is
# what the compiler of libtpu 0.0.52 says is available.
CHIPS = {
    'v5e': Chip(197e12, 819e9, int(15.75 * 2**30), _FLAT),
    'v6e': Chip(918e12, 1640e9, int(31.24 * 2**30), _FLAT),
    'v5p': Chip(459e12, 2765e9, int(95.73 * 2**30), _CUBIC),
}


class Work(NamedTuple):
  """One verb of a step, on one chip.

  Attributes:
    flops: that it must do.
    bytes: of memory that it must read or write.
  """

  flops: float
  bytes: float

  def seconds(self, chip: Chip) -> float:
    """max(flops / peak, bytes / bandwidth)."""
    return max(self.flops / chip.flops, self.bytes / chip.bandwidth)


class Shape(NamedTuple):
  """What the work of a step depends on, besides the model.

  Attributes:
    prompts: P.
    group_size: G.
    prompt_length: tokens of each prompt.
    mean_length: tokens of each completion.
    cap: T, of which completions are cut to a bucket.
    num_slots: completions that are decoded at once, on all chips.
    score_passes: how often the batch is scored.
    epochs: how often it is trained on.
    microbatch_size: rows whose gradient is taken at once.
    chips: of all axes.
    shards: into how many parts rows are cut while they are sampled.
    tensor: chips that share a layer.
    pooled: whether each row reads its prompt's keys and values by itself.
    weight_bytes: of one parameter in the sampler.
    cache_dtype: of keys and values.
  """

  prompts: int
  group_size: int
  prompt_length: int
  mean_length: int
  cap: int
  num_slots: int
  score_passes: int
  epochs: int
  microbatch_size: int
  chips: int
  shards: int
  tensor: int
  pooled: bool
  weight_bytes: int
  cache_dtype: Any


def find(topology: str) -> Chip:
  """The chip of a topology such as v5e:4x4.

  Raises:
    ValueError: a name that is not known.
  """
  kind, _, shape = topology.partition(':')
  if kind in CHIPS and shape in CHIPS[kind].topologies:
    return CHIPS[kind]
  known = '; '.join(f'{name}:{", ".join(chip.topologies)}'
                    for name, chip in CHIPS.items())
  raise ValueError(f'topology {topology!r}: expected one of {known}.')


def forward_flops(model: Any, tokens: int | float, pairs: int | float,
                  logits: int | float) -> int | float:
  """Of a forward pass: 2·N·tokens + 4·layers·H·E·pairs + 2·D·V·logits.

  Args:
    model: a `Decoder`; N are the weights of its layers' matrices.
    tokens: how many.
    pairs: of a query and a key that it sees.
    logits: tokens whose logits are asked for.
  """
  heads = model.num_heads * model.head_dim
  return (2 * _layer_weights(model) * tokens +
          4 * model.num_layers * heads * pairs +
          2 * model.width * model.vocab_size * logits)


def step_work(model: Any, shape: Shape) -> dict[str, Work]:
  """The work of each verb of a step, for one chip.

  All completions have `mean_length` tokens. Score and update work on padded
  prompts and on completions cut to their bucket, as they are compiled.
  """
  rows = shape.prompts * shape.group_size
  prompt, mean = shape.prompt_length, shape.mean_length
  share = lambda flops: flops / shape.chips
  weights = _layer_weights(model) + model.width * model.vocab_size
  read = weights * shape.weight_bytes / shape.tensor

  prefill = forward_flops(model, shape.prompts * prompt,
                          shape.prompts * prompt**2 / 2, 0)
  own_rows = rows // shape.shards
  own_slots = min(-(-shape.num_slots // shape.shards), own_rows)
  steps = -(-own_rows // own_slots) * mean
  # On average a completion is half done.
  seen = mean / 2 + (prompt if shape.pooled else prompt / shape.group_size)
  parts = sharding.head_parts(model.num_kv_heads, shape.tensor)
  cache = own_slots * seen / parts * paging.token_bytes(
      *model.cache_shape(), shape.cache_dtype)
  decode = forward_flops(model, rows * mean,
                         rows * mean * (prompt + mean / 2), rows * mean)

  slots = ops.bucket(mean, shape.cap)
  row = prompt + slots
  forward = forward_flops(model, rows * row, rows * row**2 / 2, rows * slots)
  batches = rows // shape.microbatch_size
  trained = jnp.dtype(model.dtype).itemsize * weights / shape.tensor
  return {
      'prefill': Work(share(prefill), read),
      'decode': Work(share(decode), steps * (read + cache)),
      'score': Work(share(forward) * shape.score_passes,
                    shape.score_passes * batches * trained),
      # Forward and backward read the weights.
      'update': Work(3 * share(forward) * shape.epochs,
                     shape.epochs * 2 * batches * trained),
  }


def _layer_weights(model: Any) -> int:
  """Numbers in the matrices of all layers."""
  heads = model.num_heads * model.head_dim
  kv_heads = model.num_kv_heads * model.head_dim
  return model.num_layers * model.width * (
      2 * heads + 2 * kv_heads + 3 * model.mlp_width)
