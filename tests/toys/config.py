# SPDX-License-Identifier: Apache-2.0
"""Both LAPO stages in seconds: the real loop over `toys.task`.

The model is a folder of `toys.folder`: `--config.model.path=…`. The numbers of
problems divide by nothing; the second stage goes off-policy and has a
reference, so that its path through the loop is the longer one.
"""

from configs import default

TASK = 'toys.task'


def get_config(argument=''):
  parts = [part for part in argument.split(',') if part]
  if not any(part.startswith('task=') for part in parts):
    parts.append(f'task={TASK}')
  config = default.get_config(','.join(parts))
  config.total_steps = 4
  config.rollout.update(
      num_prompts=8, group_size=4, max_prompt_length=96,
      max_completion_length=16, template='{question} <think>')
  config.optimizer.learning_rate = 1e-2
  config.updates.microbatch_size = 16
  config.eval.update(batch_size=8, num_examples=9)
  if config.task.name == TASK:
    config.eval.task = {'split': 'test', 'num_examples': 9}
  config.eval_every = config.checkpoint_every = 2
  config.samples_every = 3
  if config.reward.name == 'lapo':
    config.reward.update(slope=5.0, sigma=4.0)
    config.stages = (
        {'name': 'discovery', 'reward.stage': 'discovery'},
        {'name': 'internalisation', 'reward.stage': 'internalisation',
         'loss.kl_coef': 0.05, 'updates.num_minibatches': 2},
    )
  return config
