# SPDX-License-Identifier: Apache-2.0
"""What is forced is written, is no action, and changes nothing before it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lapo_jax import forcing, grpo, sampling, types

END, WAIT, EOS = 5, 6, 1
WORDS = forcing.Words(END, WAIT)
P, G, CAP = 3, 4, 24
ROWS = P * G


def prompts():
  tokens = np.random.default_rng(0).integers(7, 64, (P, 6)).astype(np.int32)
  return types.Prompts(tokens=tokens, mask=np.ones((P, 6), bool),
                       index=np.arange(P, dtype=np.int32),
                       target_lengths=np.zeros(P, np.int32))


@pytest.fixture(scope='module')
def sample(tiny_model, tiny_params):
  make = lambda words: sampling.make_sample_fn(
      tiny_model, group_size=G, max_completion_length=CAP, eos_ids=(EOS,),
      pad_id=0, num_slots=5, forced_words=words)
  programs = {words: make(words) for words in (None, WORDS)}

  def run(words=WORDS, first=-1, least=0, most=CAP):
    each = lambda x: jnp.broadcast_to(jnp.asarray(x, jnp.int32), ROWS)
    limits = forcing.Limits(each(first), each(least), each(most))
    return jax.device_get(programs[words](
        tiny_params, prompts(), jax.random.key(0), 1.0,
        **({} if words is None else {'forced': limits})))

  return run


def test_one_step_by_hand():
  limits = forcing.Limits(*jnp.array([[END, -1, -1, -1, -1, -1],
                                      [9, 9, 9, 0, 0, 0],
                                      [99, 99, 99, 3, 3, 3]]))
  drawn = jnp.array([20, END, EOS, 20, END, 20])
  t = jnp.array([0, 4, 4, 3, 3, 3])
  thinking = jnp.array([True, True, True, True, True, False])
  tokens, own, goes_on = forcing.force(WORDS, limits, drawn, t, thinking,
                                       (EOS,))
  assert tokens.tolist() == [END, WAIT, WAIT, END, END, 20]
  assert own.tolist() == [False, False, False, False, True, True]
  assert goes_on.tolist() == [False, True, True, False, False, False]


def test_without_limits_nothing_changes(sample):
  jax.tree.map(np.testing.assert_array_equal, sample(), sample(None))


def test_a_first_token_is_written_on_those_it_is_asked_of(sample):
  first = np.where(np.arange(ROWS) % 2, END, -1)
  rollout, free = sample(first=first), sample()
  assert np.all(rollout.completion_tokens[1::2, 0] == END)
  assert not rollout.action_mask[1::2, 0].any()
  assert not rollout.sampler_logprobs[1::2, 0].any()
  # The others are as they would be.
  np.testing.assert_array_equal(rollout.completion_tokens[::2],
                                free.completion_tokens[::2])
  np.testing.assert_array_equal(
      rollout.action_mask[:, 1:], rollout.completion_mask[:, 1:])


def test_thinking_lasts_as_long_as_it_may(sample):
  rollout = sample(most=7)
  for tokens, mask, actions in zip(
      rollout.completion_tokens, rollout.completion_mask, rollout.action_mask,
      strict=True):
    length = mask.sum()
    ends = np.flatnonzero((tokens[:length] == END) | (tokens[:length] == EOS))
    assert ends[0] <= 7
    forced = np.flatnonzero(mask & ~actions)
    assert forced.tolist() in ([], [7])
    assert np.all(tokens[forced] == END)


def test_thinking_lasts_as_long_as_it_must(sample):
  rollout, free = sample(least=20), sample()
  early = (free.completion_mask.sum(-1) < 20) & ~(
      free.completion_tokens == END).any(-1)
  assert early.any()
  stops = np.isin(rollout.completion_tokens, (END, EOS))
  assert not (stops & rollout.completion_mask)[:, :20].any()
  forced = rollout.completion_mask & ~rollout.action_mask
  assert np.all(rollout.completion_tokens[forced] == WAIT)
  assert forced[early].any(-1).all()


def test_log_probs_of_actions_are_the_scored_ones(tiny_model, tiny_params,
                                                  sample):
  rollout = sample(first=END, least=3, most=9)
  score = grpo.make_score_fn(tiny_model, temperature=1.0, microbatch_size=4)
  found = np.asarray(score(tiny_params, rollout))
  actions = rollout.action_mask
  np.testing.assert_allclose(found[actions], rollout.sampler_logprobs[actions],
                             atol=1e-4)
