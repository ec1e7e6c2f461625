# SPDX-License-Identifier: Apache-2.0
"""The command as one of several hosts runs it, its steps written down.

What an update is given, graded with and finds goes whole to step-<step>.npz
in the run's folder; the optimizer's state is the gradient.
"""

import pathlib
import sys

if __name__ == '__main__':
  sys.modules['torch'] = None  # seconds in every process, and nobody needs it

import jax
import numpy as np
import optax

from lapo_jax import build, evaluate, main, train
from lapo_jax import programs as programs_lib

_prepare = train.prepare


def make_optimizer(config):
  return optax.chain(optax.trace(0.0),
                     optax.scale(-config.optimizer.learning_rate))


def prepare(config, workdir):
  """`train.prepare` with eyes."""
  [run] = _prepare(config, workdir)
  everywhere = run.state_shapes.step.sharding
  whole = jax.jit(lambda tree: tree, out_shardings=everywhere)
  seen = {}

  def replicate(tree):
    if hasattr(tree, 'correct'):
      seen.update({name: np.asarray(getattr(tree, name)) for name in (
          'correct', 'lengths', 'prompt_index')})
    return run.replicate(tree)

  def update(state, batch):
    step = int(state.step)
    given = (batch.advantages, batch.rollout.prompt_tokens,
             batch.rollout.completion_tokens, batch.rollout.sampler_logprobs)
    given = jax.device_get(whole(given))
    state, found = run.update(state, batch)
    leaves = jax.device_get(whole(jax.tree.leaves(state.opt_state)))
    names = ('advantages', 'prompts', 'completions', 'sampler_logprobs')
    if jax.process_index() == 0:
      np.savez(pathlib.Path(workdir) / f'step-{step}.npz',
               **dict(zip(names, given, strict=True)), **seen,
               **{f'gradient-{i}': leaf for i, leaf in enumerate(leaves)})
    return state, found

  # The shapes are those of training: one sampler is compiled, not two.
  settings = run.config.eval
  evaluate_fn = evaluate.make_evaluate_fn(
      run.sample, run.encode, run.eval_task, run.grader, run.tokenizer,
      batch_size=settings.batch_size, temperature=settings.temperature,
      key=build.key(run.config.seed, 'eval', 0))
  return [run._replace(replicate=replicate, update=update,
                       evaluate=evaluate_fn)]


if __name__ == '__main__':
  programs_lib.make_optimizer, train.prepare = make_optimizer, prepare
  main.run()
