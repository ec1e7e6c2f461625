# SPDX-License-Identifier: Apache-2.0
"""Every method on random groups, against plain Python in double precision.

An error is relative where the number is above 1, and absolute below. A float32
z-score has about as many digits as the rewards have in which they differ, so
rewards that are to be divided by their sd are made to differ by a hundredth.
"""

import dataclasses
import functools
import math

import jax
import numpy as np
import oracles
import pytest

from lapo_jax import advantages, evaluate, offline, plugins, types
from lapo_jax.rewards import (
    ddca,
    dot,
    drpo,
    gdpo,
    gfpo,
    hbpo,
    l1,
    lapo,
    laser,
    lead,
    qlpo,
    repetition,
    sar,
    sas,
)

P, G, T, N = 16, 8, 4096, 40
NAMES = plugins.names('rewards')
SEEDS = (0, 1, 2)


@dataclasses.dataclass
class Groups:
  """Graded groups [P, G] as NumPy holds them; every kind is among them."""

  correct: np.ndarray
  lengths: np.ndarray
  truncated: np.ndarray
  index: np.ndarray
  rng: np.random.Generator

  def flags(self):
    """Another true or false for each completion."""
    return self.rng.integers(0, 2, (P, G)).astype(np.float32)

  def coarse(self):
    """The same, but lengths are alike or 200 tokens apart."""
    lengths = (self.lengths + 100) // 200 * 200
    return dataclasses.replace(self, lengths=lengths)

  def each(self, oracle, *more, **settings):
    """The oracle's word on each group; `more` has one item a group."""
    columns = [self.correct, self.lengths, *more]
    columns = [np.asarray(x).tolist() for x in columns]
    return [oracle(*group, **settings) for group in zip(*columns, strict=True)]


def groups(seed):
  rng = np.random.default_rng(seed)
  correct = rng.integers(0, 2, (P, G)).astype(np.float32)
  centre = rng.integers(100, 3500, (P, 1))
  spread = rng.choice([5, 40, 400, 1500], (P, 1))
  lengths = centre + np.rint(spread * rng.normal(size=(P, G)))
  truncated = np.zeros((P, G), bool)
  correct[0], correct[1] = 1, 0
  correct[2], correct[3] = np.arange(G) == 3, np.arange(G) != 3
  lengths[4:7] = centre[4:7]
  correct[4], correct[5] = 1, 0
  truncated[7:10] = rng.random((3, G)) < 0.4
  lengths[truncated] = T
  correct[7:9] *= ~truncated[7:9]
  # At the methods' limits and one beyond; on all sides of a record of 1000.
  lengths[10] = lengths[11] = 1000, 1001, 1500, 1501, 2000, 2001, 4000, 4001
  lengths[12] = 1000, 1300, 1301, 1305, 1010, 1200, 1400, 1500
  lengths[13] = 990, 990, 990, 987, 990, 990, 1032, 1031  # of mean 1000
  correct[10], correct[11] = 1, np.arange(G) > 4
  correct[12:14] = 1
  lengths = np.clip(lengths, 1, T).astype(np.int32)
  index = rng.choice(N, P, replace=False).astype(np.int32)
  return Groups(correct, lengths, truncated, index, rng)


@functools.cache
def made(name, settings):
  method = plugins.make('rewards', name, **dict(settings))
  return method, jax.jit(method.apply)


def ours(b, name, state=None, targets=None, extras=None, **settings):
  """Rewards and memory that the method finds, compiled once a setting."""
  method, apply = made(name, tuple(settings.items()))
  targets = np.zeros(P) if targets is None else targets
  outcomes = types.Outcomes(
      b.correct, b.lengths, b.truncated, b.index, targets.astype(np.int32),
      {k: x.astype(np.float32) for k, x in (extras or {}).items()})
  return apply(outcomes, method.init(N) if state is None else state)


def total(b, name, **settings):
  return ours(b, name, **settings)[0].total


