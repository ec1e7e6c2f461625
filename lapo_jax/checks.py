# SPDX-License-Identifier: Apache-2.0
"""Whether a config's settings fit one another, asked before any compute.

Each check raises a ValueError that says what it got, what it expected and
what to change.
"""

import collections
from collections.abc import Callable
import math
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from lapo_jax import advantages, losses, ratios, types
from lapo_jax.models import _decoder


def updates_per_batch(config: ml_collections.ConfigDict) -> int:
  """How many updates learn from one batch.

  With one the policy that samples is the policy that learns: no ratio leaves 1.
  """
  return config.updates.num_epochs * config.updates.num_minibatches


def choices(config: ml_collections.ConfigDict) -> None:
  """Checks words and numbers that otherwise only a program would read."""
  for key, legal in (('advantage.baseline', advantages.BASELINES),
                     ('advantage.scale', advantages.SCALES),
                     ('advantage.whiten', advantages.WHITENINGS),
                     ('updates.remat', tuple(_decoder.REMAT)),
                     ('loss.aggregate', losses.AGGREGATES),
                     ('loss.kind', losses.KINDS),
                     ('loss.kl', losses.DIVERGENCES),
                     ('loss.importance_level', ratios.LEVELS),
                     ('loss.importance_outside', ratios.OUTSIDE)):
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
  if config.eval.max_completion_length < 0:
    raise ValueError(
        f'eval.max_completion_length {config.eval.max_completion_length}: '
        "expected tokens, or 0 for the rollout's.")
  cycle = config.rollout.cap_cycle
  most = config.rollout.max_completion_length
  if cycle.least and not (0 < cycle.least <= most and cycle.steps > 0):
    raise ValueError(
        f'rollout.cap_cycle is {cycle.least} tokens and {cycle.steps} steps: '
        f'expected at most max_completion_length, {most}, and some steps.')
  for name, value in (('rollout.temperature', config.rollout.temperature),
                      ('eval.temperature', config.eval.temperature)):
    if not 0 <= value < math.inf:
      raise ValueError(f'{name} {value}: expected a positive number, or 0 for '
                       'greedy.')
  if config.eval.num_examples < 1:
    raise ValueError(f'eval.num_examples {config.eval.num_examples}: expected '
                     'at least 1 held-out problem.')
  if config.rollout.refill_rounds < 0:
    raise ValueError(f'rollout.refill_rounds {config.rollout.refill_rounds}: '
                     'expected a number of rounds, 0 for none.')
  cap = config.loss.importance_cap
  if not cap >= 0:  # NaN too
    raise ValueError(f'loss.importance_cap {cap}: expected a positive bound '
                     'of the importance weights, such as 2, or 0 for none.')
  floor = config.loss.importance_floor
  if not (floor == 0 or 0 < floor < cap):
    raise ValueError(f'loss.importance_floor {floor}: expected less than '
                     f'loss.importance_cap {cap}, or 0 for no bound below.')
  bound = config.loss.dual_clip
  if not (bound == 0 or bound > 1):
    raise ValueError(f'loss.dual_clip {bound}: expected a ratio above 1, such '
                     'as 3, or 0 for none.')
  share = config.loss.kl_cov_share
  if not 0 <= share <= 1:
    raise ValueError(f'loss.kl_cov_share {share}: expected a share of the '
                     'tokens, such as 0.0002, or 0 for none.')
  if share and updates_per_batch(config) == 1:
    raise ValueError(
        f'loss.kl_cov_share {share}: with one update a batch the policy has '
        'not moved and nothing is paid; expected more of '
        'updates.num_minibatches or num_epochs, or 0 for none.')


def batches(config: ml_collections.ConfigDict, parts: int,
            sampling_parts: int) -> None:
  """Checks that rows divide evenly into devices and microbatches.

  Args:
    config: a stage's.
    parts: into which the mesh cuts a microbatch.
    sampling_parts: into which it cuts prompts.
  """
  prompts = config.rollout.num_prompts
  minibatches = config.updates.num_minibatches
  size = config.updates.microbatch_size
  if config.rollout.group_size < 2:
    raise ValueError(f'rollout.group_size {config.rollout.group_size}: '
                     'expected at least 2, a group is compared with itself.')
  for name, number in (('rollout.num_prompts', prompts),
                       ('eval.batch_size', config.eval.batch_size)):
    if number % sampling_parts:
      near = max(sampling_parts, number // sampling_parts * sampling_parts)
      raise ValueError(
          f'{name} {number} does not divide by the {sampling_parts} devices '
          f'that share a batch: expected a multiple of {sampling_parts}, such '
          f'as {near} or {near + sampling_parts}.')
  rows = prompts * config.rollout.group_size
  legal = microbatch_sizes(config, parts)
  if size not in legal:
    raise ValueError(
        f'updates.microbatch_size {size} does not fit {rows} completions in '
        f'{minibatches} minibatches on {parts} devices: expected one of '
        f'{legal}.')


def microbatch_sizes(config: ml_collections.ConfigDict,
                     parts: int) -> list[int]:
  """What `updates.microbatch_size` may be on this many devices."""
  rows = config.rollout.num_prompts * config.rollout.group_size
  minibatches = config.updates.num_minibatches
  return [n for n in range(parts, rows // minibatches + 1, parts)
          if rows % (minibatches * n) == 0]


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
