# SPDX-License-Identifier: Apache-2.0
"""Our sampler, with its log-probs."""

from typing import Any

import jax
import numpy as np

from experiments.speed import points, serving
from lapo_jax import programs, sampling, sharding, types
from lapo_jax.models import qwen2


class Peer:
  """`sampling.make_sample_fn`; lengths are forced by budgets."""

  libraries = ('jax', 'jaxlib', 'flax')

  def __init__(self, folder: str, work: points.Work):
    jax.config.update('jax_num_cpu_devices', work.data * work.tensor)
    mesh = sharding.make_mesh(data=work.data, fsdp=1, tensor=work.tensor)
    model = qwen2.make(folder)
    places = sharding.for_sampling(sharding.partition(
        qwen2.PARTITION_RULES, qwen2.init_shapes(model), mesh))
    self._params = jax.device_put(qwen2.load(folder, model), places)
    self._work = work
    index = np.arange(len(work.prompts), dtype=np.int32)
    self._prompts = types.Prompts(
        tokens=work.prompts, mask=np.ones(work.prompts.shape, bool),
        index=index, target_lengths=np.zeros_like(index))
    self._sample = sampling.make_sample_fn(
        model, group_size=points.GROUP_SIZE, max_completion_length=work.cap,
        eos_ids=(), pad_id=0, num_slots=work.num_slots or None,
        shardings=(places, programs.prompt_places(mesh),
                   sharding.sampling_batch(mesh)))

  def run(self, seed: int) -> dict[str, Any]:
    """Samples; the facts are of slots and cache."""
    seen = []
    rollout = jax.device_get(self._sample(
        self._params, self._prompts, jax.random.key(seed), 1.0,
        budgets=self._work.lengths, watch=seen.append))
    # The number of slots may shrink: each look counts the steps before it.
    steps = np.diff([0, *(progress.steps for progress in seen)])
    offered = np.cumsum(steps * [
        progress.num_slots // self._work.data for progress in seen])
    facts = {'occupancy': float(seen[-1].busy / offered[-1]),
             'cache_bytes': max(progress.cache_bytes for progress in seen)}
    queued = [i for i, progress in enumerate(seen) if progress.waiting]
    if queued:
      last = queued[-1]
      facts['queued_occupancy'] = float(seen[last].busy / offered[last])
    return {'rollout': rollout, 'facts': facts}

  def compared(self, result: dict[str, Any]) -> dict[str, np.ndarray]:
    """What it sampled."""
    rollout, rows = result['rollout'], self._work.compared
    if not np.array_equal(rollout.completion_mask.sum(1), self._work.lengths):
      raise RuntimeError('our completions have other lengths than asked for.')
    longest = self._work.longest
    return {'tokens': rollout.completion_tokens[rows, :longest],
            'logprobs': rollout.sampler_logprobs[rows, :longest]}


if __name__ == '__main__':
  serving.serve(Peer)
