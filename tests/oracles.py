# SPDX-License-Identifier: Apache-2.0
"""Every method once more, in plain Python: what the fast ones must say.

One function per method, over one group: lists of floats in, lists of floats
out, in double precision, with the method's own constants, degrees of freedom
and degenerate cases written where they act. They are written from the papers'
formulas and share nothing with the package: no arrays, no masks, no vectors. A
method that speaks of the whole batch takes a list of groups.
"""

import functools
import math
import statistics

pairs = functools.partial(zip, strict=True)


def clip(x, low, high):
  return min(max(x, low), high)


def mean(values):
  return sum(values) / len(values)


def population_sd(values):
  return math.sqrt(mean([(x - mean(values)) ** 2 for x in values]))


def sample_sd(values):
  """Divides by n − 1; 0 where all are equal or there is only one."""
  if len(values) < 2 or min(values) == max(values):
    return 0.0
  return statistics.stdev(values)


def quantile(values, q):
  """The `q` quantile, by linear interpolation between neighbours."""
  values = sorted(values)
  place = q * (len(values) - 1)
  below = math.floor(place)
  above = min(below + 1, len(values) - 1)
  return values[below] + (place - below) * (values[above] - values[below])


def of_correct(correct, values):
  return [x for c, x in pairs(correct, values) if c]


# Groups, advantages and summaries.


def advantages(groups, baseline='mean', scale='group', eps=1e-4):
  """Advantages of a batch: a list of groups of rewards, and the same back."""
  batch_sd = sample_sd([r for group in groups for r in group])
  result = []
  for group in groups:
    n = len(group)
    total = sum(group)
    base = {
      'mean': lambda r, t=total, n=n: t / n,
      'leave_one_out': lambda r, t=total, n=n: (t - r) / (n - 1),
      'none': lambda r: 0.0,
    }[baseline]
    sd = {'group': sample_sd(group), 'batch': batch_sd}.get(scale)
    centred = [r - base(r) for r in group]
    if min(group) == max(group) and baseline != 'none':
      centred = [0.0] * n
    # Without spread nothing is divided.
    divisor = sd + eps if sd else 1.0
    result.append([x / divisor for x in centred])
  return result


def whiten_completions(groups, eps=1e-4):
  """Zero mean and unit sample sd over all completions of the batch."""
  flat = [x for group in groups for x in group]
  centre, sd = mean(flat), sample_sd(flat)
  return [[(x - centre) / (sd + eps) for x in group] for group in groups]


def whiten_tokens(groups, lengths, eps=1e-8):
  """As above over tokens: a completion counts as often as it is long."""
  flat = [(x, n) for g, ns in pairs(groups, lengths)
          for x, n in pairs(g, ns)]
  tokens = sum(n for _, n in flat)
  centre = sum(x * n for x, n in flat) / tokens
  var = sum(n * (x - centre) ** 2 for x, n in flat) / (tokens - 1)
  return [[(x - centre) / math.sqrt(var + eps) for x in g] for g in groups]


def pass_at_k(n, c, k):
  """The chance that one of `k` of `n` samples, `c` of them right, is right."""
  return 1 - math.comb(n - c, k) / math.comb(n, k)


def aes(accuracy, tokens, base_accuracy, base_tokens):
  """Accuracy-efficiency score: 3 for accuracy gained, 5 for accuracy lost."""
  saved = (base_tokens - tokens) / base_tokens
  gained = (accuracy - base_accuracy) / base_accuracy
  return saved + (3 * gained if gained >= 0 else -5 * abs(gained))


# LAPO, LEAD, SAR, GDPO.


def accuracy(correct):
  return [float(c) for c in correct]


def lapo_discovery(correct, lengths, cap=4096, alpha=0.7, slope=100.0):
  """Rewards, and what the group leaves in the memory."""
  good = of_correct(correct, lengths)
  if not good:
    return [0.0] * len(correct), cap
  low, high = quantile(good, 0.3), quantile(good, 0.7)
  rewards = []
  for c, n in pairs(correct, lengths):
    away = max(low - n, n - high, 0)
    rewards.append(1 + alpha * max(0.0, 1 - away / slope) if c else 0.0)
  return rewards, statistics.median(good)


