# SPDX-License-Identifier: Apache-2.0
r"""The text of an answer: one spelling for many, its words, its unit.

`\dfrac` and `\tfrac` are `\frac`, `\left(` is `(`, `1,\!000` is `1000`,
`\mbox` is `\text`, `≤` is `\le`. A unit counts as one only inside `\text`,
and units that are unknown here are any unit.
"""

import re

_SPELLINGS = (
    ('\u2212', '-'), ('\u00d7', r'\times '), ('\u00b7', r'\cdot '),
    ('\u03c0', r'\pi '), ('\u221e', r'\infty '), ('\u00b0', r'^\circ '),
    ('\u222a', r'\cup '), ('\u2208', r'\in '), ('\u2264', r'\le '),
    ('\u2265', r'\ge '), ('\u00b1', r'\pm '), ('\u221a', r'\sqrt '),
    ('\u00b2', '^2'), ('\u00b3', '^3'), ('\u00bd', r'\frac{1}{2}'),
    ('\u00bc', r'\frac{1}{4}'), ('\u00be', r'\frac{3}{4}'),
    (r'\dfrac', r'\frac'), (r'\tfrac', r'\frac'), (r'\cfrac', r'\frac'),
    (r'\dbinom', r'\binom'), (r'\tbinom', r'\binom'),
    (r'\displaystyle', ''),
    (r'\lbrace', r'\{'), (r'\rbrace', r'\}'), (r'\degree', r'^\circ '),
    (r'\leqslant', r'\le '), (r'\geqslant', r'\ge '), (r'\leq', r'\le '),
    (r'\geq', r'\ge '), (r'\lt', '<'), (r'\gt', '>'), (r'\%', '%'),
    ('{bmatrix}', '{pmatrix}'), ('{matrix}', '{pmatrix}'),
    (r'\(', ''), (r'\)', ''),
)
# 1,000 with the comma that TeX does not space: {,} and ,\! and \,
_THOUSANDS = re.compile(
    r'(?<=[0-9])(?:,\\!|\{,\}|\\,|\\!,) *(?=[0-9]{3}(?![0-9]))')
_SIZES = re.compile(r'\\(?:left|right|[bB]igg?[lr]?)(?![a-z])\.?')
_SPACES = re.compile(
    r'\\(?:[,;:! ]|q?quad(?![a-z])|phantom *(?:\{[^{}]*\}|[^{\\]))|~|\s+')
_BETWEEN = re.compile(
    r',? *(?:\\text *\{ *,? *(?:and|or),? *\}|(?<![A-Za-z\\])(?:and|or)'
    r'(?![A-Za-z])) *,?')
_WRAPPED = re.compile(
    r'\\(?:text(?:normal|bf|it|rm|sf)?|mbox|mathrm|mathbf|mathit|mathsf|'
    r'operatorname|rm|bf) *\{([^{}]*)\}')
_PERCENT = re.compile(r'\\text\{ *percent *\}')
_BOLD_NUMBER = re.compile(r'^\\text\{([-+0-9.,]+)\}$')
_TRAILING_UNIT = re.compile(
    r'(.*[^ ]) *\\text\{([^{}]*)\} *(?:\^ *(?:\{ *([0-9]) *\}|([0-9])))?')
_WORDS = re.compile(r"[A-Za-z][A-Za-z0-9 .'-]*")
_OPENING, _CLOSING = '([{\u27e8', ')]}\u27e9'  # ⟨ ⟩ stand for \{ \}

_MEASURES = {
    'mm': 'millimet', 'cm': 'centimet', 'm': 'met', 'km': 'kilomet',
    'in': 'inch', 'ft': 'foot', 'yd': 'yard', 'mi': 'mile', 's': 'second',
    'min': 'minute', 'h': 'hour', 'day': 'day', 'week': 'week',
    'month': 'month', 'year': 'year', 'g': 'gram', 'kg': 'kilogram',
    'lb': 'pound', 'oz': 'ounce', 'L': 'liter', 'mL': 'milliliter',
    'gal': 'gallon', 'mph': 'mph', 'cent': 'cent', 'dollar': 'dollar',
    'degree': 'degree', 'radian': 'radian', 'am': 'am', 'pm': 'pm'}
