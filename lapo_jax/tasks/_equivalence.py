# SPDX-License-Identifier: Apache-2.0
r"""Whether an answer means the same as the gold one.

Two tiers. Our own reader (`_forms`, `_comparison`) decides nearly everything
in a tenth of a millisecond, exactly and with bounded effort. What it leaves
open goes to math-verify (github.com/huggingface/Math-Verify), which is sympy
inside: first through a filter that refuses what is hostile (towers of
exponents, large factorials, deep nesting, code), then under a soft deadline.

Departures from math-verify: 5 is neither 5\% nor 500\%, (1,2) is not \{1,2\}
nor [1,2] nor a bare list, 1, 1 is not 1, 8 cm is not 8 inches, 0.3333 is not
1/3, and equations are compared by their terms, not by solving them.
"""

from collections.abc import Callable
from fractions import Fraction
import functools
import importlib.util
import logging
import math
import re
import signal
import threading
from typing import Any

from lapo_jax.tasks import _algebra, _comparison, _forms, _spelling

_MAX_ANSWER = 200
_SOFT_DEADLINE = 1.0  # seconds of CPU of math-verify on one pair

_MAX_NESTING = 8
_MAX_BRACKETS = 40
_MAX_POWER = 2000     # product of the numbers in all exponents
_MAX_EXPANSION = 20   # likewise, of exponents of brackets
_MAX_SETS = 4         # unions and the like: sympy simplifies them pairwise
_MAX_SCRIPTS = 10     # sub- and superscripts: a chain takes exponential time

# What math-verify is given at all: everything else is refused.
_CHARACTERS = re.compile(r"[A-Za-z0-9 \\{}()\[\]|+\-*/^_=<>.,:;!%&']*")
_KNOWN = {
    'frac', 'sqrt', 'pi', 'infty', 'cdot', 'times', 'div', 'pm', 'mp', 'circ',
    'le', 'ge', 'ne', 'neq', 'in', 'cup', 'cap', 'setminus', 'emptyset',
    'varnothing', 'approx', 'left', 'right', 'text', 'textbf', 'textrm',
    'textit', 'mbox', 'mathrm', 'mathbf', 'mathbb', 'mathcal', 'begin', 'end',
    'sin', 'cos', 'tan', 'cot', 'sec', 'csc', 'arcsin', 'arccos', 'arctan',
    'sinh', 'cosh', 'tanh', 'log', 'ln', 'lg', 'exp', 'binom', 'lfloor',
    'rfloor', 'lceil', 'rceil', 'alpha', 'beta', 'gamma', 'delta', 'epsilon',
    'varepsilon', 'theta', 'lambda', 'mu', 'nu', 'rho', 'sigma', 'tau', 'phi',
    'varphi', 'psi', 'omega', 'Delta', 'Omega', 'ell', 'angle', 'triangle',
    'overline', 'vec', 'quad', 'qquad', 'mid', 'vert', 'lvert',
    'rvert', 'and', 'or', 'land', 'lor', 'to', 'equiv', 'sim', 'prime'}
_CODE = re.compile(
    r'__|\*\*|!\s*!|[A-Za-z]\.[A-Za-z_]|::|'
    r'(?<![A-Za-z\\])(?!(?:sin|cos|tan|log|sqrt|exp|cot|sec|csc)\b)'
    r'[A-Za-z]{3,}\s*\(')
_TEXT = re.compile(r'\\(?:text[a-z]*|mbox|mathrm)\s*\{([^{}]*)\}')
_LONG_NUMBER = re.compile(r'[0-9]{21}')
_FACTORIAL = re.compile(r'(?:(?<![0-9.])[0-9]{1,2}|(?<![A-Za-z0-9])[A-Za-z]|'
                        r'\([A-Za-z0-9] *[+-] *[A-Za-z0-9]\))\s*!')