def lapo_internalisation(
  correct, lengths, memory, cap=4096, beta=0.8, sigma=120.0
):
  """Rewards around the memory that the prompt stated, and the new memory."""
  good = of_correct(correct, lengths)
  if not good:
    return [0.0] * len(correct), memory
  median = statistics.median(good)
  unsolved = memory >= cap
  centre = median if unsolved else int(memory)
  rewards = [
    1 + beta * math.exp(-((n - centre) ** 2) / (2 * sigma**2)) if c else 0.0
    for c, n in pairs(correct, lengths)
  ]
  return rewards, median if unsolved else min(memory, median)


def lead(correct, lengths, low=1000, high=8000):
  """The length term of every completion, right or wrong."""
  good = of_correct(correct, lengths)
  target = clip(mean(good), low, high) if good else high
  return [max(-1.0, 1 - abs(n - target) / target) for n in lengths]


def lead_signal(groups, low, high):
  """PSI of one reward: its variation times the room that it has left."""
  groups = [group for group in groups if group]
  centre = spread = 0.0
  if groups:
    means = [mean(group) for group in groups]
    centre = mean(means)
    within = mean([population_sd(group) ** 2 for group in groups])
    spread = math.sqrt(within + population_sd(means) ** 2 + 1e-8)
  room = 1 - (clip(centre, low, high) - low) / (high - low)
  return spread / (abs(centre) + 1e-8) * room


def lead_controller(correct, efficiency, stored=(0.5, 0.5)):
  """Stored and used weights (correctness, length) after this batch."""
  right = [of_correct(c, e) for c, e in pairs(correct, efficiency)]
  signals = lead_signal(correct, 0, 1), lead_signal(right, -1, 1)
  total = sum(signals) + 1e-8
  stored = [0.95 * w + 0.05 * s / total for w, s in pairs(stored, signals)]
  used = max(stored[0], 0.3)
  return stored, [used, 1 - used]


def sar(correct, given_question, alone, weight=0.2):
  """From mean log-probabilities with the question, and without it."""
  rewards = []
  for c, asked, bare in pairs(correct, given_question, alone):
    ratio = math.exp(-asked) / math.exp(-bare)
    rewards.append(c + weight * clip(1 - ratio, -1, 1))
  return rewards


def gdpo_length(correct, lengths, limit, threshold=1.0):
  """1 within the limit, and only for those that are right enough."""
  return [
    float(n <= limit and c >= threshold)
    for c, n in pairs(correct, lengths)
  ]


def gdpo_advantages(terms, weights, eps=1e-4):
  """Each term normalised in its group, weighted, added, then whitened."""
  scaled = [advantages(groups, eps=eps) for groups in terms]
  added = [
    [sum(w * x for w, x in pairs(weights, values)) for values in pairs(*group)]
    for group in pairs(*scaled)
  ]
  return whiten_completions(added, eps)


# Budgets and limits.


def l1_exact(correct, lengths, target, alpha=3e-4):
  return [
    c - alpha * abs(target - n) for c, n in pairs(correct, lengths)
  ]


def l1_max(correct, lengths, target, alpha=3e-4, slope='code'):
  """The released code has half of the paper's slope."""
  rewards = []
  for c, n in pairs(correct, lengths):
    x = alpha * (target - n)
    paper = clip(x + 0.5, 0, 1)
    code = max(0.0, (clip(x, -1, 1) + 1) / 2)
    rewards.append(c * (paper if slope == 'paper' else code))
  return rewards


def think_prune(correct, lengths, limit):
  return [float(c and n <= limit) for c, n in pairs(correct, lengths)]


