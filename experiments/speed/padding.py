# SPDX-License-Identifier: Apache-2.0
"""How many slots the update computes, by how a batch's rows lie.

  python -m experiments.speed.padding

Counts, exactly: slots that run through the model, and pairs of slots that
attention's scores are made for, of 512 completions whose lengths are drawn
from a lognormal distribution, for rows that are as long as the longest, split
by length (`updates.short_share`) and packed (`updates.pack`). Seconds.
"""

import argparse

import numpy as np

from lapo_jax import ops, packing

_ROWS, _MICROBATCH, _SHORT_SHARE = 512, 16, 0.75
# (median tokens of a completion, σ of its logarithm, prompt tokens, cap)
_CASES = {
    'even lengths': (1000, 0.2, 128, 4096),
    'heavy tail': (1000, 0.8, 128, 4096),
    'heavier tail': (400, 1.2, 128, 8192),
    'short, long prompts': (40, 0.6, 100, 256),
}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--seed', type=int, default=0)
  flags = parser.parse_args()
  print('| lengths | mean, longest | as long as the longest | split | packed | '
        'packed, of real tokens | scores: split | scores: packed |\n'
        '|---|---|---|---|---|---|---|---|')
  for name, (median, sigma, prompt, cap) in _CASES.items():
    rng = np.random.default_rng(flags.seed)
    lengths = np.clip(rng.lognormal(np.log(median), sigma, _ROWS), 1,
                      cap).astype(int)
    # Prompts of one batch differ too.
    prompts = rng.integers(prompt // 2, prompt + 1, _ROWS)
    print(f'| {name} | {lengths.mean():,.0f}, {lengths.max():,} | ' +
          ' | '.join(_cells(lengths, prompts, cap)) + ' |')


def _cells(lengths, prompts, cap):
  prompt_slots = ops.bucket(int(prompts.max()), 1 << 20)
  longest = ops.bucket(int(lengths.max()), cap)
  whole = [(_ROWS, prompt_slots + longest)]
  num_short = int(_SHORT_SHARE * _ROWS) // _MICROBATCH * _MICROBATCH
  short = ops.bucket(int(np.sort(lengths)[num_short - 1]), longest)
  split = [(num_short, prompt_slots + short),
           (_ROWS - num_short, prompt_slots + longest)]
  plan = packing.plan(lengths + prompts, most_slots=prompt_slots + longest,
                      microbatch_size=_MICROBATCH)
  # Microbatches without a completion are skipped.
  parts = plan.num_rows // _MICROBATCH
  filled = len(np.unique(plan.rows % parts)) * _MICROBATCH
  packed = [(filled, plan.num_slots)]
  slots = lambda parts: sum(rows * size for rows, size in parts)
  scores = lambda parts: sum(rows * size**2 for rows, size in parts)
  share = lambda count, parts: f'{100 * count(parts) / count(whole):.0f} %'
  return (f'{slots(whole):,}', share(slots, split), share(slots, packed),
          f'{slots(packed) / (lengths + prompts).sum():.2f} ×',
          share(scores, split), share(scores, packed))


if __name__ == '__main__':
  main()
