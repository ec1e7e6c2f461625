# SPDX-License-Identifier: Apache-2.0
"""Slots that are refilled change no completion, and are seldom idle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import pooled

from lapo_jax import decoding, grpo, pools, sampling, sharding, slots, types
from lapo_jax.models import qwen2

P, G, CAP, EOS = 6, 4, 80, (1, 2)
ROWS = P * G
# A part of a page, one token, nothing, a page and a little, a page, half one.
LENGTHS = np.array([40, 1, 0, 70, 64, 32])


def make_prompts(lengths=LENGTHS, slots_=72):
  rng = np.random.default_rng(0)
  mask = np.arange(slots_) >= slots_ - lengths[:, None]
  tokens = np.where(mask, rng.integers(3, 64, mask.shape), 1)
  return types.Prompts(
      tokens=tokens.astype(np.int32), mask=mask,
      index=np.arange(len(lengths), dtype=np.int32),
      target_lengths=np.zeros(len(lengths), np.int32))


def host(tree):
  return jax.tree.map(np.asarray, tree)


def make(model, **how):
  settings = dict(group_size=G, max_completion_length=CAP, eos_ids=EOS,
                  pad_id=1) | how
  return sampling.make_sample_fn(model, **settings)


def assert_same(a, b, atol=1e-5):
  np.testing.assert_array_equal(a.completion_tokens, b.completion_tokens)
  np.testing.assert_array_equal(a.completion_mask, b.completion_mask)
  np.testing.assert_allclose(a.sampler_logprobs, b.sampler_logprobs, atol=atol)


@pytest.fixture(scope='module')
def budgets():
  return np.random.default_rng(1).integers(1, CAP + 1, ROWS).astype(np.int32)


@pytest.fixture(scope='module')
def all_at_once(tiny_model, tiny_params, budgets):
  return host(make(tiny_model)(
      tiny_params, make_prompts(), jax.random.key(3), 1.0, budgets=budgets))


@pytest.mark.parametrize('num_slots', [1, 5, 16, 1000])
def test_the_number_of_slots_changes_nothing(
    tiny_model, tiny_params, budgets, all_at_once, num_slots):
  seen = []
  rollout = host(make(tiny_model, num_slots=num_slots)(
      tiny_params, make_prompts(), jax.random.key(3), 1.0, budgets=budgets,
      watch=seen.append))
  assert_same(rollout, all_at_once)
  assert seen[0].num_slots == min(num_slots, ROWS)
  assert max(p.num_slots for p in seen) == min(num_slots, ROWS)


@pytest.fixture
def in_a_pool(monkeypatch):
  """Pages lie as for a TPU's kernel, and XLA reads them."""
  monkeypatch.setattr(pools, 'has_kernel',
                      lambda shape, dtype, backend: backend != 'xla')
  monkeypatch.setattr(pools, 'attend', pooled.attend)


@pytest.mark.parametrize('num_slots', [1, 7])
def test_a_pool_of_pages_changes_nothing(
    tiny_model, tiny_params, budgets, all_at_once, in_a_pool, num_slots):
  rollout = host(make(tiny_model, num_slots=num_slots)(
      tiny_params, make_prompts(), jax.random.key(3), 1.0, budgets=budgets))
  assert_same(rollout, all_at_once)


def test_shards_have_pools_of_their_own(tiny_model, tiny_params, budgets,
                                        all_at_once, in_a_pool):
  # Two devices have a head each of every token in the last.
  shards_have_queues_of_their_own(
      tiny_model, tiny_params, budgets, all_at_once,
      [dict(data=2), dict(data=2, tensor=2)])


def test_data_shards_have_queues_of_their_own(tiny_model, tiny_params, budgets,
                                              all_at_once):
  shards_have_queues_of_their_own(
      tiny_model, tiny_params, budgets, all_at_once,
      [dict(data=2), dict(data=3, tensor=2)])