def soft_overlong(lengths, limit=20480, cache=4096):
  """The penalty alone: 0, then down to −1 over `cache` tokens, then −1."""
  return [
    0.0 if n <= limit - cache
    else (limit - cache - n) / cache if n <= limit else -1.0
    for n in lengths
  ]  # fmt: skip


def dler(
  correct, lengths, truncated, answered, overlong=0.0, aware=False, limit=4000
):
  """The paper's, DA-DLER (`aware`), and the code's 0.1 for what is answered."""
  if aware and mean(correct) > 0.5:
    limit = 2000
  rewards = []
  for c, n, cut, box in pairs(correct, lengths, truncated, answered):
    late = overlong if box else 0.0
    rewards.append(late if cut or n > limit else float(c))
  return rewards


def hbpo(c, n, budget, beta=4.0, alpha=1 / 4096, cap=4096):
  """The reward of one completion."""
  if not c:
    return 0.0
  if n <= budget:
    return beta * math.cos(math.pi * budget / (2 * cap))
  return beta * math.cos(math.pi * n / (2 * cap)) - alpha * abs(n - budget)


def hbpo_advantages(correct, lengths, budgets, beta=4.0, cap=4096):
  """(R − μ)/sd over the group, and how its budget's mean does against f2."""
  rewards = [hbpo(*one) for one in pairs(correct, lengths, budgets)]
  (first,) = advantages([rewards], eps=1e-6)
  result = []
  for a, b in pairs(first, budgets):
    same = [r for r, other in pairs(rewards, budgets) if other == b]
    result.append(a + mean(same) - beta * math.cos(math.pi * b / (2 * cap)))
  return result


def leash(groups, lengths, target, multiplier, rate, most=1.0):
  """Rewards under the multiplier, and what dual ascent makes of it."""
  over = [[n / target - 1 for n in ns] for ns in lengths]
  rewards = [
    [clip(r - multiplier * max(0.0, x), -1, 1) for r, x in pairs(rs, xs)]
    for rs, xs in pairs(groups, over)
  ]
  violation = mean([x for xs in over for x in xs])
  return rewards, clip(multiplier + rate * violation, 0.0, most)


def e1(correct, lengths, effort):
  return [
    float(c and n / mean(lengths) < effort)
    for c, n in pairs(correct, lengths)
  ]


# The group's own lengths, and what is remembered of them.


def shorter_better(correct, lengths, alpha=2.0, beta=1e-3):
  good = of_correct(correct, lengths)
  best = min(good) if good else mean(lengths)
  return [
    alpha * c - beta * abs(n - best)
    for c, n in pairs(correct, lengths)
  ]


def laser(correct, boxed, lengths, target=4096):
  rewards = []
  for c, box, n in pairs(correct, boxed, lengths):
    base = 1.0 if c else -0.5 if box else -1.0
    rewards.append(base + (0.5 if c and n <= target else 0.0))
  return rewards


def laser_band(correct):
  """0, 1, 2: easy, medium, hard."""
  thrice = 3 * sum(correct)
  return 0 if thrice >= 2 * len(correct) else 1 if thrice >= len(correct) else 2


def laser_target(lengths, band, cap=16384, step=1024):
  """The least candidate that covers enough of the band's completions."""
  m = (5, 2, 1)[band]
  for candidate in range(step, cap + 1, step):
    covered = sum(n <= candidate for n in lengths)
    if covered * m // max(len(lengths), 1) >= 1:
      return candidate
  return cap


def laser_exploring(correct, boxed, lengths, target, repetitive):
  """As `laser`; a boxed, wrong, long and not repetitive one gets half."""
  rewards = laser(correct, boxed, lengths, target)
  for i, (c, box, n) in enumerate(pairs(correct, boxed, lengths)):
    if not c and box and n > target and not repetitive[i]:
      rewards[i] += 0.5
  return rewards


