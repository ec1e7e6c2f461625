# SPDX-License-Identifier: Apache-2.0
"""The treaty: the records that travel between rooms and the plug-in contracts.

Read this file first. Axis letters, used in every signature of the package:

  P  prompts in a step (= number of groups)      V     vocabulary
  G  group size: completions per prompt          D     model width
  B  completions in a step, B = P·G, b = p·G+g   H, K  query, key/value heads
  L  prompt slots (left-padded)                  E     head width
  T  completion slots (right-padded)             C     cache slots
  S  all slots, S = L + T                        N     examples in the task

One token layout everywhere: [ pad … prompt | completion … pad ], L then T
slots. Sampling, scoring and the loss see the same slots.

Fields of records that hold arrays are annotated `Leaf` and carry their shape
in the docstring: the same records hold trees of shardings, of shapes and of
host arrays, which a run-time check of array fields would reject.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import flax.struct
import jax
import numpy as np

# An array, or what stands for one in a tree of shardings or shapes.
Leaf = Any


@flax.struct.dataclass
class Example:
  """One problem, as a task yields it (host Python).

  Attributes:
    question: the problem's text.
    answer: the gold answer's text.
    unit: the gold answer's unit where the data set gives it apart, '' = none.
    tolerance: how far a number may lie from the gold one, 0 = exact.
    level: name of its difficulty level, '' when the task has none.
    prefill: text placed after the prompt template, e.g. LAPO's sentence.
    target_length: budget in tokens stated in the prompt, 0 = none.
  """

  question: str
  answer: str
  unit: str = ''
  tolerance: float = 0.0
  level: str = ''
  prefill: str = ''
  target_length: int = 0


@flax.struct.dataclass
class Prompts:
  """The encoded prompts of a step.

  Attributes:
    tokens: int32 [P, L], left-padded; sharded over the batch axes.
    mask: bool [P, L], true on real tokens; sharded.
    index: int32 [P], row in the task, the stable problem id; replicated.
    target_lengths: int32 [P], tokens, 0 = none; replicated.
  """

  tokens: Leaf
  mask: Leaf
  index: Leaf
  target_lengths: Leaf


@flax.struct.dataclass
class Rollout:
  """Sampled completions; every field sharded over the batch axes.

  Attributes:
    prompt_tokens: int32 [B, L], each prompt repeated G times.
    prompt_mask: bool [B, L].
    completion_tokens: int32 [B, T], pad after the stop token.
    completion_mask: bool [B, T], true through the stop token, inclusive.
    action_mask: bool [B, T], true where the policy chose the token. Forced
      tokens are attended, never trained on.
    sampler_logprobs: float32 [B, T], at sampling temperature; 0 on padding.
    segments: int32 [B, S], None as sampled. Of rows that hold several prompts
      and completions, see `packing`: which of them each slot belongs to,
      counted from 1, 0 on padding.
  """

  prompt_tokens: Leaf
  prompt_mask: Leaf
  completion_tokens: Leaf
  completion_mask: Leaf
  action_mask: Leaf
  sampler_logprobs: Leaf
  segments: Leaf = None


@flax.struct.dataclass
class Outcomes:
  """What is known of each completion once it is graded; replicated.

  Attributes:
    correct: float32 [P, G], the task's grade in [0, 1].
    lengths: int32 [P, G], completion tokens through the stop token.
    truncated: bool [P, G], reached the cap without a stop token.
    prompt_index: int32 [P], the stable problem id.
    target_lengths: int32 [P], tokens, 0 = none.
    extras: float32 [P, G] by name: other grades of the task and what the
      method's `read` and `measure` found.
  """

  correct: Leaf
  lengths: Leaf
  truncated: Leaf
  prompt_index: Leaf
  target_lengths: Leaf
  extras: Mapping[str, Leaf] = flax.struct.field(default_factory=dict)


@flax.struct.dataclass
class Rewards:
  """Numbers to be maximised; replicated.

  Attributes:
    terms: float32 [P, G] by name; a simple method has one.
    weights: float32 [] by name, None = all ones.
    keep: bool [P, G], None = all; the others count for no statistic of their
      group and have advantage 0. In the loss they weigh what they would.
  """

  terms: Mapping[str, Leaf]
  weights: Mapping[str, Leaf] | None = None
  keep: Leaf = None

  @property
  def total(self) -> Leaf:
    """The weighted sum of the terms, float32 [P, G]."""
    weights = self.weights or {}
    return sum(term * weights.get(name, 1.0)
               for name, term in self.terms.items())


@flax.struct.dataclass
class Batch:
  """What the update consumes; sharded over the batch axes.

  Attributes:
    rollout: Rollout.
    advantages: float32 [B]; [B, T] of rows that hold several completions or
      tokens that are not trained on.
    old_logprobs: float32 [B, T], of the policy at the start of the step.
    ref_logprobs: float32 [B, T] of the reference policy, None without KL.
    weights: float32 [B, T], token weights, see `losses.token_weights`.
  """

  rollout: Rollout
  advantages: Leaf
  old_logprobs: Leaf
  ref_logprobs: Leaf
  weights: Leaf


@flax.struct.dataclass
class TrainState:
  """All that a checkpoint must hold, besides the config.

  Attributes:
    step: int32 [], completed steps of the run, over all stages.
    stage: int32 [], index of the stage that made the last step.
    nonfinite: int32 [], updates skipped in a row for a non-finite gradient.
    params: tree in the model's param_dtype, sharded by its family's rules.
    opt_state: optax state, sharded like the parameters.
    reward_state: the method's memory; replicated.
  """

  step: Leaf
  stage: Leaf
  nonfinite: Leaf
  params: Any
  opt_state: Any
  reward_state: Any


# Scores given tokens under the current policy: Rollout -> float32 [B, T].
LogprobFn = Callable[[Rollout], jax.Array]
# Encodes Examples (one per prompt) and their indices in the task to Prompts.
EncodeFn = Callable[[list[Example], Sequence[int] | np.ndarray], Prompts]


def _no_memory(num_examples: int) -> Any:
  """Memory of a method that needs none."""
  del num_examples
  return ()


def _remembers_nothing(outcomes: Outcomes, state: Any) -> Any:
  """The memory of a method that keeps nothing of a single problem."""
  del outcomes
  return state


def _unchanged(example: Example, index: int, state: Any,
               rng: np.random.Generator) -> Example:
  """The prompt of a method that states no budget."""
  del index, state, rng
  return example


def _reads_nothing(completion_text: str, example: Example) -> dict[str, float]:
  """What a method that ignores the text finds in it."""
  del completion_text, example
  return {}


def _measures_nothing(rollout: Rollout, logprob_fn: LogprobFn,
                      encode: EncodeFn) -> dict[str, jax.Array]:
  """What a method that asks nothing of the policy is told."""
  del rollout, logprob_fn, encode
  return {}


class Reward(NamedTuple):
  """A length-adaptive method: pure functions, the caller threads the memory.

  Attributes:
    apply: (Outcomes, state) -> (Rewards, state); pure arrays, jitted by the
      loop.
    init: num_examples N -> state, a pytree (arrays of N numbers or scalars).
    instruct: (Example, index, state, rng) -> Example; writes a budget into
      the prompt. `state` is on the host; `rng` depends on (seed, step) only.
    read: (completion text, Example) -> {name: float}; becomes `extras`. It
      runs beside grading, on the host that holds the text.
    measure: (Rollout, logprob_fn, encode) -> {name: float32 [B]}; extra
      questions to the policy; the loop groups them, they become `extras`.
    trim: Outcomes -> int32 [P, G], tokens to keep of each completion. What is
      cut is graded again before all else; None = nothing is ever cut.
    mute: (text of each token) -> a function (Rollout, correct [B]) ->
      bool [B, T], false on tokens whose advantage shall be 0; None = all
      count.
    remember: (Outcomes, state) -> state; what the memory keeps of problems
      that were sampled but are not trained on, because others were drawn in
      their place (`rollout.refill_rounds`). Pure arrays, jitted by the loop;
      their extras lack what `measure` finds.
  """

  apply: Callable[[Outcomes, Any], tuple[Rewards, Any]]
  init: Callable[[int], Any] = _no_memory
  instruct: Callable[[Example, int, Any, np.random.Generator],
                     Example] = _unchanged
  read: Callable[[str, Example], dict[str, float]] = _reads_nothing
  measure: Callable[[Rollout, LogprobFn, EncodeFn],
                    dict[str, jax.Array]] = _measures_nothing
  trim: Callable[[Outcomes], jax.Array] | None = None
  mute: Callable[[Sequence[str]], Callable[[Rollout, jax.Array],
                                           jax.Array]] | None = None
  remember: Callable[[Outcomes, Any], Any] = _remembers_nothing


@runtime_checkable
class Task(Protocol):
  """A data set that can grade."""

  def __len__(self) -> int:
    """Number of examples, N."""

  def __getitem__(self, index: int) -> Example:
    """The example with this index, its stable problem id."""

  def grade(self, completion: str, example: Example) -> dict[str, float]:
    """Grades a completion's text; the text is hostile input.

    Returns:
      'correct' in [0, 1], 'parsed' 1.0 if an answer was found, and whatever
      else the task grades, by name.
    """