def shards_have_queues_of_their_own(tiny_model, tiny_params, budgets,
                                    all_at_once, meshes):
  for axes in meshes:
    count = int(np.prod(list(axes.values())))
    mesh = sharding.make_mesh(**axes, fsdp=1, devices=jax.devices()[:count])
    batch, everywhere = sharding.batch(mesh), sharding.replicated(mesh)
    places = types.Prompts(tokens=batch, mask=batch, index=everywhere,
                           target_lengths=everywhere)
    params = sharding.for_sampling(sharding.partition(
        qwen2.PARTITION_RULES, qwen2.init_shapes(tiny_model), mesh))
    seen = []
    rollout = make(tiny_model, num_slots=6, shardings=(params, places, batch))(
        sharding.to_global(tiny_params, params),
        sharding.to_global(make_prompts(), places), jax.random.key(3), 1.0,
        budgets=budgets, watch=seen.append)
    assert_same(host(rollout), all_at_once)
    rows = np.concatenate([p.finished for p in seen])
    assert sorted(rows) == list(range(ROWS))


def test_each_completion_ends_at_its_budget(all_at_once, budgets):
  lengths = all_at_once.completion_mask.sum(-1)
  last = np.take_along_axis(all_at_once.completion_tokens,
                            lengths[:, None] - 1, 1)[:, 0]
  assert np.all(lengths <= budgets)
  assert np.all((lengths == budgets) | np.isin(last, EOS))
  assert (lengths == budgets).any() and (lengths < budgets).any()


def test_log_probs_are_the_scored_ones_and_an_empty_prompt_is_its_pad(
    tiny_model, tiny_params, all_at_once):
  assert all_at_once.prompt_mask.sum(-1)[::G].tolist() == [40, 1, 1, 70, 64, 32]
  score = grpo.make_score_fn(tiny_model, temperature=1.0, microbatch_size=4)
  np.testing.assert_allclose(score(tiny_params, all_at_once),
                             all_at_once.sampler_logprobs, atol=1e-4)


def test_a_row_has_its_own_temperature_and_truncation(tiny_model, tiny_params):
  sample = make(tiny_model, num_slots=7, max_completion_length=12)
  ask = lambda *how: host(sample(tiny_params, make_prompts(),
                                 jax.random.key(3), *how))
  kinds = [(1.0, 1.0, 0), (0.0, 1.0, 0), (0.7, 0.5, 0), (1.3, 0.9, 3)]
  which = np.arange(ROWS) % len(kinds)
  mixed = ask(*(np.array(x)[which] for x in zip(*kinds, strict=True)))
  for kind, how in enumerate(kinds):
    rows = which == kind
    pick = lambda tree, rows=rows: jax.tree.map(lambda x: x[rows], tree)
    assert_same(pick(mixed), pick(ask(*how)))


def test_other_numbers_compile_nothing(tiny_model, tiny_params, caplog):
  # Without stop tokens lengths are the budgets, the same each time.
  sample = make(tiny_model, num_slots=8, eos_ids=())
  ask = lambda *how, **more: jax.block_until_ready(sample(
      tiny_params, make_prompts(), jax.random.key(3), *how, **more))
  compiled = lambda: [line for line in caplog.messages if 'ompiling' in line]
  with jax.log_compiles():
    ask(1.0)
    assert any('decode' in line for line in compiled())
    caplog.clear()
    ask(0.5, 0.9, 4)
    ask(np.linspace(0, 1, ROWS), budgets=np.full(ROWS, CAP))
    ask(0.0, budgets=CAP)
  assert not compiled()


def test_when_the_host_looks_in_changes_nothing(
    tiny_model, tiny_params, budgets, all_at_once, monkeypatch):
  monkeypatch.setattr(decoding, 'CHUNK', 7)
  monkeypatch.setattr(slots, 'AHEAD', 1)
  monkeypatch.setattr(sampling, 'PAGE', 16)
  seen = []
  rollout = host(make(tiny_model, num_slots=7)(
      tiny_params, make_prompts(), jax.random.key(3), 1.0, budgets=budgets,
      watch=seen.append))
  assert_same(rollout, all_at_once)
  steps = np.diff([0, *(p.steps for p in seen)])
  assert steps.max() == 7


@pytest.mark.parametrize('budget', [
    1, sampling.PAGE - 1, sampling.PAGE, sampling.PAGE + 1])
def test_all_rows_stop_at_once(tiny_model, tiny_params, budget):
  rollout = host(make(tiny_model, eos_ids=(), num_slots=8)(
      tiny_params, make_prompts(), jax.random.key(0), 1.0,
      budgets=np.int32(budget)))
  assert np.all(rollout.completion_mask.sum(-1) == budget)


