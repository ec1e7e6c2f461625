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
from lapo_jax import tokenizer as tokenizer_lib
from lapo_jax.models import _decoder

CACHE_DTYPES = ('', 'float32', 'bfloat16', 'int8')  # '' = the model's
_ANY = math.inf
_MEASURES_NOTHING = types.Reward._field_defaults['measure']
# (key, least, most); a NaN is in no such range.
_RANGES = (
    ('seed', 0, 2**32 - 1), ('total_steps', 1, _ANY),
    ('rollout.num_prompts', 1, _ANY), ('rollout.max_prompt_length', 1, _ANY),
    ('rollout.max_completion_length', 1, _ANY), ('rollout.num_slots', 0, _ANY),
    ('rollout.refill_rounds', 0, _ANY),
    ('rollout.forced.least', 0, _ANY), ('rollout.forced.most', 0, _ANY),
    ('rollout.forced.first_share', 0, 1),
    ('eval.num_samples', 1, _ANY), ('eval.batch_size', 1, _ANY),
    ('eval.temperature', 0, 1e6), ('eval.max_completion_length', 0, _ANY),
    ('eval.num_examples', 1, _ANY),
    ('advantage.eps', 0, _ANY),
    ('loss.clip_low', 0, _ANY), ('loss.clip_high', 0, _ANY),
    ('loss.kl_coef', 0, 1e6), ('loss.kl_cov_share', 0, 1),
    ('loss.kl_cov_coef', 0, 1e6), ('loss.importance_cap', 0, _ANY),
    ('optimizer.learning_rate', 0, 1e6), ('optimizer.warmup_share', 0, 1),
    ('optimizer.final_share', 0, 1), ('optimizer.weight_decay', 0, 1e6),
    ('updates.num_epochs', 1, _ANY), ('updates.num_minibatches', 1, _ANY),
    ('updates.microbatch_size', 1, _ANY), ('updates.short_share', 0, 1))
# Above 0, and finite.
_POSITIVE = ('rollout.temperature', 'optimizer.clip_norm', 'grader.deadline')


def updates_per_batch(config: ml_collections.ConfigDict) -> int:
  """How many updates learn from one batch.

  With one the policy that samples is the policy that learns: no ratio leaves 1.
  """
  return config.updates.num_epochs * config.updates.num_minibatches


def forces(config: ml_collections.ConfigDict) -> bool:
  """Whether the sampler may write tokens by itself, see `forcing`."""
  forced = config.rollout.forced
  return bool(forced.first or forced.least or forced.most)


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
                     ('cache_dtype', CACHE_DTYPES)):
    if config.rollout[key] not in legal:
      raise ValueError(f'rollout.{key} {config.rollout[key]!r}: expected one '
                       f'of {legal}.')
  _numbers(config)
  if not 0 < config.rollout.cache_share < 1:
    raise ValueError(f'rollout.cache_share {config.rollout.cache_share}: '
                     'expected a share of the memory, such as 0.3.')
  cycle = config.rollout.cap_cycle
  most = config.rollout.max_completion_length
  if cycle.least and not (0 < cycle.least <= most and cycle.steps > 0):
    raise ValueError(
        f'rollout.cap_cycle is {cycle.least} tokens and {cycle.steps} steps: '
        f'expected at most max_completion_length, {most}, and some steps.')
  cap = config.loss.importance_cap
  floor = config.loss.importance_floor
  if not (floor == 0 or 0 < floor < cap):
    raise ValueError(f'loss.importance_floor {floor}: expected less than '
                     f'loss.importance_cap {cap}, or 0 for no bound below.')
  bound = config.loss.dual_clip
  if not (bound == 0 or bound > 1):
    raise ValueError(f'loss.dual_clip {bound}: expected a ratio above 1, such '
                     'as 3, or 0 for none.')
  share = config.loss.kl_cov_share
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
  if not legal:
    raise ValueError(
        f'updates.num_minibatches {minibatches}: {rows} completions on '
        f'{parts} devices do not divide into so many; expected a divisor of '
        f'{rows // parts}.')
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


def tokens(tokenizer: tokenizer_lib.Tokenizer, vocab_size: int) -> None:
  """Checks that the model has a row for every stop and padding token.

  Raises:
    ValueError: an id that is not in [0, vocab_size).
  """
  outside = [i for i in (*tokenizer.eos_ids, tokenizer.pad_id)
             if not 0 <= i < vocab_size]
  if outside:
    raise ValueError(
        f'the stop and padding tokens {outside} are none of the model\'s '
        f'{vocab_size}: expected ids from 0 to {vocab_size - 1}; mend '
        'eos_token_id of generation_config.json, or the tokenizer\'s files.')


