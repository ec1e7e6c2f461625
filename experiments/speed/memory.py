# SPDX-License-Identifier: Apache-2.0
"""How much memory scoring and the update need, by the completion's length.

  python -m experiments.speed.memory

Compiles, for one row of T slots of a narrow model with a large vocabulary, the
package's programs and the same arithmetic with the logits of all slots, and
prints the temporary memory that XLA plans for. Nothing is computed; minutes.
"""

import argparse
from collections.abc import Callable
import datetime

import jax
import jax.numpy as jnp
import optax

from lapo_jax import grpo, ops, types
from lapo_jax.models import qwen2

MODEL = qwen2.Model(vocab_size=151936, width=128, num_layers=2, num_heads=4,
                    num_kv_heads=2, mlp_width=384)
_PROMPT = 32


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--lengths', default='1024,2048,4096,8192')
  flags = parser.parse_args()
  jax.config.update('jax_platforms', 'cpu')
  print(f'{datetime.date.today()}, jax {jax.__version__}, MB\n')
  print('| T | logits | score | score, all logits | update | update, all '
        'logits |\n|---|---|---|---|---|---|')
  for length in map(int, flags.lengths.split(',')):
    logits = 4 * length * MODEL.vocab_size
    cells = [logits, *(temporary(length, make) for make in (
        make_score, make_plain_score, make_update, make_plain_update))]
    print(f'| {length:,} | ' + ' | '.join(
        f'{cell / 1e6:,.0f}' for cell in cells) + ' |', flush=True)


def temporary(length: int, make: Callable) -> int:
  """Bytes that a program needs beside its arguments and results."""
  program, arguments = make(batch(length))
  return program.lower(*arguments).compile().memory_analysis(
      ).temp_size_in_bytes


def make_score(batch: types.Batch):
  score = grpo.make_score_fn(MODEL, temperature=1.0, microbatch_size=1)
  return score, (qwen2.init_shapes(MODEL), batch.rollout)


def make_update(batch: types.Batch):
  optimizer = optax.adam(1e-6)
  update = grpo.make_update_fn(MODEL, optimizer, temperature=1.0,
                               microbatch_size=1)
  params, scalar = qwen2.init_shapes(MODEL), _shape((), jnp.int32)
  return update, (types.TrainState(
      step=scalar, stage=scalar, nonfinite=scalar, params=params,
      opt_state=jax.eval_shape(optimizer.init, params), reward_state=()), batch)


def make_plain_score(batch: types.Batch):
  score = lambda params, rollout: _plain(params, rollout)
  return jax.jit(score), (qwen2.init_shapes(MODEL), batch.rollout)


def make_plain_update(batch: types.Batch):
  optimizer = optax.adam(1e-6)

  def update(params, opt_state, batch):
    loss = lambda params: -jnp.sum(batch.weights * batch.advantages[:, None] *
                                   _plain(params, batch.rollout))
    updates, opt_state = optimizer.update(jax.grad(loss)(params), opt_state,
                                          params)
    return optax.apply_updates(params, updates), opt_state

  params = qwen2.init_shapes(MODEL)
  return jax.jit(update, donate_argnums=(0, 1)), (
      params, jax.eval_shape(optimizer.init, params), batch)


def _plain(params, rollout):
  """Log-probs by way of the logits of all completion slots."""
  tokens = jnp.concatenate([rollout.prompt_tokens, rollout.completion_tokens],
                           axis=1)
  mask = jnp.concatenate([rollout.prompt_mask, rollout.completion_mask], axis=1)
  hidden, _ = MODEL.apply({'params': params}, tokens,
                           ops.positions_from_mask(mask), mask)
  logits = MODEL.apply({'params': params}, hidden[:, _PROMPT - 1:-1],
                        method='unembed')
  chosen = jnp.take_along_axis(jax.nn.log_softmax(logits),
                               rollout.completion_tokens[..., None], axis=-1)
  return jnp.where(rollout.completion_mask, chosen[..., 0], 0.0)


def batch(length: int) -> types.Batch:
  """Shapes of a batch of one completion."""
  real, number = _shape((1, length), bool), _shape((1, length), jnp.float32)
  return types.Batch(
      rollout=types.Rollout(
          prompt_tokens=_shape((1, _PROMPT), jnp.int32),
          prompt_mask=_shape((1, _PROMPT), bool),
          completion_tokens=_shape((1, length), jnp.int32),
          completion_mask=real, action_mask=real, sampler_logprobs=number),
      advantages=_shape((1,), jnp.float32), old_logprobs=None,
      ref_logprobs=None, weights=number)


def _shape(shape, dtype):
  return jax.ShapeDtypeStruct(shape, dtype)


if __name__ == '__main__':
  main()