def error(found, expected):
  found = np.asarray(found, np.float64)
  expected = np.asarray(expected, np.float64)
  assert found.shape == expected.shape and np.isfinite(expected).all()
  return np.max(np.abs(found - expected) / np.maximum(np.abs(expected), 1.0))


# One function per method: (groups) -> (found, expected) of all that it offers.


def check_accuracy(b):
  yield total(b, 'accuracy'), b.correct


def check_alp(b):
  rewards, _ = ours(b, 'alp')
  yield rewards.total, b.each(oracles.alp)
  # β is so small that only the term alone shows all of its digits.
  yield (b.correct + 1e7 * np.asarray(rewards.terms['length'], float),
         b.each(oracles.alp, beta=1.0))


def check_cosine(b):
  yield total(b, 'cosine'), b.each(oracles.cosine, b.truncated)
  yield total(b, 'cosine', cap=T), b.each(oracles.cosine, b.truncated, limit=T)


def check_ddca(b):
  yield total(b, 'ddca'), b.each(oracles.ddca)
  yield ddca.reward(b.correct, b.lengths), b.each(oracles.ddca)


def check_dler(b):
  box = b.flags()
  for aware, late in (False, 0.0), (True, 0.1):
    settings = dict(difficulty_aware=aware, overlong=late)
    yield (total(b, 'dler', extras={'boxed': box}, **settings),
           b.each(oracles.dler, b.truncated, box, aware=aware, overlong=late))


def check_dot(b):
  yield total(b, 'dot'), b.correct
  for alpha in 0.0, 0.5, 1.3:
    yield (dot.kept_lengths(b.correct, b.lengths, alpha=alpha),
           b.each(oracles.dot_cut, alpha=alpha))


def check_drpo(b):
  scores = -b.rng.exponential(1.0, (P, G)).astype(np.float32)
  yield (total(b, 'drpo', extras={'mean_logprob': scores}),
         b.each(oracles.drpo_advantages, scores))
  yield (drpo.loss(scores, b.correct, b.lengths),
         b.each(oracles.drpo, scores))


def check_e1(b):
  efforts = np.array([0.5, 0.75, 1.0, 1.5])
  state = b.rng.integers(0, 9, N).astype(np.int32)
  stated = efforts[(b.index + state[b.index]) % 4]
  rewards, visits = ours(b, 'e1', state)
  yield rewards.total, b.each(oracles.e1, stated)
  state[b.index] += 1
  yield visits, state


def check_efficient_reasoning(b):
  yield (total(b, 'efficient_reasoning'),
         b.each(oracles.efficient_reasoning, b.truncated))


def check_exp_think(b):
  yield from remembered(b, 'exp_think', oracles.exp_think)


def check_hapo(b):
  yield from remembered(b, 'hapo', oracles.hapo)


def remembered(b, name, oracle):
  """Three visits of each problem, each of them with the lengths shifted."""
  method, _ = made(name, ())
  state, known = method.init(N), {}
  for shift in 0, 3, -2:
    now = dataclasses.replace(b, correct=np.roll(b.correct, shift, 0),
                              lengths=np.roll(b.lengths, shift, 0))
    rewards, state = ours(now, name, state)
    history = [known.get(i) for i in b.index.tolist()]
    expected, history = zip(*now.each(oracle, history), strict=True)
    known.update(zip(b.index.tolist(), history, strict=True))
    yield rewards.total, expected
  kept = {i: x for i, x in known.items() if x is not None}
  yield state[np.array([*kept])], [*kept.values()]


def check_gdpo(b):
  yield total(b, 'gdpo'), b.correct + b.each(oracles.gdpo_length, limit=4000)
  score = b.each(oracles.gdpo_length, limit=1500)
  rewards, _ = ours(b, 'gdpo', limit=1500, length_weight=0.5)
  yield rewards.terms['length'], score
  yield rewards.total, b.correct + 0.5 * np.array(score)
  yield (advantages.from_rewards(rewards, b.lengths, decoupled=True,
                                 whiten='completions'),
         oracles.gdpo_advantages([b.correct.tolist(), score], [1.0, 0.5]))
  yield (gdpo.length_score(b.correct / 2, b.lengths, threshold=0.5),
         b.each(oracles.gdpo_length, limit=4000, threshold=0.5))


