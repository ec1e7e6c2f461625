# SPDX-License-Identifier: Apache-2.0
"""LAPO, both stages, on the embedded reasoner; a laptop is enough.

  python -m lapo_jax.main --config=configs/tiny.py --workdir=runs/tiny

Two CPU cores, six to eight minutes with compilation, 2.8 GiB: from 83 % and 70
tokens to 91 % and 37 tokens on held-out problems
(experiments/lapo_tiny).

The argument is the method: `configs/tiny.py:accuracy` is the control, the
same steps and cap in one stage.
"""

from configs import default

_STEPS = 45


def get_config(argument=''):
  config = default.get_config(argument)
  config.total_steps = _STEPS
  config.rollout.update(
      num_prompts=32, group_size=8, max_prompt_length=1024,
      max_completion_length=256,
      template='User: {question} Assistant: <think>')
  # The mean over each completion's own tokens ('sequence') is itself a length
  # reward: a short right answer moves its tokens more than a long one. Every
  # token equal, in both arms, leaves the length to the method.
  config.loss.aggregate = 'token'
  config.optimizer.update(learning_rate=1e-4)
  config.updates.microbatch_size = 32
  # Whatever a stage trains under.
  config.eval.update(batch_size=256, max_completion_length=256)
  config.eval_every = 30
  config.checkpoint_every = 15
  if config.task.name == 'arithmetic':
    # Few enough that each problem is met several times: M(q) is a memory.
    config.task.num_examples = 480
    config.eval.task = {'split': 'test', 'num_examples': 1000}
    config.eval.num_examples = 1000
  if config.reward.name == 'lapo':
    # 100 and 120 tokens belong to a cap of 4,096; these to one of 256.
    config.reward.update(slope=15.0, sigma=8.0)
    config.stages = (
        {'name': 'discovery', 'reward.stage': 'discovery'},
        {'name': 'internalisation', 'reward.stage': 'internalisation'},
    )
  else:
    config.total_steps = 2 * _STEPS
  return config