def efficient_reasoning(correct, lengths, truncated, alpha=0.1):
  """Arora and Zanette: a sigmoid of the length among the right ones."""
  right = [float(c and not t) for c, t in pairs(correct, truncated)]
  good = of_correct(right, lengths)
  rewards = []
  for c, n in pairs(right, lengths):
    z = (n - mean(good)) / (population_sd(good) + 1e-7) if c else 0.0
    rewards.append(c * (1 - alpha / (1 + math.exp(-z))))
  return rewards


def kimi(correct, lengths, weight=1.0):
  low, high = min(lengths), max(lengths)
  rewards = []
  for c, n in pairs(correct, lengths):
    bonus = 0.5 - (n - low) / (high - low) if high > low else 0.0
    rewards.append(c + weight * (bonus if c else min(0.0, bonus)))
  return rewards


def smart_thinker(correct, lengths):
  """The penalty's weight leaves the longest right one at the group's mean."""
  good = of_correct(correct, lengths)
  if not good or len(good) == len(lengths):
    return accuracy(correct)
  all_mean, all_var = mean(lengths), population_sd(lengths) ** 2
  good_mean, good_var = mean(good), population_sd(good) ** 2
  best = min(lengths)
  if abs(good_var - all_var) < 1e-6:
    best = max(lengths) if good_mean < all_mean else best
  elif good_var < all_var:
    best = (good_var * all_mean - all_var * good_mean) / (good_var - all_var)
    best = clip(best, min(lengths), max(lengths))
  penalty = [
    max(0.0, n - best) if c else 0.0 for c, n in pairs(correct, lengths)
  ]
  weight = (1 - mean(correct)) / (max(penalty) - mean(penalty) + 1e-6)
  return [c - weight * x for c, x in pairs(correct, penalty)]


def hapo(correct, lengths, history, weight=1.0):
  """Rewards against the history (None if there is none), and the new one."""
  rewards = []
  for c, n in pairs(correct, lengths):
    f = 0.0
    if history is not None:
      f = math.cos(min(math.pi / 2 * n / history, math.pi))
      f = max(f, -0.7) if c else min(f, 0.0)
    rewards.append(c + weight * f)
  return rewards, shortest(correct, lengths, history)


def shortest(correct, lengths, history):
  known = [] if history is None else [history]
  return min(of_correct(correct, lengths) + known, default=None)


def exp_think(correct, lengths, history, slack=0.3):
  """The record takes in the group first, then judges it."""
  record = shortest(correct, lengths, history)
  rewards = [
    float(n - record <= slack * record + 1e-9) if c else 0.0
    for c, n in pairs(correct, lengths)
  ]
  return rewards, record


def alp(correct, lengths, beta=1e-7):
  rate = max(mean(correct), 1 / len(correct))
  return [c - beta * n * rate for c, n in pairs(correct, lengths)]


def ddca_length(correct, lengths):
  """The length's own advantage, on the right ones."""
  good = of_correct(correct, lengths)
  if not good:
    return [0.0] * len(correct)
  rate, centre, sd = mean(correct), mean(good), population_sd(good)
  s = [1 / (1 + math.exp(-(n - centre) / (sd + 1e-8))) for n in good]
  by_length = iter(s)
  return [-rate * (next(by_length) - mean(s)) if c else 0.0 for c in correct]


def ddca(correct, lengths, weight=0.2):
  middle, sd = mean(correct), population_sd(correct)
  first = [(c - middle) / (sd + 1e-8) for c in correct]
  second = ddca_length(correct, lengths)
  return [a + weight * b for a, b in pairs(first, second)]


def cosine(correct, lengths, truncated, limit=1000):
  """TRL 1.16: 1 to 0.5 if right, −1 to −0.5 if wrong, clamped at `limit`.

  What is truncated gets −0.5, as the paper's appendix has it.
  """
  rewards = []
  for c, n, cut in pairs(correct, lengths, truncated):
    at_start, at_end = (1.0, 0.5) if c else (-1.0, -0.5)
    wave = math.cos(min(n / limit, 1.0) * math.pi)
    reward = at_end + 0.5 * (at_start - at_end) * (1 + wave)
    rewards.append(-0.5 if cut else reward)
  return rewards


