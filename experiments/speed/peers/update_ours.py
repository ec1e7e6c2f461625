# SPDX-License-Identifier: Apache-2.0
"""Our update, and a whole step with the functions of the training loop."""

import pathlib
import tempfile
import time
from typing import Any

import jax
import numpy as np
import optax
from safetensors import numpy as safetensors

from experiments.speed import points, serving, steps
from lapo_jax import advantages, grpo, ops, sampling, types
from lapo_jax.models import qwen2
from lapo_jax.rewards import accuracy

# Rows whose gradient is taken at once; see the README.
_MICROBATCH = 8


def make_optimizer() -> optax.GradientTransformation:
  """What every peer has, in optax."""
  return optax.chain(
      optax.clip_by_global_norm(steps.CLIP_NORM),
      optax.adamw(steps.LEARNING_RATE, *steps.BETAS, eps=steps.EPS,
                  weight_decay=0.0))


def make_state(params: Any) -> types.TrainState:
  """Of a start; `params` are given away with it."""
  zero = lambda: jax.numpy.zeros((), np.int32)  # donated: one buffer each
  return types.TrainState(
      step=zero(), stage=zero(), nonfinite=zero(), params=params,
      opt_state=make_optimizer().init(params), reward_state=())


def make_update(model: Any, microbatch_size: int = _MICROBATCH):
  """Of `grpo`."""
  return grpo.make_update_fn(
      model, make_optimizer(), temperature=1.0,
      microbatch_size=microbatch_size, clip_low=steps.CLIP,
      clip_high=steps.CLIP)


def make_batch(work: steps.Work) -> types.Batch:
  """The batch as it is given."""
  real = lambda tokens: np.ones(tokens.shape, bool)
  rollout = types.Rollout(
      prompt_tokens=work.row_prompts, prompt_mask=real(work.row_prompts),
      completion_tokens=work.completions,
      completion_mask=real(work.completions),
      action_mask=real(work.completions), sampler_logprobs=work.old_logprobs)
  batch = grpo.make_batch_fn('sequence')(
      rollout, work.advantages.reshape(-1, points.GROUP_SIZE),
      work.completions.shape[1])
  return batch.replace(
      old_logprobs=None if work.whole else jax.device_put(work.old_logprobs))


def weights(params: Any, model: Any) -> dict[str, np.ndarray]:
  """By the names that checkpoints have."""
  with tempfile.TemporaryDirectory() as folder:
    qwen2.save(jax.device_get(params), folder, model)
    return safetensors.load_file(pathlib.Path(folder) / 'model.safetensors')


class Peer:
  """`grpo.make_update_fn`, with `sampling.make_sample_fn` before it."""

  libraries = ('jax', 'jaxlib', 'flax', 'optax')

  def __init__(self, folder: str, work: steps.Work):
    self._model = qwen2.make(folder)
    self._state = make_state(jax.device_put(qwen2.load(folder, self._model)))
    self._update = make_update(self._model)
    self._work, self._batch = work, make_batch(work)
    index = np.arange(len(work.prompts), dtype=np.int32)
    self._prompts = types.Prompts(
        tokens=work.prompts, mask=np.ones(work.prompts.shape, bool),
        index=index, target_lengths=np.zeros_like(index))
    self._sample = sampling.make_sample_fn(
        self._model, group_size=points.GROUP_SIZE,
        max_completion_length=steps.COMPLETION, eos_ids=(), pad_id=0)
    self._apply_reward = jax.jit(accuracy.make().apply)
    self._make_batch = grpo.make_batch_fn('sequence')

  def run(self, seed: int) -> dict[str, Any]:
    """One update, of a batch that is sampled first if the work is whole."""
    facts, batch = {}, self._batch
    if self._work.whole:
      start = time.perf_counter()
      rollout = jax.block_until_ready(self._sample(
          self._state.params, self._prompts, jax.random.key(seed), 1.0))
      facts['sample_seconds'] = time.perf_counter() - start
      batch = self._learned_from(rollout)
    start = time.perf_counter()
    self._state, metrics = jax.block_until_ready(
        self._update(self._state, batch))
    facts['update_seconds'] = time.perf_counter() - start
    metrics = grpo.merge([metrics])
    return {'facts': facts, 'loss': metrics['update/loss'],
            'tokens': batch.rollout.completion_tokens}

  def compared(self, result: dict[str, Any]) -> dict[str, np.ndarray]:
    """What it learned from, its loss, and the weights now."""
    return {'tokens': np.asarray(result['tokens']),
            'loss': np.array(result['loss']),
            **weights(self._state.params, self._model)}

  def _learned_from(self, rollout: types.Rollout) -> types.Batch:
    """Graded, rewarded, compared within groups."""
    tokens, mask = jax.device_get((rollout.completion_tokens,
                                   rollout.completion_mask))
    groups = lambda x: ops.to_groups(x, points.GROUP_SIZE)
    lengths = groups(mask.sum(1, dtype=np.int32))
    outcomes = types.Outcomes(
        correct=groups(steps.rewards(tokens[:, 0])), lengths=lengths,
        truncated=lengths == steps.COMPLETION,
        prompt_index=self._prompts.index,
        target_lengths=self._prompts.target_lengths)
    rewards, _ = self._apply_reward(outcomes, ())
    return self._make_batch(
        rollout, advantages.from_rewards(rewards, lengths),
        int(lengths.max()))


if __name__ == '__main__':
  serving.serve(Peer, steps.load)
