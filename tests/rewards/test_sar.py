# SPDX-License-Identifier: Apache-2.0
"""SAR by hand, and its second forward pass with a real model and tokenizer."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from lapo_jax import grpo, rollout, sharding, tokenizer, types
from lapo_jax.rewards import sar


def test_alignment_by_hand():
  mask = np.array([[1, 1, 0]] * 4 + [[0, 0, 0]], bool)
  given = np.array([[-1, -1, 9], [-2, -4, 9], [-1, -2, 9], [-9, -9, 9],
                    [9, 9, 9]], np.float32)
  alone = np.array([[-2, -2, 0], [-3, -3, 0], [-1, -1, 0], [-1, -1, 0],
                    [0, 0, 0]], np.float32)
  # ppl(a|q)/ppl(a) = e^(mean given lost): e⁻¹; e⁰; e^½; e⁸, cut at −1; none.
  np.testing.assert_allclose(
      sar.self_alignment(given, alone, mask),
      [0.6321206, 0, -0.6487213, -1, 0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('correct', [[1, 0], [1, 1], [0, 0]])
def test_reward_by_hand(correct):
  correct, lengths = np.array([correct]), np.array([[7, 7]])
  found = sar.reward(correct, lengths, np.array([[0.5, -1]], np.float32))
  np.testing.assert_allclose(found, correct + np.array([[0.1, -0.2]]),
                             rtol=1e-6)


@pytest.fixture(scope='module')
def scored(tiny_model, tiny_params):
  """Four completions of two prompts, and the policy's own log-probs."""
  rng = np.random.default_rng(0)
  tokens = jnp.asarray(rng.integers(1, 64, (4, 5)), jnp.int32)
  mask = jnp.array([5, 3, 4, 1])[:, None] > jnp.arange(5)[None, :]
  prompts = jnp.repeat(jnp.asarray(rng.integers(1, 64, (2, 6)), jnp.int32), 2,
                       axis=0)
  score = functools.partial(
      grpo.make_score_fn(tiny_model, temperature=1.0, microbatch_size=2),
      tiny_params)
  record = types.Rollout(prompts, jnp.ones((4, 6), bool), tokens, mask, mask,
                         jnp.zeros((4, 5)))
  return record.replace(sampler_logprobs=score(record)), score


def test_the_same_prompt_again_gives_nothing(scored):
  record, score = scored
  same = lambda examples, indices: types.Prompts(
      record.prompt_tokens, record.prompt_mask, jnp.asarray(indices),
      jnp.zeros(len(examples), jnp.int32))
  found = sar.make().measure(record, score, same)['self_alignment']
  np.testing.assert_allclose(found, np.zeros(4), atol=1e-5)


def test_the_empty_question_with_a_real_tokenizer(scored, model_folder,
                                                  outcomes):
  record, score = scored
  place = sharding.replicated(sharding.make_mesh(data=1, fsdp=-1))
  encode = rollout.make_encode_fn(
      tokenizer.load(model_folder), '##{question}#', 64,
      types.Prompts(place, place, place, place))
  # The toy's tokens are bytes beyond the tiny model's vocabulary: fold them.
  fold = lambda r: r.replace(prompt_tokens=r.prompt_tokens % 64)
  method = sar.make()
  found = method.measure(record, lambda r: score(fold(r)), encode)
  # By the book: the template without a question, the same tokens, means.
  empty = encode([types.Example('', '')] * 4, [0] * 4)
  assert int(empty.mask[0].sum()) == 3
  alone = np.asarray(score(fold(record.replace(
      prompt_tokens=empty.tokens, prompt_mask=empty.mask))))
  given, lengths = np.asarray(record.sampler_logprobs), [5, 3, 4, 1]
  expected = [np.clip(1 - np.exp(-given[b, :n].mean()) /
                      np.exp(-alone[b, :n].mean()), -1, 1)
              for b, n in enumerate(lengths)]
  np.testing.assert_allclose(found['self_alignment'], expected, rtol=1e-4,
                             atol=1e-5)
  assert np.abs(expected).max() > 1e-3
  graded = outcomes([[1, 0], [0, 1]], [[5, 3], [4, 1]]).replace(
      extras={'self_alignment': found['self_alignment'].reshape(2, 2)})
  rewards, _ = method.apply(graded, ())
  np.testing.assert_allclose(
      rewards.terms['alignment'], 0.2 * np.reshape(expected, (2, 2)),
      rtol=1e-3, atol=1e-5)
