# SPDX-License-Identifier: Apache-2.0
r"""Finds the answer in a completion and compares it with the gold answer.

Model text is hostile: nothing here evaluates it, every function is linear in
the text, and sizes are capped before any arithmetic. A completion's tail of
20,000 characters is searched, an answer has at most 200 characters and a
number at most 100 digits.

Equality is strict, since a false "correct" teaches the policy to cheat: units
are not guessed, `5` is neither `5%` nor `500%`, and an empty gold answer
equals nothing.
"""

from fractions import Fraction
import re
import unicodedata

_MAX_TAIL = 20_000
_MAX_ANSWER = 200
_MAX_DIGITS = 100

_CLOSE = '</think>'
_OPEN = '<think>'

# No pattern below has two ways to match the same characters: no backtracking
# worth the name. Digits are spelt out, \d would match every script's.
_INTEGER = r'[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+'
_IN_TEXT = re.compile(
    r'(?:(?<![0-9A-Za-z)])[-+\u2212])?'     # a sign, not the minus of 10-7
    r'\\?\$?'
    rf'(?:(?:{_INTEGER})(?:\.[0-9]+)?|(?<![0-9])\.[0-9]+)'
    r'(?:/[0-9]+)?(?: ?\\?%)?')
_DECIMAL = re.compile(
    rf'([-+]?) ?\$? ?({_INTEGER})?(?:\.([0-9]*))?')
_FRAC = re.compile(
    r'([-+]?) ?\\frac ?(?:\{([^{}]*)\}|([0-9])) ?(?:\{([^{}]*)\}|([0-9]))')
_BY_PUNCTUATION = re.compile(r' ?([^\w ]) ?')

_SPELLINGS = (
    ('\u2212', '-'),                              # the typographic minus
    ('\\dfrac', '\\frac'), ('\\tfrac', '\\frac'),
    ('{,}', ','), ('\\!', ''), ('\\,', ''), ('\\;', ' '), ('\\ ', ' '),
    ('\\%', '%'), ('\\$', '$'),
    ('\\left', ''), ('\\right', ''),
)


def after_thinking(text: str, thinking: bool = True) -> str:
  """The part of a completion in which an answer counts.

  That is what follows the last `</think>`. Thoughts that were never closed
  hold no answer, whatever they contain.

  Args:
    text: a completion, without its prompt.
    thinking: the prompt already opened `<think>`, so a completion without
      `</think>` is all thoughts. False: it is all answer, unless it opens
      `<think>` itself.

  Returns:
    The text, '' when the thoughts never end.
  """
  _, closed, tail = text.rpartition(_CLOSE)
  if (thinking and not closed) or _OPEN in tail:
    return ''
  return tail


def last_boxed(text: str) -> str | None:
  r"""What the last `\boxed` (or `\fbox`) holds.

  Nested braces are followed: `\boxed{\frac{1}{2}}` gives `\frac{1}{2}`.
  `\boxed 5` gives `5`.

  Returns:
    The content; None without a box, or when the last one is empty, has no
    closing brace or holds more than 200 characters.
  """
  text = text[-_MAX_TAIL:]
  start = max(text.rfind('\\boxed') + len('\\boxed'),
              text.rfind('\\fbox') + len('\\fbox'))
  if start < len('\\boxed'):  # neither was found
    return None
  # Two characters more than an answer: its braces. Spaces before them count.
  text = text[start:start + _MAX_ANSWER + 2].lstrip()
  if not text.startswith('{'):
    words = text.split('$', 1)[0].split(None, 1)
    return (words[0].rstrip('.,;') or None) if words else None
  depth, escaped = 0, False
  for i, letter in enumerate(text):
    if escaped or letter == '\\':  # \{ and \} are letters, not structure
      escaped = not escaped
      continue
    depth += (letter == '{') - (letter == '}')
    if depth == 0:
      return text[1:i].strip() or None
  return None


def first_number(text: str) -> str | None:
  """The first number in the text as written, None without one."""
  found = _IN_TEXT.search(text[:_MAX_TAIL])
  return found.group() if found else None


def last_number(text: str) -> str | None:
  """The last number in the text as written, None without one."""
  found = _IN_TEXT.findall(text[-_MAX_TAIL:])
  return found[-1] if found else None


def equal(answer: str, gold: str) -> bool:
  r"""Whether two answers are the same.

  Two numbers are compared by exact rational value: `1,000`, `0.50`, `1/2`,
  `\frac{1}{2}`, `−½`, `+3`, `$5`; `%` makes another kind of number. A number
  never equals what is not one. Anything else is compared as text, after
  levelling spellings and spaces.

  Args:
    answer: what the model answered.
    gold: what the data set says.
  """
  if max(len(answer), len(gold)) > _MAX_ANSWER:
    return False
  answer, gold = _clean(answer), _clean(gold)
  value, gold_value = _value(answer), _value(gold)
  if value is not None or gold_value is not None:
    return value == gold_value
  # `1 2` is not `12`, yet `x + 1` is `x+1`.
  answer = _BY_PUNCTUATION.sub(r'\1', answer)
  return bool(answer) and answer == _BY_PUNCTUATION.sub(r'\1', gold)


def _clean(text: str) -> str:
  """One spelling for what is written in several ways."""
  for spelling, ours in _SPELLINGS:
    text = text.replace(spelling, ours)
  text = ' '.join(text.split()).strip('$ ')
  return text.removesuffix('.').rstrip('$ ')


def _value(text: str) -> tuple[Fraction, str] | None:
  """The rational value and its unit ('%' or ''), None if not a number."""
  number = text.removesuffix('%').rstrip()
  unit = '%' if number != text else ''
  frac = _FRAC.fullmatch(number)
  if frac:
    sign, *parts = frac.groups()
    over, under = (_decimal(part) for part in parts if part is not None)
  else:
    sign = ''
    over, slash, under = number.partition('/')
    over, under = _decimal(over), _decimal(under if slash else '1')
  if over is None or not under:  # not a number, or a division by zero
    return None
  return (-over if sign == '-' else over) / under, unit


def _decimal(text: str) -> Fraction | None:
  """The value of an integer or decimal, or of a sign and one vulgar ½."""
  text = text.strip()
  if not text:
    return None
  vulgar = unicodedata.decomposition(text[-1])
  if vulgar.startswith('<fraction>') and text[:-1].strip() in ('', '-', '+'):
    # '<fraction> 0031 2044 0032': code points of numerator, slash, denominator.
    digits = ''.join(chr(int(code, 16)) for code in vulgar.split()[1:])
    over, _, under = digits.partition('\u2044')
    value = Fraction(int(over), int(under)) if over and under else None
    return -value if value and text.startswith('-') else value
  found = _DECIMAL.fullmatch(text)
  if not found:
    return None
  sign, whole, part = found.groups()
  whole, part = (whole or '').replace(',', ''), part or ''
  if not 0 < len(whole + part) <= _MAX_DIGITS:
    return None
  value = Fraction(int(whole + part), 10 ** len(part))
  return -value if sign == '-' else value
