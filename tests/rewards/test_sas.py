# SPDX-License-Identifier: Apache-2.0
"""SAS by hand: which steps are silent."""

import numpy as np
import pytest

from lapo_jax import types
from lapo_jax.rewards import sas

# Ten steps of one token: confidences −0, −1, … −9, step 7 the least but two.
STEPS = np.array([[*range(10), -1, -1]] * 2, np.int32)
LOGPROBS = -np.array([[*range(10), 50, 50]] * 2, np.float32)


def test_unsure_of_right_and_sure_of_wrong():
  found = np.asarray(sas.trained(LOGPROBS, STEPS, np.array([1, 0])))
  # ⌈0.3 · 10⌉ = 3 of either; the answer is trained on whatever it is.
  assert found[0].tolist() == [True] * 7 + [False] * 3 + [True] * 2
  assert found[1].tolist() == [False] * 3 + [True] * 9


def test_a_step_is_as_sure_as_its_tokens_on_average():
  logprobs = np.array([[-1, -5, -2, -2, -4, 0]], np.float32)
  steps = np.array([[0, 0, 1, 1, 2, -1]], np.int32)  # −3, −2, −4
  found = np.asarray(sas.trained(logprobs, steps, np.ones(1), share=0.5))
  assert found.tolist() == [[False, False, True, True, False, True]]
  found = np.asarray(sas.trained(logprobs, steps, np.ones(1), share=0.0))
  assert found.all()


def test_what_the_released_code_does():
  found = np.asarray(sas.trained(LOGPROBS, STEPS, np.array([1, 0]),
                                 answer_only=True))
  assert found[0].tolist() == [False] * 10 + [True] * 2
  assert found[1].all()


def test_steps_lie_between_blank_lines():
  vocabulary = ['<pad>', 'so', '\n\n', '.\n', '\nthen', '</think>', '7', '\n']
  split = sas.make_steps_fn(vocabulary)
  tokens = np.array([[1, 6, 2, 1, 3, 4, 1, 3, 1, 5, 1, 2, 6],
                     [2, 1, 2, 7, 1, 0, 0, 0, 0, 0, 0, 0, 0]], np.int32)
  mask = np.arange(13) < np.array([[13], [5]])
  steps = np.asarray(split(tokens, mask))
  # '.\n' '\nthen' is a blank line in two tokens, '.\n' 'so' is none.
  assert steps[0].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, -1, -1, -1, -1]
  # A delimiter at the start ends a step, a longer one does not begin another.
  assert steps[1].tolist() == [0, 1, 1, 1, 2] + [-1] * 8


def test_the_plug(outcomes):
  vocabulary = ['<pad>', 'a', ';', '</think>']
  tokens = np.array([[1, 2, 1, 3, 1], [1, 2, 1, 2, 1]], np.int32)
  mask = np.ones((2, 5), bool)
  logprobs = np.array([[-1, -1, -2, -9, -9], [-1, -1, -2, -2, -5]], np.float32)
  rollout = types.Rollout(
      prompt_tokens=tokens, prompt_mask=mask, completion_tokens=tokens,
      completion_mask=mask, action_mask=mask, sampler_logprobs=logprobs)
  method = sas.make(delimiter=';')
  found = method.mute(vocabulary)(rollout, np.array([1.0, 0.0]))
  assert np.asarray(found).tolist() == [[True, True, False, True, True],
                                        [False, False, True, True, True]]
  rewards, _ = method.apply(outcomes([[1, 0]], [[5, 5]]), ())
  assert rewards.total.tolist() == [[1.0, 0.0]]


def test_settings_are_checked():
  with pytest.raises(ValueError, match='share is 2'):
    sas.make(share=2.0)