def repetition(tokens, ngram=3, worst=-1.0):
  """TRL 1.16: the share of n-grams that were there before, of one row."""
  grams = [tuple(tokens[i : i + ngram]) for i in range(len(tokens) - ngram + 1)]
  return worst * (1 - len(set(grams)) / len(grams)) if grams else 0.0


# Selection, cuts, silence, and a loss.


def gfpo_keep(rewards, lengths, k, metric='length'):
  """The k shortest, or the k with most reward per token, short ones first."""
  scores = [
    (0.0 if metric == 'length' else -r / n, n)
    for r, n in pairs(rewards, lengths)
  ]
  kept = sorted(range(len(lengths)), key=lambda i: scores[i])[:k]
  return [i in kept for i in range(len(lengths))]


def kept_advantages(rewards, keep, eps=1e-4):
  (kept,) = advantages([of_correct(keep, rewards)], eps=eps)
  kept = iter(kept)
  return [next(kept) if k else 0.0 for k in keep]


def qlpo_counts(correct, m=8, a=1 / 3):
  """Kept of (short right, long right, short wrong, long wrong)."""
  size = sum(correct)
  right = math.floor(m * size / len(correct) + 0.5)
  short, long = qlpo_halves(right, size, a)
  long_wrong, short_wrong = qlpo_halves(m - right, len(correct) - size, a)
  return short, long, short_wrong, long_wrong


def qlpo_halves(wanted, size, a):
  """Of the preferred half and of the other; what one lacks the other gives."""
  half = math.ceil(size / 2)
  most = min(math.ceil(wanted / (1 + a) - 1e-9), half)
  rest = min(wanted - most, size - half)
  return wanted - rest, rest


def dot_cut(correct, lengths, alpha=3.0, slack=32):
  """The length that each completion keeps."""
  if not all(correct):
    return list(lengths)
  limit = int(mean(lengths) + alpha * sample_sd(lengths))
  return [limit if n - limit >= slack else n for n in lengths]


def sas_silent(correct, confidence, share=0.3):
  """Silent steps of one completion, from each step's mean log-probability."""
  count = math.ceil(len(confidence) * share - 1e-9)
  order = sorted(
    range(len(confidence)),
    key=lambda i: confidence[i] if correct else -confidence[i],
  )
  return [i in order[:count] for i in range(len(confidence))]


def drpo(correct, lengths, scores, cap=4096, lam=0.1, tau=10.0):
  """The loss of one group, from each completion's mean log-prob."""
  right = of_correct(correct, scores)
  wrong = of_correct([not c for c in correct], scores)
  if not right or not wrong:
    return 0.0
  raw = [math.exp((1 - n / cap) / lam) for n in of_correct(correct, lengths)]
  pull = sum(w / sum(raw) * s for w, s in pairs(raw, right))
  return tau * math.log(mean([math.exp(s / tau) for s in wrong])) - pull


def drpo_advantages(correct, lengths, scores, step=1e-4):
  """−G times the slope of that loss in each score, by differences."""
  slopes = []
  for i in range(len(scores)):
    ahead, behind = list(scores), list(scores)
    ahead[i] += step
    behind[i] -= step
    rise = drpo(correct, lengths, ahead) - drpo(correct, lengths, behind)
    slopes.append(rise / (2 * step))
  return [-len(scores) * slope for slope in slopes]


def o1_pruner(groups, lengths, a=2.0):
  """Clipped scores of each problem's completions, standardised over all."""
  scores = [
    [
      clip((mean(ns) - n) / n + a * (c - mean(cs)), -2, 4)
      for c, n in pairs(cs, ns)
    ]
    for cs, ns in pairs(groups, lengths)
  ]
  flat = [x for xs in scores for x in xs]
  middle, sd = mean(flat), population_sd(flat)
  return [[(x - middle) / sd for x in xs] for xs in scores]