def test_slots_are_busy_until_the_queue_is_empty(tiny_model, tiny_params):
  lengths = np.clip(np.random.default_rng(0).lognormal(2.5, 1.0, 200),
                    1, 300).astype(np.int32)
  seen = []
  make(tiny_model, eos_ids=(), group_size=20, num_slots=16,
       max_completion_length=300)(
           tiny_params, make_prompts(np.full(10, 4), 4), jax.random.key(0),
           1.0, budgets=lengths, watch=seen.append)
  full = [p for p in seen if p.waiting][-1]
  assert full.busy >= 0.9 * 16 * full.steps
  assert seen[-1].busy == lengths.sum()
  # In the end few rows are left, and few slots.
  assert seen[-1].num_slots <= 4


def test_the_cache_is_what_is_live_not_the_cap(tiny_model, tiny_params):
  def most(cap):
    seen = []
    make(tiny_model, eos_ids=(), num_slots=8, max_completion_length=cap)(
        tiny_params, make_prompts(np.full(P, 4), 4), jax.random.key(0), 1.0,
        budgets=np.int32(60), watch=seen.append)
    return max(p.cache_bytes for p in seen), [p.steps for p in seen]

  short, steps = most(64)
  assert (short, steps) == most(4096)
  layers, heads, width = tiny_model.cache_shape()
  token = 2 * layers * heads * width * 4
  # Eight slots of two pages, one to spare for each, and the prompts.
  assert short <= token * sampling.PAGE * (8 * 3 + 8)


def test_finished_rows_can_be_read_early(tiny_model, tiny_params, budgets,
                                         all_at_once):
  found = {}

  def watch(progress):
    rows, tokens, lengths = progress.read()
    assert sorted(rows) == sorted(progress.finished)
    found.update(zip(rows, zip(tokens, lengths, strict=True), strict=True))

  make(tiny_model, num_slots=5)(
      tiny_params, make_prompts(), jax.random.key(3), 1.0, budgets=budgets,
      watch=watch)
  assert sorted(found) == list(range(ROWS))
  for row, (tokens, length) in found.items():
    np.testing.assert_array_equal(tokens, all_at_once.completion_tokens[row])
    assert length == all_at_once.completion_mask[row].sum()


def test_an_int8_cache_stays_near(tiny_model, tiny_params, budgets):
  # Scored by the same model: what the sampler drew, it drew with nearly
  # these log-probs.
  rollout = host(make(tiny_model, cache_dtype='int8', num_slots=7)(
      tiny_params, make_prompts(), jax.random.key(3), 1.0, budgets=budgets))
  score = grpo.make_score_fn(tiny_model, temperature=1.0, microbatch_size=4)
  gap = np.abs(score(tiny_params, rollout) - rollout.sampler_logprobs)
  assert 1e-6 < gap.max() < 0.05


def test_a_bfloat16_sampler_has_float32_log_probs(tiny_model, tiny_params):
  half = tiny_model.clone(dtype=jnp.bfloat16)
  params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), tiny_params)
  rollout = host(make(half, num_slots=7)(params, make_prompts(),
                                         jax.random.key(3), 1.0))
  assert rollout.sampler_logprobs.dtype == np.float32
  score = grpo.make_score_fn(tiny_model, temperature=1.0, microbatch_size=4)
  gap = np.abs(score(tiny_params, rollout) - rollout.sampler_logprobs)
  assert 1e-6 < gap.max() < 0.2


# ---- The host's part.


@pytest.mark.parametrize('count, want', [
    (1, 1), (2, 2), (3, 4), (5, 8), (9, 16), (17, 32), (32, 32), (33, 48),
    (49, 64), (65, 96), (97, 128), (1000, 1024), (1025, 1536)])
def test_sizes_come_from_a_short_series(count, want):
  assert slots.size(count) == want


def test_prompts_of_like_lengths_are_prefilled_together():
  lengths = np.array([[100, 3, 64, 0, 33, 31]])
  store = slots.make_store(lengths, 32)
  assert store.counts.tolist() == [[4, 1, 2, 0, 2, 1]]
  batches = slots.prefill_batches(store, num_pages=4)
  assert [pages.shape for _, pages in batches] == [
      (1, 1, 4), (1, 2, 2), (1, 4, 1)]
  assert [prompts.tolist() for prompts, _ in batches] == [
      [[0]], [[2, 4]], [[1, 5, 3, 6]]]
  used = np.concatenate([pages.ravel() for _, pages in batches])
  # Each page of the store once; what lies behind it drops the rest.
  assert sorted(used[used < store.size]) == list(range(10))
