# SPDX-License-Identifier: Apache-2.0
"""Words and numbers that no run can use are refused by name."""

import pytest

from configs import default
from lapo_jax import checks


@pytest.mark.parametrize('key, value, match', [
    ('kind', 'grpo', "loss.kind 'grpo'.*'gspo'"),
    ('kl', 'k4', "loss.kl 'k4'.*'k2'"),
    ('importance_level', 'row', "importance_level 'row'.*'sequence'"),
    ('importance_outside', 'drop', "importance_outside 'drop'.*'mask'"),
    ('importance_floor', 0.5, 'importance_floor 0.5.*cap 0.0'),
    ('importance_floor', -1.0, 'importance_floor -1.0'),
    ('dual_clip', 0.9, 'dual_clip 0.9.*such as 3'),
    ('dual_clip', float('nan'), 'dual_clip nan.*above 1'),
    ('kl_cov_share', 1.5, 'kl_cov_share 1.5: .* from 0 to 1'),
    ('kl_cov_share', float('nan'), 'kl_cov_share nan: .* from 0 to 1'),
    ('kl_cov_share', 0.1, 'kl_cov_share 0.1.*one update a batch'),
    ('rollout.temperature', -1.0, 'rollout.temperature -1.0: .* above 0'),
    ('eval.temperature', float('nan'), 'eval.temperature nan: .* from 0'),
    ('rollout.temperature', 0.0, 'rollout.temperature 0.0: .* above 0'),
    ('eval.num_examples', 0, 'eval.num_examples 0: .*at least 1'),
    ('eval.batch_size', -4, 'eval.batch_size -4: .*at least 1'),
    ('rollout.max_completion_length', 0, 'length 0: .*at least 1'),
    ('updates.num_minibatches', 0, 'num_minibatches 0: .*at least 1'),
    ('total_steps', -3, 'total_steps -3: .*at least 1'),
    ('seed', 2**40, 'seed 1099511627776: .*from 0 to'),
    ('optimizer.learning_rate', float('nan'), 'learning_rate nan: .*from 0'),
    ('optimizer.b1', 1.0, 'b1 1.0: .*below 1'),
    ('optimizer.b2', -0.1, 'b2 -0.1: .*below 1'),
    ('rollout.forced.least', -3, 'forced.least -3: .*at least 0'),
    ('rollout.forced.first_share', 1.5, 'first_share 1.5: .*from 0 to 1'),
    ('optimizer.clip_norm', -1.0, 'clip_norm -1.0: .*above 0'),
    ('grader.deadline', float('nan'), 'deadline nan: .*above 0'),
    ('reward.alpha', float('nan'), 'reward.alpha nan: expected a number'),
])
def test_what_a_config_may_not_ask(key, value, match):
  config = default.get_config()
  checks.choices(config)
  key = f'loss.{key}' if key in config.loss else key
  config.update_from_flattened_dict({key: value})
  with pytest.raises(ValueError, match=match):
    checks.choices(config)
