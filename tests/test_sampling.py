# SPDX-License-Identifier: Apache-2.0
"""A completion depends on its prompt and its key, and on nothing else."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lapo_jax import grpo, ops, sampling, sharding, types
from lapo_jax.models import qwen2

P, G, L = 8, 2, 6
# The pad token is a stop token, as in many tokenizers: masks that ask
# `ids != pad` lose the stop.
EOS, PAD = (1, 2), 1
# A page of 64 tokens and six of the next.
CAP, SHORT = 70, 20
LENGTHS = np.array([6, 1, 4, 6, 2, 3, 5, 6])


def make_prompts(lengths=LENGTHS, slots=L, seed=0, vocab_size=64):
  """Random prompts, the same tokens whatever the number of slots."""
  rng = np.random.default_rng(seed)
  tokens = np.zeros((len(lengths), slots), np.int32)
  for row, length in enumerate(lengths):
    tokens[row, slots - length:] = rng.integers(3, vocab_size, length)
  return types.Prompts(
      tokens=tokens, mask=np.arange(slots) >= slots - lengths[:, None],
      index=np.arange(len(lengths), dtype=np.int32),
      target_lengths=np.zeros(len(lengths), np.int32))


def host(tree):
  return jax.tree.map(np.asarray, tree)


def assert_same_completions(a, b):
  np.testing.assert_array_equal(a.completion_tokens, b.completion_tokens)
  np.testing.assert_array_equal(a.completion_mask, b.completion_mask)
  np.testing.assert_allclose(a.sampler_logprobs, b.sampler_logprobs, atol=1e-5)


@pytest.fixture(scope='module')
def sampler(tiny_model):
  return sampling.make_sample_fn(
      tiny_model, group_size=G, max_completion_length=CAP, eos_ids=EOS,
      pad_id=PAD)


@pytest.fixture(scope='module')
def short_sampler(tiny_model):
  return sampling.make_sample_fn(
      tiny_model, group_size=G, max_completion_length=SHORT, eos_ids=EOS,
      pad_id=PAD)


@pytest.fixture(scope='module')
def rollouts(sampler, tiny_params):
  """temperature -> Rollout of the same prompts and the same key."""
  return {temperature: host(sampler(tiny_params, make_prompts(),
                                    jax.random.key(3),
                                    jnp.float32(temperature)))
          for temperature in (0.0, 0.7, 1.0)}


@pytest.fixture(scope='module')
def short_rollout(short_sampler, tiny_params):
  return host(short_sampler(tiny_params, make_prompts(), jax.random.key(3),
                            jnp.float32(1.0)))


# ---- Against the scorer.


def test_greedy_takes_the_argmax_of_the_full_forward(tiny_model, tiny_params,
                                                     rollouts):
  rollout = rollouts[0.0]
  tokens = np.concatenate([rollout.prompt_tokens, rollout.completion_tokens], 1)
  mask = np.concatenate([rollout.prompt_mask, rollout.completion_mask], 1)

  @jax.jit
  def forward(params, tokens, mask):
    hidden, _ = tiny_model.apply({'params': params}, tokens,
                                 ops.positions_from_mask(mask), mask)
    return tiny_model.apply({'params': params}, hidden, method='unembed')

  logits = np.asarray(forward(tiny_params, tokens, mask))[:, L - 1:-1]
  chosen = np.take_along_axis(logits, rollout.completion_tokens[..., None],
                              -1)[..., 0]
  real = rollout.completion_mask
  np.testing.assert_allclose(chosen[real], logits.max(-1)[real], atol=1e-5)
  # Greedy completions of a prompt are all alike.
  np.testing.assert_array_equal(rollout.completion_tokens[::G],
                                rollout.completion_tokens[1::G])


@pytest.mark.parametrize('temperature', [1.0, 0.7, 0.0])
def test_sampled_log_probs_are_the_scored_ones(tiny_model, tiny_params,
                                               rollouts, temperature):
  score = grpo.make_score_fn(tiny_model, temperature=temperature,
                             microbatch_size=4)
  scored = np.asarray(score(tiny_params, rollouts[temperature]))
  np.testing.assert_allclose(scored, rollouts[temperature].sampler_logprobs,
                             atol=1e-4)
  assert scored[rollouts[temperature].completion_mask].max() < 0.0


# ---- The stop.


@pytest.mark.parametrize('temperature', [0.0, 0.7, 1.0])
def test_a_row_ends_with_its_stop_token_or_is_full(rollouts, temperature):
  rollout = rollouts[temperature]
  tokens, mask = rollout.completion_tokens, rollout.completion_mask
  np.testing.assert_array_equal(rollout.action_mask, mask)
  assert mask.dtype == bool and tokens.dtype == np.int32
  for row, real, logprobs in zip(tokens, mask, rollout.sampler_logprobs,
                                 strict=True):
    length = real.sum()
    assert length >= 1 and real[:length].all()
    assert not np.isin(row[:length - 1], EOS).any()
    assert length == CAP or row[length - 1] in EOS
    assert (row[length:] == PAD).all() and (logprobs[length:] == 0).all()


def test_the_sample_has_every_kind_of_row(rollouts):
  # Or the laws of this file would hold for want of a case.
  rollout = rollouts[1.0]
  lengths = rollout.completion_mask.sum(-1)
  last = np.take_along_axis(rollout.completion_tokens, lengths[:, None] - 1,
                            1)[:, 0]
  assert {1, 2} <= set(last.tolist())
  assert (lengths == CAP).any() and (lengths < 64).any()
  assert ((lengths == CAP) & ~np.isin(last, EOS)).any()


# ---- What a completion does not depend on.


def test_rows_are_groups_of_their_prompts(rollouts):
  prompts = make_prompts()
  for p in range(P):
    for g in range(G):
      b = p * G + g
      np.testing.assert_array_equal(rollouts[1.0].prompt_tokens[b],
                                    prompts.tokens[p])
      np.testing.assert_array_equal(rollouts[1.0].prompt_mask[b],
                                    prompts.mask[p])
  assert not np.array_equal(rollouts[1.0].completion_tokens[::G],
                            rollouts[1.0].completion_tokens[1::G])


def test_batch_mates_change_nothing(short_sampler, short_rollout, tiny_params):
  prompts, others = make_prompts(), make_prompts(np.roll(LENGTHS, 1), seed=9)
  keep = np.arange(P) == 3
  mixed = jax.tree.map(
      lambda x, y: np.where(keep.reshape(-1, *[1] * (x.ndim - 1)), x, y),
      prompts, others)
  rollout = host(short_sampler(tiny_params, mixed, jax.random.key(3),
                               jnp.float32(1.0)))
  rows = np.repeat(keep, G)
  pick = lambda tree: jax.tree.map(lambda x: x[rows], tree)
  assert_same_completions(pick(rollout), pick(short_rollout))
  assert not np.array_equal(rollout.completion_tokens[~rows],
                            short_rollout.completion_tokens[~rows])


def test_more_left_padding_changes_nothing(short_sampler, short_rollout,
                                           tiny_params):
  wider = host(short_sampler(tiny_params, make_prompts(slots=L + 5),
                             jax.random.key(3), jnp.float32(1.0)))
  assert_same_completions(wider, short_rollout)


def test_the_cap_only_cuts(rollouts, short_rollout):
  cut = jax.tree.map(lambda x: x[:, :SHORT], rollouts[1.0])
  assert_same_completions(cut, short_rollout)


@pytest.mark.parametrize('axes', [
    dict(data=8), dict(fsdp=2, sequence=2, tensor=2)], ids=str)
def test_eight_devices_write_the_tokens_of_one(tiny_model, tiny_params,
                                               short_rollout, axes):
  mesh = sharding.make_mesh(**axes)
  batch, everywhere = sharding.sampling_batch(mesh), sharding.replicated(mesh)
  places = types.Prompts(tokens=batch, mask=batch, index=everywhere,
                         target_lengths=everywhere)
  params = sharding.for_sampling(sharding.partition(
      qwen2.PARTITION_RULES, qwen2.init_shapes(tiny_model), mesh))
  sample = sampling.make_sample_fn(
      tiny_model, group_size=G, max_completion_length=SHORT, eos_ids=EOS,
      pad_id=PAD, shardings=(params, places, batch))
  rollout = sample(sharding.to_global(tiny_params, params),
                   sharding.to_global(make_prompts(), places),
                   jax.random.key(3), np.float32(1.0))
  assert all(x.sharding.is_equivalent_to(batch, x.ndim)
             for x in jax.tree.leaves(rollout))
  assert_same_completions(host(rollout), short_rollout)


def test_the_key_alone_decides(short_sampler, short_rollout, tiny_params):
  ask = lambda seed: host(short_sampler(
      tiny_params, make_prompts(), jax.random.key(seed), jnp.float32(1.0)))
  again, other = ask(3), ask(4)
  jax.tree.map(np.testing.assert_array_equal, again, short_rollout)
  differs = again.completion_tokens != other.completion_tokens
  assert differs.any(axis=1).all()


# ---- Models whose logits are written down.


class Scripted:
  """A model whose logits are a function of (tokens, positions, seen).

  `seen` is how many tokens attention finds, the new one included.
  """

  dtype = jnp.float32

  def __init__(self, logits_fn):
    self.logits_fn = logits_fn
    self.traced = 0

  def cache_shape(self):
    return 1, 1, 1

  def apply(self, variables, *args, cache=None, method=None):
    del variables
    self.traced += 1
    if method == 'unembed':
      return args[0]
    tokens, positions = args
    # Queries of zero weigh all alike: the mean of a one among zeros.
    first = (positions == 0).astype(jnp.float32)[..., None, None]
    mean, cache = cache.attend(0 * first, 0 * first, first)
    seen = jnp.round(1 / jnp.maximum(mean[..., 0, 0], 1e-6)).astype(jnp.int32)
    return self.logits_fn(tokens, positions, seen), cache


def one_hot(tokens, vocab_size):
  """Logits that leave no choice."""
  return 100.0 * jax.nn.one_hot(tokens, vocab_size)


def run(logits_fn, lengths, *how, cap, eos_ids=(0,), group_size=1,
        temperature=1.0, seed=0, prompts=None):
  sample = sampling.make_sample_fn(
      Scripted(logits_fn), group_size=group_size, max_completion_length=cap,
      eos_ids=eos_ids, pad_id=0)
  prompts = make_prompts(np.array(lengths)) if prompts is None else prompts
  return host(sample({}, prompts, jax.random.key(seed),
                     jnp.float32(temperature), *how))


@pytest.mark.parametrize('cap', [1, 5, 63, 64, 65, 128, 150])
def test_any_cap_fits_the_pages(cap):
  # Token n is followed by n + 1; the stop is never met.
  rollout = run(lambda tokens, *_: one_hot(tokens + 1, 256), [6, 2], cap=cap)
  first = make_prompts(np.array([6, 2])).tokens[:, -1]
  np.testing.assert_array_equal(rollout.completion_tokens,
                                first[:, None] + 1 + np.arange(cap))
  assert rollout.completion_mask.all()


@pytest.mark.parametrize('read', ['positions', 'seen'])
def test_positions_and_keys_are_counted_from_each_rows_first_token(read):
  # The model writes the position it is at, or how many keys it sees: one less.
  def logits(_, positions, seen):
    return one_hot(positions if read == 'positions' else seen - 1, 128)

  rollout = run(logits, [6, 1, 4], cap=70, eos_ids=(127,))
  want = np.array([5, 0, 3])[:, None] + np.arange(70)
  np.testing.assert_array_equal(rollout.completion_tokens, want)


def test_a_stop_at_the_first_token_is_a_completion_of_one():
  rollout = run(lambda tokens, *_: one_hot(tokens * 0, 64), [6, 1], cap=5)
  np.testing.assert_array_equal(rollout.completion_mask.sum(-1), [1, 1])
  np.testing.assert_array_equal(rollout.completion_tokens, np.zeros((2, 5)))


def test_any_of_the_stop_tokens_stops():
  # Counting up from 10, 20 and 30; 13 and 24 stop.
  prompts = make_prompts(np.array([1, 1, 1])).replace(
      tokens=np.array([[0] * 5 + [n] for n in (10, 20, 30)], np.int32))
  rollout = run(lambda tokens, *_: one_hot(tokens + 1, 64), None, cap=6,
                eos_ids=(24, 13), prompts=prompts)
  np.testing.assert_array_equal(
      rollout.completion_tokens,
      [[11, 12, 13, 0, 0, 0], [21, 22, 23, 24, 0, 0],
       [31, 32, 33, 34, 35, 36]])
  np.testing.assert_array_equal(rollout.completion_mask.sum(-1), [3, 4, 6])


def test_a_stop_on_the_last_slot_is_inside_the_mask():
  rollout = run(lambda tokens, positions, _: one_hot(
      jnp.where(positions == 9, 0, 5), 64), [6], cap=5)
  np.testing.assert_array_equal(rollout.completion_tokens, [[5, 5, 5, 5, 0]])
  assert rollout.completion_mask.all()


@functools.cache
def two_draws(temperature):
  """Tokens and log-probs [4000, 2] from one distribution over eight."""
  logits = jnp.array([-jnp.inf, 0.0, 1.0, -2.0, 0.5, -1.0, 2.0, -jnp.inf])
  rollout = run(lambda tokens, *_: jnp.broadcast_to(
      logits, (*tokens.shape, 8)), [1], cap=2, group_size=4000,
      temperature=temperature, prompts=make_prompts(
          np.array([1]), vocab_size=8))
  scaled = np.asarray(logits) / temperature
  return rollout, np.exp(scaled) / np.exp(scaled).sum()


@pytest.mark.parametrize('temperature', [1.0, 0.7])
def test_tokens_are_drawn_with_their_probabilities(temperature):
  rollout, probabilities = two_draws(temperature)
  tokens = rollout.completion_tokens
  for slot in range(2):
    share = np.bincount(tokens[:, slot], minlength=8) / len(tokens)
    slack = 4 * np.sqrt(probabilities * (1 - probabilities) / len(tokens))
    assert np.all(np.abs(share - probabilities) <= slack), share
  np.testing.assert_allclose(rollout.sampler_logprobs,
                             np.log(probabilities[tokens]), atol=1e-5)


def test_the_draws_of_a_row_and_of_its_neighbours_are_independent():
  rollout, probabilities = two_draws(1.0)
  tokens = rollout.completion_tokens
  joint = np.outer(probabilities, probabilities).ravel()
  for first, second in ((tokens[:, 0], tokens[:, 1]),
                        (tokens[:-1, 0], tokens[1:, 0])):
    counts = np.bincount(first * 8 + second, minlength=64)
    possible = joint > 0
    assert counts[~possible].sum() == 0
    expected = joint[possible] * len(first)
    chi_square = np.sum((counts[possible] - expected)**2 / expected)
    # 36 cells, 35 degrees of freedom: beyond 75 once in ten thousand.
    assert chi_square < 75


# ---- Top-p and top-k.

# Ties at 0.2: ids 1 and 5, and a token that is impossible.
SHARES = np.array([0.05, 0.2, 0.3, 0.1, 0.15, 0.2, 0.0])


def survivors(top_p, top_k, shares=SHARES):
  """Ids that stay, by the definition: likeliest first, ids break ties."""
  order = sorted(range(len(shares)), key=lambda i: (-shares[i], i))
  order = [i for i in order if shares[i] > 0][:top_k or None]
  total, mass, kept = sum(shares[i] for i in order), 0.0, []
  for i in order:
    if kept and top_p < 1 and mass >= top_p * total - 1e-6:
      break
    kept.append(i)
    mass += shares[i]
  return sorted(kept)


@pytest.fixture(scope='module')
def draw():
  """(top_p, top_k, temperature) -> 4000 tokens of one distribution."""
  model = Scripted(lambda tokens, *_: jnp.broadcast_to(
      jnp.log(jnp.asarray(SHARES)), (*tokens.shape, len(SHARES))))
  sample = sampling.make_sample_fn(model, group_size=4000, eos_ids=(63,),
                                   max_completion_length=1, pad_id=0)
  prompts = make_prompts(np.array([1]), vocab_size=7)

  def draw(*how, temperature=1.0):
    rollout = host(sample({}, prompts, jax.random.key(1),
                          np.float32(temperature), *how))
    return rollout.completion_tokens[:, 0], rollout.sampler_logprobs[:, 0]

  draw.model = model
  return draw


@pytest.mark.parametrize('top_p, top_k, kept', [
    (0.3, 0, [2]), (0.31, 0, [1, 2]), (0.5, 0, [1, 2]), (0.69, 0, [1, 2, 5]),
    (0.71, 0, [1, 2, 4, 5]), (0.95, 0, [1, 2, 3, 4, 5]),
    (0.96, 0, [0, 1, 2, 3, 4, 5]),
    (1.0, 1, [2]), (1.0, 2, [1, 2]), (1.0, 3, [1, 2, 5]),
    (1.0, 4, [1, 2, 4, 5]), (1.0, 99, [0, 1, 2, 3, 4, 5]),
    # Shares are of what top_k leaves: 0.3, 0.2, 0.2 of 0.7.
    (0.42, 3, [2]), (0.44, 3, [1, 2]), (0.72, 3, [1, 2, 5]),
    (0.9, 1, [2]), (1e-6, 0, [2]), (0.0, 0, [2]), (0.0, 5, [2]),
])
def test_what_top_p_and_top_k_leave(draw, top_p, top_k, kept):
  assert survivors(top_p, top_k) == kept
  tokens, logprobs = draw(top_p, top_k)
  assert np.unique(tokens).tolist() == kept
  # Each as often as its share among what is left.
  shares = SHARES[kept] / SHARES[kept].sum()
  found = np.bincount(tokens, minlength=7)[kept] / len(tokens)
  slack = 4 * np.sqrt(shares * (1 - shares) / len(tokens))
  assert np.all(np.abs(found - shares) <= slack), found
  # The log-probs are of all tokens: a truncated policy is not the policy.
  np.testing.assert_allclose(logprobs, np.log(SHARES[tokens]), atol=1e-5)


def test_the_nucleus_is_of_the_distribution_at_this_temperature(draw):
  cold = SHARES**2 / (SHARES**2).sum()
  kept = survivors(0.8, 0, cold)
  assert kept != survivors(0.8, 0)
  assert np.unique(draw(0.8, 0, temperature=0.5)[0]).tolist() == kept


def test_truncating_nothing_is_not_truncating(draw):
  plain = draw()
  for how in ((1.0,), (1.0, 0), (1.5, 0), (1.0, -1)):
    jax.tree.map(np.testing.assert_array_equal, draw(*how), plain)
  # Nothing is compiled anew for other numbers.
  traced = draw.model.traced
  draw(0.5, 3, temperature=0.3)
  draw(0.7, temperature=0.0)
  assert draw.model.traced == traced


def test_greedy_needs_no_nucleus(draw):
  for how in ((), (0.5,), (0.9, 3)):
    assert set(draw(*how, temperature=0.0)[0]) == {2}


def test_equal_tokens_stay_in_the_order_of_their_ids():
  rollout = run(lambda tokens, *_: jnp.zeros((*tokens.shape, 8)), [1], 1.0, 3,
                cap=1, group_size=300, eos_ids=(63,),
                prompts=make_prompts(np.array([1]), vocab_size=8))
  assert set(rollout.completion_tokens[:, 0]) == {0, 1, 2}


def test_a_nucleus_in_a_vocabulary_of_thousands():
  rng = np.random.default_rng(0)
  logits = rng.normal(size=5000).astype(np.float32) * 3
  rollout = run(lambda tokens, *_: jnp.broadcast_to(
      jnp.asarray(logits), (*tokens.shape, 5000)), [1], 0.9, cap=1,
      group_size=2000, eos_ids=(5000,))
  order = np.argsort(-logits.astype(np.float64), kind='stable')
  shares = np.exp(logits[order].astype(np.float64))
  shares /= shares.sum()
  size = int(np.searchsorted(np.cumsum(shares), 0.9)) + 1
  ranks = np.argsort(order)[rollout.completion_tokens[:, 0]]
  # Within float32's rounding of the sum.
  assert ranks.max() <= size + 1
  assert np.unique(ranks).size > 0.3 * size


# ---- Keys.


def test_a_key_for_each_completion(short_sampler, short_rollout, tiny_params):
  root = jax.random.key(3)
  keys = jax.vmap(lambda b: jax.random.fold_in(root, b))(jnp.arange(P * G))
  ask = lambda keys: host(short_sampler(tiny_params, make_prompts(), keys,
                                        jnp.float32(1.0)))
  jax.tree.map(np.testing.assert_array_equal, ask(keys), short_rollout)
  # A completion follows its own key and no other.
  other = ask(keys.at[5].set(jax.random.key(9)))
  differs = (other.completion_tokens != short_rollout.completion_tokens).any(1)
  assert np.flatnonzero(differs).tolist() == [5]
