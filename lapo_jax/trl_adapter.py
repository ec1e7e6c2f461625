# SPDX-License-Identifier: Apache-2.0
"""Any method of `rewards/` as a reward function of TRL's GRPOTrainer.

  shorter = trl_adapter.RewardFunction(
      'shorter_better', correct=accuracy_reward, num_generations=8,
      eos_token_ids=tokenizer.eos_token_id, beta=1e-3)
  GRPOTrainer(..., reward_funcs=[shorter])

TRL (1.16) calls `f(prompts, completions, completion_ids, **columns)` and wants
a float for each completion. Torch is not imported here; JAX works on the CPU
(set JAX_PLATFORMS=cpu, or it takes memory of the GPU).

What a method needs besides grades and lengths comes from the data set:

  * index: the stable problem id, 0 to num_examples − 1, of methods with a
    memory per problem. Held-out problems need ids of their own.
  * target_lengths: the tokens that each prompt states, of methods that state a
    number. The prompts are the data set's: `types.Reward.instruct` writes them.

Methods that leave completions out of their groups (gfpo, qlpo) return
advantages, 0 for those left out: TRL counts a reward of None as a 0 that the
others are compared with. Their mean is 0 in each group, so that a trainer with
`scale_rewards='none'` learns from just these numbers.

What does not fit into one number per completion is refused: methods that need
log-probs (sar, drpo), that cut completions or silence tokens (dot, sas), or
whose prompts state what is no number of tokens (e1).

Departures: the advantages of the other methods are TRL's. Those that want terms
normalised apart (lead, gdpo) are plain sums, and those whose terms are
advantages already (ddca, hbpo) are normalised once more unless the trainer is
told not to.
"""

from collections.abc import Callable, Sequence
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lapo_jax import advantages, plugins, types