def text(task: types.Task, reward: types.Reward) -> set[str]:
  """Grades and reads an empty completion; the names of what was found.

  Raises:
    ValueError: the task or the method does not keep its contract.
  """
  example = task[0]
  found = {}
  for name, ask in (('grade of the task', task.grade),
                    ('read of the method', reward.read)):
    try:
      numbers = dict(ask('', example))
      found |= {key: float(value) for key, value in numbers.items()}
    except Exception as error:
      raise ValueError(
          f'the {name} fails on an empty completion: expected numbers by name, '
          f'got {type(error).__name__}: {error}.') from error
    if 'correct' not in found:
      raise ValueError(f"the {name} gives {sorted(found)}: expected 'correct', "
                       'a number in [0, 1], among them.')
  return set(found) - {'correct'}


def reward(config: ml_collections.ConfigDict, reward: types.Reward,
           num_examples: int, names: set[str] | None = None) -> Any:
  """Shapes of the method's memory, once it has taken outcomes of our shape.

  Args:
    config: a stage's.
    reward: the method.
    num_examples: N.
    names: of `text`; None = whatever the method asks for.

  Raises:
    ValueError: the method does not keep its contract.
  """
  prompts = config.rollout.num_prompts
  groups = (prompts, config.rollout.group_size)
  method = f'the method {config.reward.name}'

  def apply():
    grades = jnp.zeros(groups)
    none = jnp.zeros(prompts, jnp.int32)
    extras = dict.fromkeys(names or (), grades)
    # What it measures has names of its own.
    if names is None or reward.measure is not _MEASURES_NOTHING:
      extras = collections.defaultdict(lambda: grades, extras)
    return reward.apply(types.Outcomes(
        correct=grades, lengths=jnp.ones(groups, jnp.int32),
        truncated=grades > 0, prompt_index=none, target_lengths=none,
        extras=extras), reward.init(num_examples))

  try:
    found = jax.eval_shape(apply)
  except KeyError as error:
    raise ValueError(f'{method} asks for {error} among the extras: there are '
                     f'{sorted(names or ())}.') from error
  if not (isinstance(found, tuple) and len(found) == 2 and
          isinstance(found[0], types.Rewards)):
    raise ValueError(f'{method} gives a {type(found).__name__}: expected '
                     '(types.Rewards, the memory).')
  rewards, memory = found
  for name, array in {**rewards.terms, 'keep': rewards.keep}.items():
    if array is not None and array.shape != groups:
      raise ValueError(f'{method} gives {name} the shape {array.shape}: '
                       f'expected {groups}, prompts by completions.')
  if unknown := set(rewards.weights or ()) - set(rewards.terms):
    raise ValueError(f'{method} weighs {sorted(unknown)}: expected terms among '
                     f'{sorted(rewards.terms)}.')
  shapes = lambda tree: jax.tree.map(lambda x: x.shape, tree)
  first = jax.eval_shape(lambda: reward.init(num_examples))
  if shapes(memory) != shapes(first):
    raise ValueError(f'{method} gives back a memory of shapes '
                     f'{shapes(memory)}: expected those of init, '
                     f'{shapes(first)}.')
  return memory


def prompts(config: ml_collections.ConfigDict, task: types.Task,
            eval_task: types.Task, encode: Callable, reward: types.Reward,
            memory: Any) -> None:
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


def _numbers(config: ml_collections.ConfigDict) -> None:
  """Checks every number that has a range of its own."""
  for key, least, most in _RANGES:
    if not least <= config[key] <= most:
      wanted = (f'at least {least}' if most == _ANY else
                f'a number from {least} to {most:g}')
      raise ValueError(f'{key} {config[key]}: expected {wanted}.')
  for key in ('optimizer.b1', 'optimizer.b2'):
    if not 0 <= config[key] < 1:
      raise ValueError(f'{key} {config[key]}: expected a share below 1, such '
                       'as 0.9.')
  for key in _POSITIVE:
    if not 0 < config[key] < _ANY:
      raise ValueError(f'{key} {config[key]}: expected a number above 0.')
  for name, value in config.reward.items():
    if isinstance(value, float) and not math.isfinite(value):
      raise ValueError(f'reward.{name} {value}: expected a number.')
