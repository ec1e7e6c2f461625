# SPDX-License-Identifier: Apache-2.0
"""LAPO's recipe from DeepScaleR-1.5B-Preview (arXiv 2507.15758).

  python -m lapo_jax.main --config=configs/lapo_deepscaler_1p5b.py \
    --config.model.path=<folder> --config.task.path=<folder> --workdir=runs/ds

The recipe, its departures, the data and the hardware are those of
configs/lapo_r1_1p5b.py; the base, `model.path`, is another folder. The
paper's MATH-500 goes from 85.8 % and 3,280 tokens to 86.3 % and 2,168.

The argument is the method: `configs/lapo_deepscaler_1p5b.py:accuracy` is the
control.
"""

from configs import lapo_r1_1p5b


def get_config(argument=''):
  config = lapo_r1_1p5b.get_config(argument)
  config.model.path = 'DeepScaleR-1.5B-Preview'
  return config