_SMALL = r'\{ *(?:[0-9]{1,2}|[0-9]?[A-Za-z](?: *[+-] *[0-9]{1,2})?) *\}'
_BINOMIAL = re.compile(rf'\\binom\s*{_SMALL}\s*{_SMALL}')
_SET_OPERATION = re.compile(r'\\(?:cup|cap|setminus)(?![A-Za-z])')
_EXPONENT = re.compile(r'\^\s*(?:\{([^{}]*(?:\{[^{}]*\}[^{}]*)*)\}|\(([^()]*)\)'
                       r'|(\\?[A-Za-z]+|[-+]?[0-9]+))')

# What an exponent may expand: a bracket, or a function as in \cos^2.
_SUM_BEFORE = re.compile(r'(?:[)\]}|]|\\[a-z]{2,}) *$')


def available() -> bool:
  """Whether math-verify is installed; does not import it."""
  return importlib.util.find_spec('math_verify') is not None


@functools.cache
def require() -> None:
  """Warms math-verify up: a second that no answer's deadline should pay.

  Raises:
    ValueError: it is not installed.
  """
  try:
    import math_verify  # noqa: F401
  except ImportError as error:
    raise ValueError(
        'grading mathematics needs math-verify, which is not installed: '
        "pip install 'math-verify>=0.9'.") from error
  # It says at every start that its own deadline is off: ours is on.
  logging.getLogger('math_verify').setLevel(logging.ERROR)
  _verified(r'\frac{x}{2}', r'0.5 x')


def equal(answer: str, gold: str, *, unit: str = '',
          tolerance: float = 0.0) -> bool:
  """Whether the answer means the same as the gold one.

  Args:
    answer: what the model answered, without its box.
    gold: what the data set says.
    unit: the gold answer's unit where the data set gives it apart; the answer
      may state it or not.
    tolerance: how far a rational number may lie from the gold one.

  Raises:
    ValueError: math-verify is needed and not installed.
    TimeoutError: math-verify took longer than a second. What it leaves behind
      in this process is unknown: end it.
  """
  if max(len(answer), len(gold)) > _MAX_ANSWER:
    return False
  if unit:
    answer, gold = _with_unit(answer, gold, unit)
  if tolerance:
    numbers = _number(answer), _number(gold)
    if None not in numbers:
      return abs(numbers[0] - numbers[1]) <= Fraction(str(tolerance))
  decided = decide(answer, gold)
  if decided is not None:
    return decided
  answer, gold = _spelling.spell(answer), _spelling.spell(gold)
  if hostile(answer) or hostile(gold):
    return False
  return _guarded(lambda: _verified(answer, gold))


def decide(answer: str, gold: str) -> bool | None:
  """The verdict of the first tier, None if it has none."""
  answer, gold = _spelling.clean(answer), _spelling.clean(gold)
  if not answer or not gold:
    return False
  if answer == gold:
    return True
  words, gold_words = _spelling.words(answer), _spelling.words(gold)
  if words and words == gold_words:
    return True
  if words and gold_words and re.search('[A-Z]{2}', gold):
    return False  # names of points and sequences of letters are no products
  golds = _forms.readings(gold)
  answers = _forms.readings(answer)
  if (gold_words and not golds) or (words and not answers):
    return False
  results = {_comparison.same(x, y) for x in answers for y in golds}
  if True in results:
    return True
  return None if None in results or not results else False


def readable(gold: str) -> bool:
  """Whether a gold answer can be read, by us or by math-verify.

  Raises:
    ValueError: math-verify is needed and not installed.
  """
  if len(gold) > _MAX_ANSWER:
    return False
  text = _spelling.clean(gold)
  if _spelling.words(text) or _forms.readings(text):
    return True
  text = _spelling.spell(gold)
  if not text.strip() or hostile(text):
    return False
  try:
    return _guarded(lambda: bool(_parsed(text)))
  except TimeoutError:
    return False