def check_gfpo(b):
  keep = lambda metric: np.array(
      b.each(oracles.gfpo_keep, [4] * P, [metric] * P))
  rewards, _ = ours(b, 'gfpo', k=4)
  yield rewards.keep, keep('length')
  yield (advantages.from_rewards(rewards, b.lengths),
         [oracles.kept_advantages(c, k) for c, k in
          zip(b.correct.tolist(), keep('length').tolist(), strict=True)])
  yield (gfpo.kept(b.correct, b.lengths, k=4, metric='efficiency'),
         keep('efficiency'))


def check_hbpo(b):
  own = np.tile([512, 1024, 2048, 2560], (P, 2))
  yield (hbpo.reward(b.correct, b.lengths, own),
         [[oracles.hbpo(*one) for one in zip(*row, strict=True)] for row in
          zip(b.correct, b.lengths, own, strict=True)])
  b = b.coarse()
  drawn = b.rng.choice([512, 1024, 2048, 2560], P)
  yield (ours(b, 'hbpo', targets=drawn)[0].total,
         b.each(oracles.hbpo_advantages, drawn[:, None].repeat(G, 1)))
  rewards = hbpo.reward(b.correct, b.lengths, own)
  first, second = hbpo.advantages(rewards, own)
  yield first + second, b.each(oracles.hbpo_advantages, own)


def check_kimi(b):
  yield total(b, 'kimi'), b.each(oracles.kimi)


def check_l1(b):
  targets = b.rng.integers(100, 4000, P).astype(np.int32)
  exact = np.array(b.each(oracles.l1_exact, targets))
  slopes = {slope: np.array(b.each(oracles.l1_max, targets, slope=slope))
            for slope in ('paper', 'code')}
  yield total(b, 'l1', targets=targets), exact
  for slope, expected in slopes.items():
    yield l1.maximum(b.correct, b.lengths, targets, slope=slope), expected
  odd = (targets % 2 == 1)[:, None]
  yield (l1.reward(b.correct, b.lengths, targets, mode='mixed'),
         np.where(odd, slopes['paper'], exact))


def check_lapo(b):
  yield (lapo.reward(b.correct, b.lengths),
         [r for r, _ in b.each(oracles.lapo_discovery)])
  rewards, state = ours(b, 'lapo')
  expected, memory = zip(*b.each(oracles.lapo_discovery), strict=True)
  yield rewards.total, expected
  yield state['target'][b.index], memory
  memory = np.array(memory)
  for shift in 0, 40, -100:  # tokens: none, worse, better
    now = dataclasses.replace(b, lengths=np.clip(b.lengths + shift, 1, T))
    rewards, state = ours(now, 'lapo', state, memory.astype(int),
                          stage='internalisation')
    found = now.each(oracles.lapo_internalisation, memory)
    expected, memory = zip(*found, strict=True)
    memory = np.array(memory)
    yield rewards.total, expected
    yield state['target'][b.index], memory
    b.correct[1, :2] = 1  # solved at last


def check_laser(b):
  box, circles = b.flags(), b.flags()
  extras = {'boxed': box, 'repetitive': circles}
  yield (total(b, 'laser', target=1000, extras=extras),
         [oracles.laser(*row, target=1000) for row in
          zip(b.correct, box, b.lengths, strict=True)])
  yield laser.difficulty(b.correct), [*map(oracles.laser_band, b.correct)]
  settings = dict(variant='exploration', target=1000, interval=1, cap=T,
                  num_candidates=4)
  bands = [oracles.laser_band(c) for c in b.correct.tolist()]
  state, targets = None, [1000] * 3
  for _ in range(2):
    rewards, state = ours(b, 'laser', state, extras=extras, **settings)
    yield rewards.total, [
        oracles.laser_exploring(c, x, n, targets[band], r) for c, x, n, r, band
        in zip(b.correct, box, b.lengths, circles, bands, strict=True)]
    of_band = lambda band: b.lengths[np.array(bands) == band].ravel().tolist()
    targets = [oracles.laser_target(of_band(band), band, cap=T)
               for band in range(3)]
    yield state['targets'], targets


