# SPDX-License-Identifier: Apache-2.0
"""The toy in few and small programs, for runs on several hosts."""

from toys import config as toy


def get_config(argument='accuracy'):
  config = toy.get_config(argument)
  config.total_steps = 8
  config.rollout.update(group_size=2, grade_ahead=True)
  config.checkpoint_every = 1
  config.eval_every = config.updates.short_share = 0
  # The shapes of training, so that the same programs serve.
  config.eval.update(num_samples=2, num_examples=8)
  return config
