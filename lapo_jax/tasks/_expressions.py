# SPDX-License-Identifier: Apache-2.0
r"""Reads one expression, in LaTeX or plain text, into an exact value.

A descent over the characters; nothing is evaluated as code. What has two
readings (`1/2x`, `x2`, `--5`, `2\frac{5}{3}`) and what it does not know are
Unread. `3\frac{1}{2}` is a mixed number, `\frac12` and `\sqrt2` take one
digit, `2^10` takes all its digits, `f(x)` of f, g and h is a function.
"""

from fractions import Fraction
import math
import re

from lapo_jax.tasks import _algebra

_MAX_DEPTH = 16
_MAX_DIGITS = 100

_NUMBER = re.compile(r'[0-9]+(?:\.[0-9]*)?|\.[0-9]+')
_MIXED = re.compile(
    r'([0-9]+) *\\frac *(?:\{ *([0-9]+) *\}|([0-9])) *'
    r'(?:\{ *([0-9]+) *\}|([0-9]))'
    r'|([0-9]+) +([0-9]+)/([0-9]+)(?! *[A-Za-z0-9\\({])')
_LETTERS = re.compile(r'[A-Za-z]+')
_MACRO = re.compile(r'\\([A-Za-z]+) *')
_SUBSCRIPT = re.compile(r' *_ *(?:\{([A-Za-z0-9, \\]{1,16})\}|([A-Za-z0-9]))')
_DEGREE = re.compile(r' *\^ *(?:\{ *\\circ *\}|\\circ(?![A-Za-z]))')
_TIMES = re.compile(r' *(?:\*(?!\*)|\\cdot(?![A-Za-z])|\\times(?![A-Za-z]))')
_OVER = re.compile(r' */| *\\div(?![A-Za-z])')
_POWER = re.compile(r' *(?:\^|\*\*)')

_FUNCTIONS = {'sin', 'cos', 'tan', 'cot', 'sec', 'csc', 'log', 'ln', 'lg',
              'arcsin', 'arccos', 'arctan', 'sinh', 'cosh', 'tanh'}
_GREEK = {'alpha', 'beta', 'gamma', 'delta', 'epsilon', 'varepsilon', 'zeta',
          'eta', 'theta', 'vartheta', 'kappa', 'lambda', 'mu', 'nu', 'xi',
          'rho', 'sigma', 'tau', 'phi', 'varphi', 'chi', 'psi', 'omega',
          'Gamma', 'Delta', 'Theta', 'Lambda', 'Phi', 'Psi', 'Omega', 'ell'}
_CONSTANTS = {'pi': 'pi', 'infty': 'inf', 'imath': 'i'}
_BRACKETS = {'(': ')', '[': ']', '{': '}'}
# Could be a product of variables or a unit without its \text.
_BARE_UNITS = {'cm', 'mm', 'km', 'kg', 'mg', 'ft', 'in', 'mi', 'yd', 'oz',
               'lb', 'lbs', 'ml', 'mL', 'hr', 'hrs', 'min', 'sec', 'mph',
               'am', 'pm', 'deg', 'and', 'or', 'if', 'is', 'to', 'of', 'no',
               'yes', 'odd', 'max', 'gcd', 'lcm', 'mod', 'inf', 'sup', 'abs',
               'det', 'DNE', 'rad', 'kmh', 'sq', 'cu', 'by', 'the'}


def read(text: str, algebra: _algebra.Algebra) -> _algebra.Value:
  """The value of an expression.

  Raises:
    _algebra.Unread: not understood, undefined or too large.
  """
  reader = _Reader(text, algebra)
  value = reader.sum()
  if not reader.at_end():
    raise _algebra.Unread
  return value


