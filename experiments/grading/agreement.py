# SPDX-License-Identifier: Apache-2.0
"""How often do we and math-verify agree on ordinary answers, and where not?

  python experiments/grading/agreement.py --data=<folder with the data sets>

Prints how many golds the first tier reads, agreement by kind of pair, the
share that the first tier decides, and every disagreement.
"""

import argparse
import collections
import logging

import math_verify
import pairs

from lapo_jax.tasks import _equivalence, _forms, _spelling


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--data', required=True)
  flags = parser.parse_args()

  for name, answers in pairs.golds(flags.data).items():
    texts = [_spelling.clean(a) for a in answers]
    read = sum(bool(_forms.readings(t)) for t in texts)
    words = sum(bool(not _forms.readings(t) and _spelling.words(t))
                for t in texts)
    print(f'{name}: {len(texts)} golds, {read} read, {words} words, '
          f'{len(texts) - read - words} left to math-verify')

  logging.getLogger('math_verify').setLevel(logging.ERROR)
  total, agreed, decided = (collections.Counter() for _ in range(3))
  disagreements = []
  for kind, answer, gold in pairs.ordinary(flags.data):
    theirs = bool(math_verify.verify(_theirs(gold), _theirs(answer)))
    try:
      ours = _equivalence.equal(answer, gold)
    except TimeoutError:
      ours = None
    total[kind] += 1
    agreed[kind] += ours == theirs
    decided[kind] += _equivalence.decide(answer, gold) is not None
    if ours != theirs:
      disagreements.append((kind, answer, gold, ours))
  for kind in total:
    print(f'{kind}: {total[kind]} pairs, {agreed[kind]} agree, '
          f'{decided[kind]} decided by the first tier')
  for name, kinds in (('all', set(total)),
                      ('all but lookalikes',
                       {kind for kind in total if 'lookalike' not in kind})):
    n, alike, first = (sum(count[kind] for kind in kinds)
                       for count in (total, agreed, decided))
    print(f'{name}: {n} pairs, agreement {alike / n:.2%}, '
          f'first tier {first / n:.2%}')
  for kind, answer, gold, ours in disagreements:
    verdict = {True: 'same', False: 'different', None: 'late'}[ours]
    print(f'{verdict} to us: {answer!r} for {gold!r} ({kind})')


def _theirs(text: str) -> list:
  """As its authors advise: gold in a box, LaTeX first."""
  return math_verify.parse(f'\\boxed{{{text}}}')


if __name__ == '__main__':
  main()
