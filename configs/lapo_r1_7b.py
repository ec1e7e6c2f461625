# SPDX-License-Identifier: Apache-2.0
"""LAPO's recipe from DeepSeek-R1-Distill-Qwen-7B (arXiv 2507.15758).

  python -m lapo_jax.main --config=configs/lapo_r1_7b.py \
    --config.model.path=<folder> --config.task.path=<folder> --workdir=runs/r7

The recipe, its departures and the data are those of configs/lapo_r1_1p5b.py,
which the paper has for 1.5B alone; no number is known for this size, and we
have not run it. It is laid out for 64 chips:

  python -m lapo_jax.plan --config=configs/lapo_r1_7b.py --topology=v5p:4x4x4
"""

from configs import lapo_r1_1p5b


def get_config(argument=''):
  config = lapo_r1_1p5b.get_config(argument)
  config.model.path = 'DeepSeek-R1-Distill-Qwen-7B'
  config.updates.microbatch_size = 64
  return config