class RewardFunction:
  """A method as `f(prompts, completions, completion_ids, **columns)`.

  Attributes:
    state: the method's memory, a pytree of arrays: save it with a checkpoint,
      set it to go on. TRL asks its reward functions in evaluations, too: what
      a method keeps of batches (leash, lead, laser) then moves with held-out
      ones, unless it is set back afterwards.
  """

  def __init__(self, name: str, *, correct: Callable | str,
               num_generations: int, eos_token_ids: int | Sequence[int],
               num_examples: int | None = None, **settings: Any):
    """Makes the method and asks whether it fits.

    Args:
      name: a file of `rewards/` or the dotted path of one's own.
      correct: grades in [0, 1]: a function of TRL's contract, or the name of a
        column. A grade of None leaves its whole group without rewards.
      num_generations: G, the trainer's, also of its evaluations.
      eos_token_ids: the tokenizer's; a completion that ends with none of them
        is truncated, and wrong.
      num_examples: N, of methods that remember each problem.
      **settings: of the method's `make`; a `cap` is in tokens.

    Raises:
      ValueError: a method that does not fit, or a setting that is missing.
    """
    # TRL names its metrics by it.
    self.__name__ = name.rpartition('.')[2]
    self._name, self._correct = name, correct
    self._group_size = num_generations
    self._eos = set(np.ravel(eos_token_ids).tolist())
    if not self._eos or not all(isinstance(i, int) for i in self._eos):
      raise ValueError(f'eos_token_ids {eos_token_ids!r}: expected one id or '
                       'several; without any, every completion would count as '
                       'truncated.')
    self._num_examples = num_examples
    self._method = plugins.make('rewards', name, **settings)
    if self._method.trim is not None or self._method.mute is not None:
      raise ValueError(f'{name} cuts completions or silences tokens, which a '
                       'reward function cannot: use the loop of lapo_jax, or '
                       'another method.')
    self._apply = jax.jit(self._method.apply)
    shapes = [jax.eval_shape(lambda n=n: self._method.init(n)) for n in (1, 2)]
    self._has_ids = str(shapes[0]) != str(shapes[1])
    processes = os.environ.get('WORLD_SIZE', '1')
    if jax.tree.leaves(shapes[0]) and processes != '1':
      raise ValueError(f'{name} has a memory, and each of {processes} '
                       'processes would have its own: train with one process, '
                       'or take a method without.')
    if self._has_ids and num_examples is None:
      raise ValueError(f'{name} remembers each problem: expected num_examples, '
                       'and a column `index` of 0 to num_examples − 1.')
    with _on_cpu():
      self.state = self._method.init(num_examples or 1)
      self._has_numbers = self._states_numbers()
      found = self._measure([[0]])
      if not all(np.isfinite(x).all() for x in found.values()):
        self._refuse_logprobs()
      self._measures = bool(found)

  def __call__(self, prompts: Sequence[Any], completions: Sequence[Any],
               completion_ids: Sequence[Any],
               **columns: Any) -> list[float | None]:
    """Rewards of completions whose groups lie together.

    Args:
      prompts: texts or lists of messages, each G times in a row.
      completions: texts or lists of messages.
      completion_ids: tokens through the stop token; of each completion a list,
        or an array or tensor of one axis.
      **columns: of the data set, a value per completion.

    Returns:
      The method's total, a float per completion, or its advantage where the
      method leaves some out; None where a group has no grades.

    Raises:
      ValueError: no whole groups, or a column that is missing or wrong.
    """
    self._check_groups(prompts)
    starts = range(0, len(prompts), self._group_size)
    grades = self._grades(prompts, completions, completion_ids, columns)
    indices = self._of_groups(columns, 'index', len(prompts), self._has_ids)
    targets = self._of_groups(columns, 'target_lengths', len(prompts),
                              self._has_numbers)
    if self._has_ids and not all(0 <= i < self._num_examples for i in indices):
      raise ValueError(f'index {min(indices)} to {max(indices)}: expected '
                       f'problem ids of 0 to {self._num_examples - 1}.')

    known = [b for b in starts if None not in grades[b:b + self._group_size]]
    rows = [b + g for b in known for g in range(self._group_size)]
    rewards = [None] * len(prompts)
    if rows:
      found = self._run(
          ids=[[int(i) for i in completion_ids[b]] for b in rows],
          grades=[grades[b] for b in rows],
          texts=[(_text(prompts[b]), _text(completions[b])) for b in rows],
          indices=[indices[b] for b in known],
          targets=[targets[b] for b in known])
      for b, reward in zip(rows, found, strict=True):
        rewards[b] = reward
    return rewards

  def _run(self, ids, grades, texts, indices, targets) -> list[float]:
    """The method on whole groups with grades; moves the memory."""
    cut = np.array([not row or row[-1] not in self._eos for row in ids])
    read = [self._method.read(completion, types.Example(prompt, ''))
            for prompt, completion in texts]
    group = lambda values, dtype: np.reshape(
        np.asarray(values, dtype), (-1, self._group_size))
    with _on_cpu():
      extras = {name: [found[name] for found in read] for name in read[0]}
      if self._measures:
        extras |= self._measure(ids)
      rewards, self.state = self._apply(types.Outcomes(
          correct=group(np.where(cut, 0.0, grades), np.float32),
          lengths=group([len(row) for row in ids], np.int32),
          truncated=group(cut, bool),
          prompt_index=np.asarray(indices, np.int32),
          target_lengths=np.asarray(targets, np.int32),
          extras={name: group(x, np.float32) for name, x in extras.items()},
      ), self.state)
      total = rewards.total
      if rewards.keep is not None:
        total = advantages.group_advantages(total, rewards.keep)
      return np.ravel(total).astype(float).tolist()

  def _grades(self, prompts, completions, completion_ids, columns):
    if isinstance(self._correct, str):
      grades = self._column(columns, self._correct, len(prompts), True)
    else:
      grades = list(self._correct(prompts=prompts, completions=completions,
                                  completion_ids=completion_ids, **columns))
    for grade in grades:
      if grade is not None and not 0 <= grade <= 1:  # NaN too
        raise ValueError(f'correct gave the grade {grade}: expected one in '
                         '[0, 1], or None for a group without rewards.')
    if len(grades) != len(prompts):
      raise ValueError(f'correct gave {len(grades)} grades of {len(prompts)} '
                       'completions: expected one each.')
    return grades

  def _column(self, columns, name, count, is_needed):
    """A column of the data set; zeros where the method reads none."""
    if not is_needed:
      return [0] * count
    if name not in columns:
      raise ValueError(f'{self._name} needs a column `{name}`: got '
                       f'{sorted(columns)}.')
    return list(columns[name])

  def _of_groups(self, columns, name, count, is_needed):
    """A column that says the same of all completions of a prompt."""
    values = self._column(columns, name, count, is_needed)
    for b, value in enumerate(values):
      first = values[b - b % self._group_size]
      if value != first:
        raise ValueError(f'{name} is {first} and {value} for completions of '
                         'one prompt: expected one number.')
    return values

  def _check_groups(self, prompts):
    size = self._group_size
    if len(prompts) % size or any(prompts[b] != prompts[b - b % size]
                                  for b in range(len(prompts))):
      raise ValueError(
          f'{self._name} compares the {size} completions of a prompt, but of '
          f'the {len(prompts)} that came not every {size} share theirs: let '
          'the batch of each process be a multiple of num_generations, and '
          'num_generations_eval the same as num_generations.')

  def _states_numbers(self) -> bool:
    """Whether the prompts state tokens; refuses any other instruction."""
    example = types.Example('', '')
    told = self._method.instruct(example, 0, jax.device_get(self.state),
                                 np.random.default_rng(0))
    if told != example and not told.target_length:
      raise ValueError(f'{self._name} writes more into a prompt than a number '
                       'of tokens, which a column cannot hold: use the loop of '
                       'lapo_jax, or another method.')
    return told != example

  def _measure(self, ids: list[list[int]]) -> dict[str, Any]:
    """What the method finds in the tokens alone; [B] by name."""
    slots = 1 << max(map(len, ids)).bit_length()  # few shapes
    tokens = np.zeros((len(ids), slots), np.int32)
    mask = np.zeros(tokens.shape, bool)
    for i, row in enumerate(ids):
      tokens[i, :len(row)], mask[i, :len(row)] = row, True
    found = types.Rollout(tokens[:, :0], mask[:, :0], tokens, mask, mask,
                          np.full(tokens.shape, np.nan, np.float32))
    return self._method.measure(jax.tree.map(jnp.asarray, found),
                                self._refuse_logprobs, self._refuse_logprobs)

  def _refuse_logprobs(self, *unused):
    raise ValueError(f'{self._name} needs log-probs, which TRL does not hand '
                     'to a reward function: use the loop of lapo_jax, or '
                     'another method.')


def _on_cpu():
  """The GPU is the trainer's."""
  return jax.default_device(jax.local_devices(backend='cpu')[0])


def _text(content: str | Sequence[dict[str, Any]]) -> str:
  """A text as it is, messages one after the other."""
  if isinstance(content, str):
    return content
  return ''.join(message['content'] or '' for message in content)