def hostile(text: str) -> bool:
  """Whether math-verify might choke on a text, or should never see it."""
  if len(text) > _MAX_ANSWER or not _CHARACTERS.fullmatch(text):
    return True
  if set(re.findall(r'\\([A-Za-z]+)', text)) - _KNOWN:
    return True
  depth = deepest = brackets = 0
  for letter in text:
    brackets += letter in '{(['
    depth += (letter in '{([') - (letter in '})]')
    deepest = max(deepest, depth)
  if deepest > _MAX_NESTING or brackets > _MAX_BRACKETS:
    return True
  if any(pattern.search(text) for pattern in (_CODE, _LONG_NUMBER)):
    return True
  if '\\binom' in _BINOMIAL.sub('', text):
    return True
  if len(_SET_OPERATION.findall(text)) > _MAX_SETS:
    return True
  # math-verify drops words, whatever they say.
  if any(_spelling.says_more(words) for words in _TEXT.findall(text)
         if words.strip(' ,') not in ('and', 'or')):
    return True
  if _FACTORIAL.sub('', text).count('!'):
    return True
  return _is_tower(text)


def _is_tower(text: str) -> bool:
  """Whether exponents hold exponents, or multiply to a large power."""
  found = list(_EXPONENT.finditer(text))
  if len(found) < text.count('^'):
    return True  # one in another, or none that we understand
  if text.count('_') + len(found) > _MAX_SCRIPTS:
    return True
  power = expansion = 1
  for match in found:
    exponent = next(group for group in match.groups() if group is not None)
    if '!' in exponent or text[match.end():].lstrip().startswith('^'):
      return True
    size = math.prod(int(n) or 1 for n in re.findall('[0-9]+', exponent))
    power *= size
    if _SUM_BEFORE.search(text[:match.start()]):
      expansion *= size
  return power > _MAX_POWER or expansion > _MAX_EXPANSION


def _verified(answer: str, gold: str) -> bool:
  import math_verify
  # Its own deadline works in main threads only and is off.
  return math_verify.verify(_parsed(gold), _parsed(answer),
                            timeout_seconds=None)


def _parsed(text: str) -> list:
  """What math-verify finds; its plain-text reader uses parse_expr: not used."""
  import math_verify
  return math_verify.parse(
      f'\\boxed{{{text}}}', [math_verify.LatexExtractionConfig()],
      fallback_mode='no_fallback', parsing_timeout=None)


class _Late(BaseException):
  """The soft deadline; no `except Exception` of a library stops it."""


def _guarded(run: Callable[[], bool]) -> bool:
  """Runs math-verify; TimeoutError after a second of CPU, in a main thread.

  CPU, since a busy machine must make no answer late. What sleeps or sits in
  one call of C for long is ended by the parent of a grading process.
  """
  require()
  if threading.current_thread() is not threading.main_thread():
    return run()

  def ring(signum: int, frame: Any) -> None:
    del signum, frame
    raise _Late

  previous = signal.signal(signal.SIGPROF, ring)
  try:
    # It rings again: the first one may be lost in a destructor.
    signal.setitimer(signal.ITIMER_PROF, _SOFT_DEADLINE, _SOFT_DEADLINE / 4)
    try:
      return run()
    finally:
      signal.setitimer(signal.ITIMER_PROF, 0)
  except _Late:
    raise TimeoutError(
        f'math-verify took more than {_SOFT_DEADLINE} s of CPU.') from None
  finally:
    signal.signal(signal.SIGPROF, previous)


def _number(text: str) -> Fraction | None:
  """The rational number that a text is, a percent sign being part of a unit."""
  forms = _forms.readings(_spelling.clean(text))
  if not forms or forms[-1].kind != 'value':
    return None
  return _algebra.rational(forms[-1].parts[0])


def _with_unit(answer: str, gold: str, unit: str) -> tuple[str, str]:
  """The pair such that the answer may state the unit or leave it out."""
  end = _plain(unit)
  for start in range(len(answer)):
    if _plain(answer[start:]) in (end, f'{end}s', end.removesuffix('s')):
      return answer[:start], gold
  # The answer states no unit, or another: that is for the comparison.
  measure = re.fullmatch('([A-Za-z]+)([23]?)', end)
  if not measure:
    return answer, gold
  name, power = measure.groups()
  return answer, f'{gold}\\text{{{name}}}' + (f'^{power}' if power else '')


def _plain(text: str) -> str:
  """A unit's letters, however it is set."""
  return re.sub(r'\\(?:text|mathrm|mbox|circ(?![A-Za-z]))|[\s${}\\~^]',
                lambda found: '\u00b0' if 'circ' in found.group() else '',
                text)
