# SPDX-License-Identifier: Apache-2.0
"""Both LAPO stages in seconds: the real loop over `toys.task`.

The model is a folder of `toys.folder`: `--config.model.path=…`.
"""

from configs import default

TASK = 'toys.task'


def get_config(argument=''):
  names = f'{argument},' if argument else ''
  config = default.get_config(f'{names}task={TASK}' if 'task=' not in names
                              else argument)
  config.total_steps = 4
  config.rollout.update(
      num_prompts=4, group_size=4, max_prompt_length=128,
      max_completion_length=24, template='{question} <think>')
  config.optimizer.learning_rate = 3e-3
  config.updates.microbatch_size = 8
  config.mesh.fsdp, config.mesh.data = 1, -1
  config.eval.update(batch_size=8, num_examples=8)
  if config.task.name == TASK:
    config.eval.task = {'split': 'test', 'num_examples': 8}
  config.eval_every = config.checkpoint_every = 2
  config.samples_every = 3
  if config.reward.name == 'lapo':
    config.reward.update(slope=5.0, sigma=4.0)
    config.stages = (
        {'name': 'discovery', 'reward.stage': 'discovery'},
        {'name': 'internalisation', 'reward.stage': 'internalisation'},
    )
  return config
