# SPDX-License-Identifier: Apache-2.0
"""Rounds of a step: what teaches nothing is drawn anew, the rest stays."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import config as toy_config

from lapo_jax import groups, ops, rollout, train, types

P, G, T = 3, 2, 5


@pytest.fixture(scope='module', autouse=True)
def cache(compile_cache):
  """Every run here compiles the same few programs."""
  return compile_cache


def test_later_turns_draw_what_was_not():
  first = rollout.choose(20, 6, 4, 0)
  second = rollout.choose(20, 6, 4, 0, 1, first)
  third = rollout.choose(20, 6, 4, 0, 2, np.append(first, second))
  drawn = np.concatenate([first, second, third])
  assert len(set(drawn.tolist())) == 18
  # Two are left: too few for a round.
  assert len(rollout.choose(20, 6, 4, 0, 3, drawn)) == 0
  # A function of (seed, step, turn): the same again, and others elsewhere.
  np.testing.assert_array_equal(second, rollout.choose(20, 6, 4, 0, 1, first))
  for other in (rollout.choose(20, 6, 4, 1, 1, first),
                rollout.choose(20, 6, 5, 0, 1, first)):
    assert not np.array_equal(second, other)


def test_the_cap_swings():
  # L(0) = Lmax, L(T/2) = Lmin, and a quarter between.
  cap = lambda step: rollout.cap(step, 16384, least=8192, steps=640)
  assert [cap(step) for step in (0, 160, 320, 480, 640)] == [
      16384, 12288, 8192, 12288, 16384]
  assert rollout.cap(7, 300, least=0, steps=0) == 300


def rows(width, offset):
  """A record of P groups whose numbers tell where they come from."""
  number = offset + np.arange(P * G)
  tokens = jnp.asarray(np.tile(number[:, None], (1, T)), jnp.int32)
  return types.Rollout(
      prompt_tokens=jnp.asarray(np.tile(number[:, None], (1, width))),
      prompt_mask=jnp.ones((P * G, width), bool), completion_tokens=tokens,
      completion_mask=tokens > 0, action_mask=tokens > 0,
      sampler_logprobs=-tokens.astype(jnp.float32))


def test_groups_of_two_rounds_are_taken_whole():
  found = groups.take(rows(2, 0), rows(4, 100), np.array([0, 4, 2]))
  assert found.completion_tokens[:, 0].tolist() == [0, 1, 102, 103, 4, 5]
  # Prompts of fewer slots lie to the right.
  assert found.prompt_tokens.shape == (P * G, 4)
  assert found.prompt_tokens[1].tolist() == [0, 0, 1, 1]
  assert found.prompt_mask[1].tolist() == [False, False, True, True]
  assert found.prompt_tokens[2].tolist() == [102] * 4


def test_what_is_cut_is_padding():
  samples = rows(2, 1)
  found = groups.cut(samples, jnp.array([5, 2, 5, 5, 0, 1]), 9)
  assert found.completion_tokens[1].tolist() == [2, 2, 9, 9, 9]
  assert ops.to_batch(found.completion_mask.sum(-1)[None]).tolist() == [
      5, 2, 5, 5, 0, 1]
  np.testing.assert_array_equal(found.action_mask, found.completion_mask)
  assert not np.asarray(found.sampler_logprobs)[~found.completion_mask].any()


@pytest.fixture
def run(model_folder, tmp_path):
  """Trains the toy config; its metrics, step by step, and its folder."""

  def run(argument='accuracy', name='run', spy=lambda one: one, **overrides):
    config = toy_config.get_config(argument)
    config.model.path = model_folder
    config.stages = ()
    config.lock()
    config.update_from_flattened_dict(
        {'total_steps': 2, **{key.replace('__', '.'): value
                              for key, value in overrides.items()}})
    folder = str(tmp_path / name)
    state = train.train([spy(one) for one in train.prepare(config, folder)],
                        folder)
    lines = (tmp_path / name / 'metrics.jsonl').read_text().splitlines()
    steps = [line for line in map(json.loads, lines) if 'update/loss' in line]
    return steps, state, config

  return run


def test_rounds_fill_the_batch(run):
  plain, _, _ = run(name='plain')
  filled, _, _ = run(rollout__refill_rounds=2)
  assert [line['rollout/rounds'] for line in plain] == [1, 1]
  assert plain[0]['advantage/zero_groups'] > 0
  assert 1 < filled[0]['rollout/rounds'] <= 3
  assert (filled[0]['advantage/zero_groups'] <
          plain[0]['advantage/zero_groups'])
  # Groups all right or all wrong are redrawn whatever a method pays them.
  paid, _, _ = run('kimi', name='kimi', rollout__refill_rounds=2)
  assert paid[0]['rollout/rounds'] == filled[0]['rollout/rounds']


def test_problems_that_are_drawn_again_are_remembered(run):
  rounds = []

  def spy(one):
    def replicate(tree):
      if isinstance(tree, types.Outcomes):
        rounds.append(jax.device_get(tree))
      return one.replicate(tree)
    return one._replace(replicate=replicate)

  # In groups of two are many all right, which are drawn again.
  steps, state, config = run('lapo', spy=spy, rollout__refill_rounds=2,
                             rollout__group_size=2)
  assert len(rounds) == sum(line['rollout/rounds'] for line in steps) > 2
  size = len(state.reward_state['target'])
  expected = np.full(size, config.rollout.max_completion_length, np.float32)
  solved = 0
  for found in rounds:
    for index, correct, lengths in zip(found.prompt_index, found.correct,
                                       found.lengths, strict=True):
      good = lengths[correct > 0.5]
      solved += len(good) == len(lengths)
      expected[index] = (np.median(good) if len(good) else
                         config.rollout.max_completion_length)
  np.testing.assert_array_equal(state.reward_state['target'], expected)
  assert solved


def test_noise_is_new_at_each_step_and_round_and_of_the_whole_policy(
    run, monkeypatch):
  problems, drawn = np.arange(8), []
  # The same problems and the same policy, so that only the noise can differ.
  monkeypatch.setattr(rollout, 'choose', lambda *args: problems)

  def spy(one):
    def sample(*args, **kwargs):
      # No top-p or top-k: it would train another distribution.
      assert kwargs.keys() == {'budgets', 'watch'}
      found = one.sample(*args, **kwargs)
      drawn.append(np.asarray(found.completion_tokens))
      return found
    return one._replace(sample=sample)

  # Groups of two are seldom all mixed: both steps have two rounds.
  steps, _, _ = run(spy=spy, rollout__refill_rounds=1, rollout__group_size=2,
                    rollout__temperature=0.5, optimizer__learning_rate=0.0)
  assert len(drawn) == 4
  for i, one in enumerate(drawn):
    for other in drawn[:i]:
      assert not (one[:, 0] == other[:, 0]).all()
      assert np.mean((one == other).all(-1)) < 0.5
  # The scorer's policy is the sampler's, at a temperature that is not 1.
  for line in steps:
    assert abs(line['policy/sampler_ratio_max'] - 1) < 1e-3


def test_rounds_may_name_other_grades(run, monkeypatch):
  graded = rollout.grade
  names = iter(['unit', 'parsed', 'unit'])

  def grade(*args):
    found = graded(*args)
    if found.outcomes.correct.shape[1] == 1:  # evaluated
      return found
    return found._replace(outcomes=found.outcomes.replace(
        extras={next(names): jnp.ones_like(found.outcomes.correct)}))

  monkeypatch.setattr(rollout, 'grade', grade)
  steps, _, _ = run(rollout__refill_rounds=2, rollout__group_size=2,
                    total_steps=1)
  assert steps[0]['rollout/rounds'] > 1


def test_the_reference_that_waits_leaves_the_devices(run):
  counts = {}

  def spy(one):
    shape = one.state_shapes.params['embedding'].shape
    away = one.config.updates.offload_reference

    def update(*args):
      counts[away] = len([x for x in jax.live_arrays() if x.shape == shape
                          and x.sharding.memory_kind == 'device'])
      return one.update(*args)

    return one._replace(update=update)

  for away in (False, True):
    run(spy=spy, name=f'away {away}', total_steps=1, loss__kl_coef=0.1,
        updates__offload_reference=away)
  assert counts[True] == counts[False] - 1


def test_what_a_method_cuts_is_graded_and_trained_on_as_cut(run, monkeypatch):
  seen = []
  graded = rollout.regrade

  def regrade(before, samples, *rest):
    after = graded(before, samples, *rest)
    seen.append((before.outcomes, samples, after))
    return after

  outcomes, batches = [], []

  def spy(one):
    def replicate(tree):
      if isinstance(tree, types.Outcomes):
        outcomes.append(jax.device_get(tree))
      return one.replicate(tree)

    def make_batch(*args):
      batches.append(one.make_batch(*args))
      return batches[-1]

    return one._replace(replicate=replicate, make_batch=make_batch)

  monkeypatch.setattr(rollout, 'regrade', regrade)
  # At α below 0 groups that are all correct lose what is above the least.
  run('dot', spy=spy, reward__alpha=-1.0, reward__slack=1,
      rollout__group_size=2, loss__drop_truncated=True)
  cut = 0
  for before, samples, after in seen:
    lengths = np.asarray(after.outcomes.lengths)
    np.testing.assert_array_equal(
        lengths.reshape(-1), jax.device_get(samples.completion_mask).sum(-1))
    cut += (lengths < np.asarray(before.lengths)).sum()
    whole = np.asarray(before.correct).all(-1)
    assert np.all((lengths == before.lengths)[~whole])
    np.testing.assert_array_equal(after.outcomes.truncated, before.truncated)
  assert cut
  for found, batch in zip(outcomes, batches, strict=True):
    # What was cut has ended all the same: only the truncated leave the loss.
    assert found.truncated.any()
    np.testing.assert_array_equal(np.asarray(batch.weights).any(-1),
                                  (~found.truncated & (found.lengths > 0)
                                   ).reshape(-1))


def test_silent_tokens_move_nothing(run):
  norm = lambda share: run('sas', f'share {share}', reward__delimiter='e',
                           reward__share=share)[0][0]['update/grad_norm']
  # Now and then a random completion ends its thinking, and answers.
  assert norm(1.0) < norm(0.0) / 3


def test_forced_tokens_are_no_actions(run, monkeypatch):
  seen = []
  graded = rollout.grade
  monkeypatch.setattr(rollout, 'grade', lambda samples, *rest: (
      seen.append(jax.device_get(samples)), graded(samples, *rest))[1])
  run(rollout__forced__first='a', rollout__forced__end='b',
      # What no limit asks for need not be a token.
      rollout__forced__wait='Wait', rollout__forced__most=4, total_steps=1,
      rollout__cap_cycle__least=8, rollout__cap_cycle__steps=2)
  base = seen[0]  # evaluated; then 8 prompts of 4 completions
  samples = next(x for x in seen if len(x.completion_mask) == 32)
  forced = samples.completion_mask & ~samples.action_mask
  # The first of every other completion, and where thinking lasts too long.
  assert forced.reshape(-1, 4, 16)[:, :2, 0].all()
  assert forced.reshape(-1, 4, 16)[:, 2:, 4].any()
  assert not forced.reshape(-1, 4, 16)[:, 2:, :4].any()
  assert not (base.completion_mask & ~base.action_mask)[:, :4].any()