def check_lead(b):
  state, stored = None, (0.5, 0.5)
  for low, cap in (1000, 8000), (100, T), (100, T):
    rewards, state = ours(b, 'lead', state, low=low, cap=cap)
    score = b.each(oracles.lead, low=low, high=cap)
    stored, used = oracles.lead_controller(b.correct.tolist(), score, stored)
    yield rewards.terms['length'], score
    yield [state[k] for k in ('correct', 'length')], stored
    yield [rewards.weights[k] for k in ('correct', 'length')], used
    if low == 1000:
      stored = 0.1, 0.9  # under the floor
      state = {'correct': np.float32(0.1), 'length': np.float32(0.9)}
  yield (lead.reward(b.correct, b.lengths),
         0.5 * b.correct + 0.5 * np.array(b.each(oracles.lead)))


def check_leash(b):
  state, strength = None, 0.2
  for target in 600, 600, 20, 4000:
    rewards, state = ours(b, 'leash', state, target=target)
    expected, strength = oracles.leash(
        b.correct.tolist(), b.lengths.tolist(), target, strength, 0.05)
    yield rewards.total, expected
    yield state, strength


def check_qlpo(b):
  keep = np.asarray(ours(b, 'qlpo', m=4)[0].keep)
  counts = []
  for c, n, k in zip(b.correct, b.lengths, keep, strict=True):
    right = [i for i in np.argsort(n, kind='stable') if c[i]]
    wrong = [i for i in np.argsort(-n, kind='stable') if not c[i]]
    short, long = np.split(k[right], [-(-len(right) // 2)])
    long_wrong, short_wrong = np.split(k[wrong], [-(-len(wrong) // 2)])
    counts.append([x.sum() for x in (short, long, short_wrong, long_wrong)])
  yield counts, [oracles.qlpo_counts(c, m=4) for c in b.correct.tolist()]
  full = qlpo.kept(b.correct, b.lengths, m=8)
  yield full.sum(axis=1), [sum(oracles.qlpo_counts(c)) for c in b.correct]


def check_repetition(b):
  counts = np.minimum(b.lengths.ravel() % 65, 64)
  tokens = b.rng.integers(0, 1 + counts[:, None] % 7, (P * G, 64))
  mask = np.arange(64) < counts[:, None]
  share = repetition.repeated_share(tokens.astype(np.int32), mask)
  expected = [oracles.repetition(row[:n].tolist())
              for row, n in zip(tokens, counts, strict=True)]
  yield -share, expected
  extras = {'repeated': np.asarray(share).reshape(P, G)}
  yield (total(b, 'repetition', extras=extras),
         b.correct + np.reshape(expected, (P, G)))


def check_sar(b):
  mask = np.arange(32) <= b.lengths.reshape(-1, 1) % 32
  asked, bare = -b.rng.exponential(1.0, (2, P * G, 32)).astype(np.float32)
  found = np.asarray(sar.self_alignment(asked, bare, mask)).reshape(P, G)
  means = [[row[m].mean(dtype=float) for row, m in zip(x, mask, strict=True)]
           for x in (asked, bare)]
  yield (total(b, 'sar', extras={'self_alignment': found}),
         b.each(lambda c, _, *x: oracles.sar(c, *x),
                *(np.reshape(x, (P, G)) for x in means)))


def check_sas(b):
  yield total(b, 'sas'), b.correct
  right = b.correct.ravel()
  steps = np.sort(b.rng.integers(0, 12, (P * G, 48)), axis=1)
  steps = np.cumsum(np.diff(steps, axis=1, prepend=steps[:, :1]) > 0, axis=1)
  steps[:, 40:] = -1  # the answer
  logprobs = -b.rng.exponential(1.0, steps.shape).astype(np.float32)
  expected = np.ones(steps.shape)
  for row, (which, scores, c) in enumerate(
      zip(steps, logprobs, right, strict=True)):
    sure = [scores[which == k].mean() for k in range(which.max() + 1)]
    for k, silent in enumerate(oracles.sas_silent(c, sure)):
      expected[row, which == k] = not silent
  yield sas.trained(logprobs, steps.astype(np.int32), right), expected


def check_shorter_better(b):
  yield total(b, 'shorter_better'), b.each(oracles.shorter_better)


def check_smart_thinker(b):
  yield total(b, 'smart_thinker'), b.each(oracles.smart_thinker)


def check_soft_overlong(b):
  found = ours(b, 'soft_overlong', cap=T)[0].terms['length']
  yield found, [oracles.soft_overlong(n, T, T / 5) for n in b.lengths.tolist()]
  late = dataclasses.replace(b, lengths=6 * b.lengths)
  found = ours(late, 'soft_overlong')[0].terms['length']
  yield found, [oracles.soft_overlong(n) for n in late.lengths.tolist()]


def check_think_prune(b):
  for cap in 1500, 4000:
    yield (total(b, 'think_prune', cap=cap),
           b.each(oracles.think_prune, limit=cap))


def largest_error(name, seeds):
  """Of all that the method offers, on P groups for each seed."""
  check = globals().get(f'check_{name}')
  assert check, f'{name} has no oracle: add one, and check_{name} here.'
  return max(error(found, expected) for seed in seeds
             for found, expected in check(groups(seed)))


@pytest.mark.parametrize('name', NAMES)
def test_the_method_agrees_with_its_oracle(name):
  assert largest_error(name, SEEDS) <= 1e-5


@pytest.mark.parametrize('scale', advantages.SCALES)
@pytest.mark.parametrize('baseline', advantages.BASELINES)
def test_group_advantages(baseline, scale):
  for seed in SEEDS:
    b = groups(seed)
    rewards = b.correct - b.coarse().lengths.astype(np.float32) / 7000
    rewards[14] = 0.35
    for eps in 1e-4, 1e-6:
      found = advantages.group_advantages(rewards, baseline=baseline,
                                          scale=scale, eps=eps)
      expected = oracles.advantages(rewards.tolist(), baseline, scale, eps)
      assert error(found, expected) <= 1e-5


def test_dlers_advantage_and_both_whitenings():
  for seed in SEEDS:
    b = groups(seed)
    rewards = ours(b, 'dler', extras={'boxed': b.flags()})[0]
    from_rewards = functools.partial(advantages.from_rewards, rewards,
                                     b.lengths, scale='batch')
    plain = oracles.advantages(np.asarray(rewards.total).tolist(),
                               scale='batch')
    assert error(from_rewards(), plain) <= 1e-5
    assert error(from_rewards(whiten='completions'),
                 oracles.whiten_completions(plain)) <= 1e-5
    assert error(from_rewards(whiten='tokens'),
                 oracles.whiten_tokens(plain, b.lengths.tolist())) <= 1e-5


def test_o1_pruners_weights():
  for seed in SEEDS:
    b = groups(seed)
    assert error(
        offline.o1_pruner(b.correct, b.lengths),
        oracles.o1_pruner(b.correct.tolist(), b.lengths.tolist())) <= 1e-5


def test_pass_at_k_and_aes():
  for n in 1, 5, 32:
    for c in range(n + 1):
      for k in {1, n // 2 + 1, n}:
        assert math.isclose(evaluate.pass_at_k(n, c, k),
                            oracles.pass_at_k(n, c, k), abs_tol=1e-12)
  for after in (60.0, 4000.0), (50.0, 3000.0):
    assert math.isclose(evaluate.aes(*after, 57.9, 8086.0),
                        oracles.aes(*after, 57.9, 8086.0))
