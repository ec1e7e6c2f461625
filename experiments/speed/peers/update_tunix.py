# SPDX-License-Identifier: Apache-2.0
"""Tunix's update: what GRPOLearner.train runs for each batch.

A whole step is `_run_global_step`; an update is `rl_cluster.update_actor`
with a prepared example, the last thing that such a step does.
"""

import re
import time
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from tunix.models.qwen2 import params as params_lib
from tunix.rl import rl_cluster
from tunix.rl.grpo import grpo_learner
from tunix.rl.rollout import base_rollout

from experiments.speed import points, serving, steps
from experiments.speed.peers import tunix as sampler

# Rows of a microbatch; see the README.
_MICROBATCH = 8


class Peer:
  """GRPOLearner; sampler and trainer share the weights."""

  libraries = ('google-tunix', 'jax', 'jaxlib', 'flax', 'optax')

  def __init__(self, folder: str, work: steps.Work):
    model, shape = sampler.load_model(folder)
    self._work = work
    self._names = params_lib._get_key_and_transform_mapping(shape)
    tokenizer = _Tokenizer(work.row_prompts[::points.GROUP_SIZE],
                           shape.vocab_size)
    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(1, 1),
                             ('fsdp', 'tp'))
    self._learner = grpo_learner.GRPOLearner(
        rl_cluster.RLCluster(
            actor=model, tokenizer=tokenizer,
            cluster_config=_cluster(mesh, work)),
        grpo_learner.GRPOConfig(
            num_generations=points.GROUP_SIZE, beta=0.0, epsilon=steps.CLIP),
        reward_fns=_reward)
    prompts = {'prompts': np.array([str(i) for i in range(len(work.prompts))])}
    batches = iter(lambda: prompts, None)
    self._batches = self._learner._create_micro_batch_iterator(
        batches, _MICROBATCH // points.GROUP_SIZE)
    self._cluster = self._learner.rl_cluster
    self._losses, self._sampled, self._sample_seconds = [], None, 0.0
    self._generate, self._cluster.generate = (
        self._cluster.generate, self._timed)
    throttler = self._cluster.actor_trainer._throttler
    self._add, throttler.add_computation = (
        throttler.add_computation, self._kept)
    self._examples = _examples(work)

  def run(self, seed: int) -> dict[str, Any]:
    """One update, of a batch that is sampled first if the work is whole."""
    self._losses.clear()
    facts = {}
    start = time.perf_counter()
    if self._work.whole:
      self._cluster.cluster_config.rollout_config.seed = jax.random.key(seed)
      prompts = len(self._work.prompts)
      self._learner._run_global_step(prompts, prompts, prompts,
                                     len(self._examples), self._batches,
                                     None, False)
      self._cluster.global_steps += 1
      facts['sample_seconds'] = self._sample_seconds
    else:
      for example in self._examples:
        self._cluster.update_actor([example], None, False)
    jax.block_until_ready(nnx.state(self._cluster.actor_trainer.model))
    facts['update_seconds'] = (
        time.perf_counter() - start - self._sample_seconds)
    return {'facts': facts, 'loss': np.mean(self._losses)}

  def compared(self, result: dict[str, Any]) -> dict[str, np.ndarray]:
    """What it learned from, its loss, and the weights now."""
    tokens = self._work.completions
    return {'tokens': tokens if self._sampled is None else self._sampled,
            'loss': np.array(result['loss']), **self._weights()}

  def _weights(self) -> dict[str, np.ndarray]:
    """By the names that checkpoints have."""
    found = {}
    state = nnx.state(self._cluster.actor_trainer.model, nnx.Param)
    for path, leaf in nnx.to_flat_state(state):
      ours, value = '.'.join(map(str, path)), np.asarray(leaf[...])
      for theirs, (to, change) in self._names.items():
        pattern = re.escape(to).replace(r'\\1', r'(\d+)')
        if match := re.fullmatch(pattern, ours):
          name = theirs.replace('\\.', '.')
          if match.groups():
            name = name.replace('([0-9]+)', match[1])
          if change is not None:
            # Of queries, keys and values the inputs come first.
            inputs = (value.shape[0] if 'o_proj' not in name else
                      value.shape[0] * value.shape[1])
            value = value.reshape(inputs, -1).T
          found[name] = value.reshape(-1) if 'bias' in name else value
    return found

  def _timed(self, *arguments: Any, **settings: Any) -> Any:
    start = time.perf_counter()
    found = self._generate(*arguments, **settings)
    self._sample_seconds = time.perf_counter() - start
    self._sampled = np.array(found.tokens, np.int32)
    return found

  def _kept(self, loss: jax.Array) -> None:
    self._losses.append(loss)
    self._add(loss)


class _Tokenizer(sampler.Tokenizer):
  """A completion's text is its first token."""

  def decode(self, ids: list[int]) -> str:
    return str(ids[0])


def _cluster(mesh: jax.sharding.Mesh,
             work: steps.Work) -> rl_cluster.ClusterConfig:
  slots = work.prompts.shape[1] + steps.COMPLETION
  prompts = len(work.prompts)
  role = rl_cluster.Role
  return rl_cluster.ClusterConfig(
      role_to_mesh={role.ACTOR: mesh, role.REFERENCE: mesh,
                    role.ROLLOUT: mesh},
      rollout_config=base_rollout.RolloutConfig(
          max_tokens_to_generate=steps.COMPLETION,
          max_prompt_length=work.prompts.shape[1], kv_cache_size=slots,
          temperature=1.0, top_p=1.0),
      training_config=rl_cluster.RLTrainingConfig(
          actor_optimizer=optax.chain(
              optax.clip_by_global_norm(steps.CLIP_NORM),
              optax.adamw(steps.LEARNING_RATE, *steps.BETAS, eps=steps.EPS,
                          weight_decay=0.0)),
          eval_every_n_steps=10**6, mini_batch_size=prompts,
          train_micro_batch_size=_MICROBATCH // points.GROUP_SIZE,
          rollout_micro_batch_size=prompts,
          compute_logps_micro_batch_size=prompts))


def _examples(work: steps.Work) -> list[grpo_learner.TrainExample]:
  """The batch as it is given, in microbatches."""
  found = []
  for start in range(0, len(work.completions), _MICROBATCH):
    part = lambda x, start=start: jnp.asarray(x[start:start + _MICROBATCH])
    prompts, completions = part(work.row_prompts), part(work.completions)
    found.append(grpo_learner.TrainExample(
        prompt_ids=prompts, prompt_mask=jnp.ones_like(prompts, bool),
        completion_ids=completions,
        completion_mask=jnp.ones_like(completions, bool),
        ref_per_token_logps=None, advantages=part(work.advantages),
        old_per_token_logps=part(work.old_logprobs)))
  return found


def _reward(prompts: list, completions: list, **columns: Any) -> list[float]:
  return steps.rewards([int(text) for text in completions]).tolist()


if __name__ == '__main__':
  serving.serve(Peer, steps.load)