class _Reader:
  """A position in a text; every method moves it past what it returns."""

  def __init__(self, text: str, algebra: _algebra.Algebra):
    self._text = text
    self._at = 0
    self._depth = 0
    self._algebra = algebra

  def at_end(self) -> bool:
    return self._peek() == ''

  def sum(self) -> _algebra.Value:
    """Terms with + and - between them."""
    self._depth += 1
    if self._depth > _MAX_DEPTH:
      raise _algebra.Unread
    value = self._signed(self._product)
    while self._peek() in ('+', '-'):
      sign = 1 if self._next() == '+' else -1
      value = self._algebra.add(value, self._product(), sign)
    self._depth -= 1
    return value

  def _signed(self, read) -> _algebra.Value:
    """What `read` finds after an optional sign."""
    if self._peek() not in ('+', '-'):
      return read()
    sign = self._next()
    value = read()
    if sign == '-':
      value = self._algebra.multiply(_algebra.number(-1), value)
    return value

  def _product(self) -> _algebra.Value:
    """Factors side by side, or with a sign of product or quotient."""
    value = self._mixed_number() or self._factor()
    divided = False
    while True:
      if self._take(_TIMES):
        value = self._algebra.multiply(value, self._signed(self._factor))
        divided = False
      elif self._take(_OVER):
        value = self._algebra.divide(value, self._signed(self._factor))
        divided = True
      elif self._starts_factor():
        # 1/2x has two readings, x2 may be anything, (x+1)2^n is clear.
        bracket = self._text[:self._at].rstrip().endswith(')')
        if divided or (self._peek() in '.0123456789' and not bracket):
          raise _algebra.Unread
        value = self._algebra.multiply(value, self._factor())
      else:
        return value

  def _factor(self) -> _algebra.Value:
    """A primary with what follows it: !, %, a degree sign, an exponent."""
    value = self._primary()
    while True:
      if self._peek() == '!':
        self._next()
        if self._peek() == '!':
          raise _algebra.Unread
        value = self._algebra.factorial(value)
      elif self._peek() == '%':
        self._next()
        value = self._algebra.multiply(value, _algebra.atom('%'))
      elif self._take(_DEGREE):
        value = self._algebra.multiply(value, _algebra.atom('deg'))
      elif self._take(_POWER):
        value = self._algebra.power(value, self._exponent())
        if self._take(_POWER):  # a^b^c
          raise _algebra.Unread
      else:
        return value

  def _exponent(self) -> _algebra.Value:
    """What follows ^: braces, brackets, a signed number, or one thing."""
    return self._signed(self._primary)

  def _primary(self) -> _algebra.Value:
    """A number, a name, a group or a macro with its arguments."""
    letter = self._peek()
    if letter and letter in '.0123456789':
      return self._number()
    if letter in _BRACKETS:
      return self._group()
    if letter == '\\':
      return self._macro()
    return self._name()

  def _group(self) -> _algebra.Value:
    closing = _BRACKETS[self._next()]
    value = self.sum()
    self._expect(closing)
    return value

  def _number(self) -> _algebra.Value:
    found = self._take(_NUMBER)
    if not found or len(found.group()) > _MAX_DIGITS:
      raise _algebra.Unread
    whole, _, part = found.group().partition('.')
    return _algebra.number(Fraction(int(whole + part or '0'), 10 ** len(part)))

  def _mixed_number(self) -> _algebra.Value | None:
    """3\\frac{1}{2} or `3 1/2`, None if there is none here."""
    self._peek()
    found = _MIXED.match(self._text, self._at)
    if not found:
      return None
    whole, over, under = (int(x) for x in found.groups() if x is not None)
    if len(found.group()) > _MAX_DIGITS or not 0 < over < under:
      raise _algebra.Unread
    self._at = found.end()
    return _algebra.number(whole + Fraction(over, under))

  def _name(self) -> _algebra.Value:
    """A variable, a constant, or a function named in plain letters."""
    found = _LETTERS.match(self._text, self._at)
    if not found:
      raise _algebra.Unread
    letters = found.group()
    if letters in _FUNCTIONS:
      self._at = found.end()
      return self._function(letters)
    if letters == 'sqrt' and self._text[found.end():][:1] in ('(', '{'):
      self._at = found.end()
      return self._algebra.root(self._group(), 2)
    if letters in ('pi', 'Pi'):
      self._at = found.end()
      return _algebra.atom('pi')
    if len(letters) > 3 or letters in _BARE_UNITS:
      raise _algebra.Unread  # words are not products
    self._at += 1
    return self._subscripted(letters[0])

  def _subscripted(self, name: str) -> _algebra.Value:
    """The variable `name` with its subscript and primes."""
    found = self._take(_SUBSCRIPT)
    if found:
      name += '_' + (found.group(1) or found.group(2)).replace(' ', '')
    while self._at < len(self._text) and self._text[self._at] == "'":
      name += self._next()
    if name[0] in 'fgh' and self._peek() == '(':
      return _algebra.atom(f'@{name}{_algebra.key(self._group())}')
    return _algebra.atom(name)

  def _macro(self) -> _algebra.Value:
    found = self._take(_MACRO)
    name = found.group(1) if found else ''
    if name in _CONSTANTS:
      return _algebra.atom(_CONSTANTS[name])
    if name in _GREEK:
      return self._subscripted(name)
    if name in _FUNCTIONS:
      return self._function(name)
    if name == 'frac':
      over = self._argument()
      return self._algebra.divide(over, self._argument())
    if name == 'binom':
      over = self._argument()
      return self._algebra.binomial(over, self._argument())
    if name == 'sqrt':
      return self._root()
    if name == 'exp':
      return self._algebra.power(_algebra.atom('e'), self._argument())
    if name in ('lfloor', 'lceil'):
      return self._rounded(name[1:])
    raise _algebra.Unread

  def _argument(self) -> _algebra.Value:
    """Braces with a sum, or the one thing that TeX takes without braces."""
    letter = self._peek()
    if letter and letter in '0123456789':
      return _algebra.number(int(self._next()))
    if letter in ('(', '['):
      raise _algebra.Unread
    return self._primary()

  def _root(self) -> _algebra.Value:
    degree = 2
    if self._peek() == '[':
      degree = _algebra.rational(self._group())
      if degree is None or degree.denominator != 1:
        raise _algebra.Unread
    return self._algebra.root(self._argument(), int(degree))

  def _rounded(self, how: str) -> _algebra.Value:
    """What stands in ⌊ ⌋ or ⌈ ⌉."""
    value = self.sum()
    found = self._take(_MACRO)
    if not found or found.group(1) != f'r{how}':
      raise _algebra.Unread
    exact = _algebra.rational(value)
    if exact is None:
      return _algebra.atom(f'@{how}{_algebra.key(value)}')
    rounded = math.floor(exact) if how == 'floor' else math.ceil(exact)
    return _algebra.number(rounded)

  def _function(self, name: str) -> _algebra.Value:
    """sin^2 x, log_2 x: opaque, the same for the same argument."""
    found = self._take(_SUBSCRIPT)
    if found:
      name += '_' + (found.group(1) or found.group(2)).replace(' ', '')
    exponent = _algebra.number(1)
    if self._take(_POWER):
      exponent = self._exponent()
      if _algebra.rational(exponent) == -1:
        name, exponent = f'arc{name}', _algebra.number(1)
    if self._peek() in _BRACKETS:
      argument = self._group()
    else:
      argument = self._factor()
      while self._starts_factor() and not self._starts_function():
        argument = self._algebra.multiply(argument, self._factor())
    applied = _algebra.atom(f'@{name}{_algebra.key(argument)}')
    return self._algebra.power(applied, exponent)

  def _starts_factor(self) -> bool:
    letter = self._peek()
    if letter == '\\':
      found = _MACRO.match(self._text, self._at)
      return bool(found) and found.group(1) not in ('rfloor', 'rceil')
    return bool(letter) and (letter in '([{.' or letter.isalnum())

  def _starts_function(self) -> bool:
    found = (_MACRO.match(self._text, self._at)
             or _LETTERS.match(self._text, self._at))
    return bool(found) and found.group().strip('\\ ') in _FUNCTIONS

  def _peek(self) -> str:
    """The next character that is no space, '' at the end."""
    while self._at < len(self._text) and self._text[self._at] == ' ':
      self._at += 1
    return self._text[self._at:self._at + 1]

  def _next(self) -> str:
    letter = self._peek()
    self._at += 1
    return letter

  def _expect(self, letter: str) -> None:
    if self._next() != letter:
      raise _algebra.Unread

  def _take(self, pattern: re.Pattern) -> re.Match | None:
    found = pattern.match(self._text, self._at)
    if found:
      self._at = found.end()
    return found