_MEASURE_OF = {
    spelling: unit for unit, stem in _MEASURES.items()
    for spelling in (unit, f'{unit}s', stem, f'{stem}s', f'{stem}es',
                     f'{stem}er', f'{stem}ers', f'{stem}re', f'{stem}res')
} | {'feet': 'ft', 'sec': 's', 'secs': 's', 'hr': 'h', 'hrs': 'h',
     'usd': 'dollar', 'l': 'L', 'ml': 'mL', 'litre': 'L', 'litres': 'L'}
# What says more than a unit does: 5 \text{ or 6}, 5 \text{ million}.
_NO_UNIT = re.compile(
    r'[^A-Za-z ./^-]|\b(?:or|and|not|no|to|by|plus|minus|times|over|half|'
    r'squared|cubed|dozen|hundred|thousand|[mb]illion|percent)\b', re.I)
_DIMENSIONS = {'square': '2', 'sq': '2', 'cubic': '3', 'cu': '3'}


def spell(text: str) -> str:
  """One spelling of symbols, in TeX."""
  text = _THOUSANDS.sub('', text.replace(r'\$', '').replace('$', ''))
  for spelling, ours in _SPELLINGS:
    text = text.replace(spelling, ours)
  return text


def clean(text: str) -> str:
  """One spelling for all that is written in several ways, for `read`."""
  text = spell(text).replace('\\\\', '\u240d')  # rows of a matrix
  text = _SIZES.sub('', text).replace(r'\{', '\u27e8').replace(r'\}', '\u27e9')
  text = _SPACES.sub(' ', text)
  text = ' '.join(_WRAPPED.sub(r'\\text{\1}', text).split()).rstrip('., ')
  text = _PERCENT.sub('%', text)
  return _BOLD_NUMBER.sub(r'\1', text).removeprefix(r'\approx').lstrip()


def words(text: str) -> tuple[str, ...]:
  r"""The words that a cleaned text lists, sorted, () if it is no words.

  `\text{(A)}` is `A` and `\text{Even}` is `even`; single letters keep their
  case.
  """
  parts = split(listed(text), ',')
  found = []
  for part in [p for whole in parts for p in
               _WRAPPED.sub(r'\1', whole).split(',')]:
    part = part.strip(' .')
    if part.startswith('(') and part.endswith(')'):
      part = part[1:-1].strip()
    if not _WORDS.fullmatch(part):
      return ()
    found.append(part if len(part) == 1 else part.casefold())
  return tuple(sorted(found))


def listed(text: str) -> str:
  """The text with commas for `and` and `or`."""
  return _BETWEEN.sub(',', text)


def without_unit(text: str) -> tuple[str, str]:
  """The text and the unit at its end: '8 \\text{ sq. cm}' is ('8', 'cm2')."""
  unit = ''
  while found := _TRAILING_UNIT.fullmatch(text):
    if says_more(found.group(2)):
      break
    text, unit, *power = found.groups()
    unit = _unit(unit) + (power[0] or power[1] or '')
  return text, unit if unit.rstrip('23') in _MEASURES else ''


def says_more(words: str) -> bool:
  """Whether words after a number can be no unit of it."""
  return bool(_NO_UNIT.search(words))


def _unit(text: str) -> str:
  """A unit's one name, '' if it is none of those we know."""
  names = text.replace('.', '').split()
  power = ''.join(_DIMENSIONS.get(name.casefold(), '') for name in names)
  known = [_MEASURE_OF.get(name) or _MEASURE_OF.get(name.casefold(), '')
           for name in names if name.casefold() not in _DIMENSIONS]
  return f'{known[0]}{power}' if len(known) == 1 and known[0] else ''


def is_bracketed(text: str) -> bool:
  """Whether the first bracket closes at the very end."""
  depth = 0
  for i, letter in enumerate(text):
    depth += (letter in _OPENING) - (letter in _CLOSING)
    if depth == 0:
      return i == len(text) - 1 and i > 0
  return False


def split(text: str, separators: str) -> list[str]:
  """Cuts at separators that stand in no bracket, of whatever kind."""
  parts, start, depth = [], 0, 0
  for i, letter in enumerate(text):
    depth += (letter in _OPENING) - (letter in _CLOSING)
    if depth == 0 and letter in separators:
      parts.append(text[start:i])
      start = i + 1
  return [*parts, text[start:]]
