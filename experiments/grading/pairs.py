# SPDX-License-Identifier: Apache-2.0
"""Answers to grade: golds of real data sets, respelt, exchanged, nearly right.

Also a batch in which every answer is hostile. All of it is seeded.
"""

import json
import pathlib
import random
import re

FILES = ('math_train.json', 'math500.json', 'aime_train.json', 'aime24.json',
         'amc23.jsonl', 'olympiad_bench.json')
_PLAIN = re.compile(r'-?[0-9]+')


def golds(folder: str) -> dict[str, list[str]]:
  """The gold answers of each file, as its task reads them; no empty ones."""
  found = {}
  for name in FILES:
    text = (pathlib.Path(folder) / name).read_text()
    rows = (json.loads(text) if name.endswith('.json') else
            [json.loads(line) for line in text.splitlines() if line.strip()])
    answers = [row['answer'] for row in rows]
    answers = [', '.join(a) if isinstance(a, list) else a for a in answers]
    found[name] = [re.sub(r'(?<!\\)\$', '', str(a)) for a in answers if a]
  return found


def respelt(gold: str) -> str:
  """The same answer in another hand."""
  text = re.sub(r'\\[dt]?frac(?=\{)', r'\\dfrac', gold)
  text = re.sub(r'(?<![\\a-z])(?:\\left)?\(', r'\\left( ', text)
  text = re.sub(r'(?<!\\right)\)', r' \\right)', text)
  text = text.replace(',\\!', '{,}').replace(', ', ',').replace('+', ' + ')
  text = re.sub(r'(?<![0-9_^{.,])([0-9]+)\.([0-9]+)(?![0-9])', r'\1.\g<2>0',
                text)
  if _PLAIN.fullmatch(text):
    text += '.0'
  if re.fullmatch(r'[a-z]+', text) and len(text) > 3:
    text = rf'\text{{{text}}}'
  return f' {text} '


def near_misses(gold: str) -> list[str]:
  """Answers that are almost the gold one, and wrong."""
  text = gold.strip()
  missed = []
  digits = [m.start() for m in re.finditer(r'(?<![_{])[0-9]', text)]
  if digits:
    i = digits[len(digits) // 2]
    missed.append(text[:i] + str((int(text[i]) + 1) % 10) + text[i + 1:])
  if re.fullmatch(r'-?[0-9.]+', text):
    missed.append(text + ', 1')
  if ' + ' in text or ' - ' in text:
    flipped = {' + ': ' - ', ' - ': ' + '}
    missed.append(re.sub(r' [+-] ', lambda m: flipped[m.group()], text,
                         count=1))
  elif text[:1] not in '-(0[' and not text[:2].isalpha() and (
      text[:2] not in (r'\{', r'\t', r'\m', r'\b')):
    missed.append('-' + text)
  parts = re.fullmatch(r'(\\left)?\((.*)(\\right)?\)', text)
  if parts and text.count('(') == 1 and ',' in text:
    inside = parts.group(2).removesuffix('\\right').split(',')
    missed.append(f'({", ".join(inside[::-1])})')
  return missed


def lookalikes(gold: str) -> list[str]:
  """Answers that math-verify takes for the gold one, by its own choice."""
  text = gold.strip()
  if re.fullmatch(r'-?[0-9.]+', text):
    return [text + r'\%']
  if re.fullmatch(r'\([^()]*,[^()]*\)', text):
    return [f'[{text[1:-1]}]']
  return []


def ordinary(folder: str, seed: int = 0) -> list[tuple[str, str, str]]:
  """(kind, answer, gold) of every gold that is no plain integer, and some."""
  rng = random.Random(seed)
  pairs = []
  for name, answers in golds(folder).items():
    plain = [a for a in answers if _PLAIN.fullmatch(a)]
    chosen = [a for a in dict.fromkeys(answers) if not _PLAIN.fullmatch(a)]
    chosen += rng.sample(plain, min(50, len(plain)))
    for gold in chosen:
      pairs.append((f'{name} respelt', respelt(gold), gold))
      pairs.append((f'{name} other', rng.choice(answers), gold))
      pairs += [(f'{name} near miss', answer, gold)
                for answer in near_misses(gold)]
      pairs += [(f'{name} lookalike', answer, gold)
                for answer in lookalikes(gold)]
  return pairs


def hostile() -> list[str]:
  """256 answers, none of them good."""
  kinds = [
      lambda n: f'{n}^{n}^{n}', lambda n: f'{n}**{n}**{n}',
      lambda n: f'{n}9999999!', lambda n: f'{n}00000!!',
      lambda n: '{' * (50_000 + n), lambda n: f"__import__('os').system('{n}')",
      lambda n: rf'\binom{{{n}99999}}{{{n}00000}}',
      lambda n: r'\frac{1}{' * (20 + n) + '1' + '}' * (20 + n),
      lambda n: chr(0x1f600 + n) * (10 + n), lambda n: f'10^{{10^{{{n}0}}}}',
      lambda n: '9' * (150 + n), lambda n: f'0.{"1" * (150 + n)}',
      lambda n: rf'\sum_{{k=1}}^{{10^{{{n}}}}} k!',
      lambda n: rf'\int_0^{{{n}0000}} e^{{x^x}} dx',
      lambda n: f'(({n}^{{99}})^{{99}})^{{99}}', lambda n: f'({n}^{{99}})!',
      lambda n: f'(a+b+c+d+e+f)^{{{60 + n}}}', lambda n: 'x_' * (40 + n),
      lambda n: '(1+' * (20 + n) + '1' + ')' * (20 + n),
      lambda n: r'\sqrt{' * (10 + n) + '2' + '}' * (10 + n),
      lambda n: f'\\sin(10^{{{n}00}})', lambda n: f'factorial({n}99999)',
      lambda n: rf'\lim_{{x\to {n}}} x^x',
      lambda n: rf'\log_{{{n}}} 10^{{9999}}',
      lambda n: ''.join(map(chr, range(0x300 + n, 0x370 + n))),
      lambda n: rf'\pmod{{{n}}}' * 10, lambda n: f'(x+{n})' * 30,
      lambda n: rf'\sqrt[{n}999]{{{"9" * 20}}}', lambda n: '1/' * 60 + str(n),
      lambda n: rf'\cos^{{{n}00}}(x+y+z)', lambda n: f'{n},' * 60,
      lambda n: rf'\begin{{pmatrix}}{"1&" * (60 + n)}1\end{{pmatrix}}',
  ]
  return [kind(n) for n in range(1, 9) for kind in kinds]
