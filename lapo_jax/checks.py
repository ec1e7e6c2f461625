# SPDX-License-Identifier: Apache-2.0
"""Whether a config's settings fit one another, asked before any compute.

Each check raises a ValueError that says what it got, what it expected and
what to change.
"""

import collections
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from lapo_jax import advantages, losses, types


def choices(config: ml_collections.ConfigDict) -> None:
  """Checks words and numbers that otherwise only a program would read."""
  for key, legal in (('advantage.baseline', advantages.BASELINES),
                     ('advantage.scale', advantages.SCALES),
                     ('advantage.whiten', advantages.WHITENINGS),
                     ('loss.aggregate', losses.AGGREGATES)):
    if config[key] not in legal:
      raise ValueError(f'{key} {config[key]!r}: expected one of {legal}.')
  for key, legal in (('dtype', ('', 'float32', 'bfloat16')),
                     ('cache_dtype', ('', 'float32', 'bfloat16', 'int8'))):
    if config.rollout[key] not in legal:
      raise ValueError(f'rollout.{key} {config.rollout[key]!r}: expected one '
                       f'of {legal}.')
  if config.rollout.num_slots < 0:
    raise ValueError(f'rollout.num_slots {config.rollout.num_slots}: expected '
                     'a number of completions, or 0 for what fits.')
  if not 0 < config.rollout.cache_share < 1:
    raise ValueError(f'rollout.cache_share {config.rollout.cache_share}: '
                     'expected a share of the memory, such as 0.3.')
  cap = config.loss.importance_cap
  if not cap >= 0:  # NaN too
    raise ValueError(f'loss.importance_cap {cap}: expected a positive bound '
                     'of the importance weights, such as 2, or 0 for none.')


def batches(config: ml_collections.ConfigDict, parts: int) -> None:
  """Checks that rows divide evenly into devices and microbatches."""
  prompts = config.rollout.num_prompts
  minibatches = config.updates.num_minibatches
  size = config.updates.microbatch_size
  if config.rollout.group_size < 2:
    raise ValueError(f'rollout.group_size {config.rollout.group_size}: '
                     'expected at least 2, a group is compared with itself.')
  for name, number in (('rollout.num_prompts', prompts),
                       ('eval.batch_size', config.eval.batch_size)):
    if number % parts:
      near = max(parts, number // parts * parts)
      raise ValueError(f'{name} {number} does not divide by the {parts} '
                       f'devices that share a batch: expected a multiple of '
                       f'{parts}, such as {near} or {near + parts}.')
  rows = prompts * config.rollout.group_size
  legal = [n for n in range(parts, rows // minibatches + 1, parts)
           if rows % (minibatches * n) == 0]
  if size not in legal:
    raise ValueError(
        f'updates.microbatch_size {size} does not fit {rows} completions in '
        f'{minibatches} minibatches on {parts} devices: expected one of '
        f'{legal}.')


def reward(config: ml_collections.ConfigDict, reward: types.Reward,
                  num_examples: int) -> Any:
  """Shapes of the method's memory, once it has taken outcomes of our shape."""
  prompts = config.rollout.num_prompts
  groups = (prompts, config.rollout.group_size)

  def apply():
    grades = jnp.zeros(groups)
    none = jnp.zeros(prompts, jnp.int32)
    return reward.apply(types.Outcomes(
        correct=grades, lengths=jnp.ones(groups, jnp.int32),
        truncated=grades > 0, prompt_index=none, target_lengths=none,
        extras=collections.defaultdict(lambda: grades)),
        reward.init(num_examples))

  return jax.eval_shape(apply)[1]


def prompts(config: ml_collections.ConfigDict, task: types.Task,
                   eval_task: types.Task, encode: Callable,
                   reward: types.Reward, memory: Any) -> None:
  """Encodes every prompt once, as the method will write it at first."""
  if config.rollout.num_prompts > len(task):
    raise ValueError(f'rollout.num_prompts {config.rollout.num_prompts}: '
                     f'expected at most the task\'s {len(task)} problems.')
  rng = np.random.default_rng(0)
  instructed = lambda i: reward.instruct(task[i], i, memory, rng)
  for length, example, size in (
      (len(task), instructed, config.rollout.num_prompts),
      (len(eval_task), eval_task.__getitem__, config.eval.batch_size)):
    # Filled up to whole batches: the rows must divide over the devices.
    for start in range(0, length, size):
      turn = [i % length for i in range(start, start + size)]
      encode([example(i) for i in turn], turn)
