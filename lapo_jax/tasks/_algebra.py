# SPDX-License-Identifier: Apache-2.0
"""Exact arithmetic on what answers are made of, with a bounded effort.

A value is a quotient of two sums, a sum maps monomials to rational
coefficients, and a monomial is a product of atoms with rational exponents:

  primes      exponent in (0, 1): √12 = 2·3^(1/2), ∛4 = 2^(2/3)
  i           exponent 1
  pi, e, x    any exponent; pi and e are taken as independent of all else
  %, deg      units that must agree
  @…          whatever is not understood further: sin(x), √(x+1), n!

Different products of prime roots are linearly independent over the rationals
(Besicovitch 1940), so a sum is zero exactly if no term is left: equality is
decided without floats. Only `@` atoms leave it open.
"""

from fractions import Fraction
import math
from typing import NamedTuple

Monomial = tuple[tuple[str, Fraction], ...]
Sum = dict[Monomial, Fraction]

_MAX_WORK = 1500        # products of two terms, large numbers count more
_MAX_BITS = 8192        # of a numerator or denominator
_MAX_EXPONENT = 10_000
_MAX_EXPANSION = 64     # exponent of a sum of several terms
_MAX_RADICAND = 10**8   # factored by trial division
_MAX_FACTORIAL = 500

_POSITIVE = {'pi', 'e'}
_UNITS = {'%', 'deg', 'inf'}
_ONE: Sum = {(): Fraction(1)}


class Unread(Exception):
  """Beyond this reader: not understood, undefined, or too large."""


class Value(NamedTuple):
  """The quotient over/under; `under` is 1 or has several terms."""

  over: Sum
  under: Sum


def number(value: int | Fraction) -> Value:
  """A rational number."""
  return Value({(): Fraction(value)} if value else {}, _ONE)


def atom(name: str, exponent: Fraction | int = 1) -> Value:
  """A variable, a constant, a unit, or `@` and something opaque."""
  return Value({((name, Fraction(exponent)),): Fraction(1)}, _ONE)


def negative(value: Value) -> Value:
  """-value"""
  return value._replace(over={m: -f for m, f in value.over.items()})


def key(value: Value) -> str:
  """A name that equal values usually and different values never share."""
  def of(terms: Sum) -> str:
    return '+'.join(f'{factor}{monomial}'
                    for monomial, factor in sorted(terms.items()))
  return f'<{of(value.over)}/{of(value.under)}>'.replace('Fraction', '')


def rational(value: Value) -> Fraction | None:
  """The number, None if the value is not rational."""
  if value.under != _ONE or value.over.keys() - {()}:
    return None
  return value.over.get((), Fraction(0))


def has(value: Value, prefix: str) -> bool:
  """Whether an atom of the value begins with `prefix`."""
  return any(name.startswith(prefix) for terms in value
             for monomial in terms for name, _ in monomial)


def without(value: Value, unit: str) -> Value:
  """The value without a unit that each of its terms has once."""
  mark = (unit, Fraction(1))
  if not value.over or not all(mark in monomial for monomial in value.over):
    return value
  return Value({tuple(part for part in monomial if part != mark): factor
                for monomial, factor in value.over.items()}, value.under)


class Algebra:
  """Operations on values that share one allowance of work."""

  def __init__(self):
    self._left = _MAX_WORK

  def add(self, a: Value, b: Value, sign: int = 1) -> Value:
    """a + sign·b."""
    if a.under == b.under:
      return self._over(self._plus(a.over, b.over, sign), a.under)
    return self._over(self._plus(self._times(a.over, b.under),
                                 self._times(b.over, a.under), sign),
                      self._times(a.under, b.under))

  def multiply(self, a: Value, b: Value) -> Value:
    """a·b."""
    return self._over(self._times(a.over, b.over),
                      self._times(a.under, b.under))

  def divide(self, a: Value, b: Value) -> Value:
    """a/b; Unread if b is zero."""
    return self._over(self._times(a.over, b.under),
                      self._times(a.under, b.over))

  def equal(self, a: Value, b: Value) -> bool | None:
    """Whether a = b, None if opaque atoms leave it open."""
    if a == b:
      return True
    if None not in (rational(a), rational(b)):
      return False
    if not self._plus(self._times(a.over, b.under),
                      self._times(b.over, a.under), -1):
      return True
    return None if has(a, '@') or has(b, '@') else False

  def proportional(self, a: Sum, b: Sum) -> bool:
    """Whether a = c·b for a number c that is not zero."""
    if a.keys() != b.keys() or not a:
      return False
    first = min(a)
    return not self._plus(self._times(a, {(): b[first]}),
                          self._times(b, {(): a[first]}), -1)

  def power(self, base: Value, exponent: Value) -> Value:
    """base^exponent; the principal value, but of an odd root the real one."""
    n = rational(exponent)
    if n is None:
      return self._symbolic_power(base, exponent)
    if abs(n.numerator) > _MAX_EXPONENT or (not base.over and n <= 0):
      raise Unread
    base = self.root(base, n.denominator)
    n = n.numerator
    if len(base.over) <= 1 and base.under == _ONE:
      result = Value(self._term_power(base.over, abs(n)), _ONE)
    elif abs(n) <= _MAX_EXPANSION:
      result = number(1)
      for _ in range(abs(n)):
        result = self.multiply(result, base)
    else:
      raise Unread
    return result if n >= 0 else self.divide(number(1), result)

  def root(self, value: Value, degree: int) -> Value:
    """The degree-th root."""
    if degree < 1 or degree > _MAX_EXPONENT:
      raise Unread
    if degree == 1 or not value.over:
      return value
    if len(value.over) > 1 or value.under != _ONE:
      return atom(f'@root{degree}{key(value)}')
    (monomial, factor), = value.over.items()
    exponents: dict[str, Fraction] = {}
    for name, n in monomial:
      if name == 'i' or name[0] == '@' or name in _UNITS:
        raise Unread
      exponents[name] = n / degree
      if (degree % 2 == 0 and not name.isdigit() and name not in _POSITIVE
          and n.numerator % 2 == 0 and exponents[name].numerator % 2):
        return atom(f'@root{degree}{key(value)}')  # √(x²) is |x|
    for integer, sign in ((abs(factor.numerator), 1), (factor.denominator, -1)):
      for prime, times in self._factors(integer).items():
        exponents[str(prime)] = (exponents.get(str(prime), Fraction(0))
                                 + Fraction(sign * times, degree))
    if factor < 0 and degree == 2:
      exponents['i'] = Fraction(1)
    elif factor < 0 and degree % 2 == 0:
      raise Unread
    scale, monomial = self._normal(exponents)
    return Value({monomial: -scale if factor < 0 and degree % 2 else scale},
                 _ONE)

  def factorial(self, value: Value) -> Value:
    """value!"""
    n = rational(value)
    if n is None:
      return atom(f'@factorial{key(value)}')
    if n.denominator != 1 or not 0 <= n <= _MAX_FACTORIAL:
      raise Unread
    return number(math.factorial(int(n)))

  def binomial(self, n: Value, k: Value) -> Value:
    """n choose k."""
    numbers = rational(n), rational(k)
    if None in numbers:
      return atom(f'@binomial{key(n)}{key(k)}')
    if any(x.denominator != 1 or not 0 <= x <= _MAX_FACTORIAL
           for x in numbers):
      raise Unread
    return number(math.comb(*map(int, numbers)))

  def _symbolic_power(self, base: Value, exponent: Value) -> Value:
    """2^(3n+1) as 2·(@2^n)^3: whatever splits off is split off."""
    if exponent.under != _ONE or not base.over:
      raise Unread
    rest = dict(exponent.over)
    constant = rest.pop((), Fraction(0))
    numbers = [rest[monomial] for monomial in sorted(rest)]
    content = Fraction(math.gcd(*(x.numerator for x in numbers)),
                       math.lcm(*(x.denominator for x in numbers)))
    content *= 1 if numbers[0] > 0 else -1
    rest = {monomial: factor / content for monomial, factor in rest.items()}
    name = f'@power{key(base)}{key(Value(rest, _ONE))}'
    return self.multiply(atom(name, content),
                         self.power(base, number(constant)))

  def _over(self, over: Sum, under: Sum) -> Value:
    """The quotient; a denominator of one term goes into the numerator."""
    if not under:
      raise Unread
    if len(under) == 1 and under != _ONE:
      (monomial, factor), = under.items()
      scale, inverse = self._normal({name: -n for name, n in monomial})
      over, under = self._times(over, {inverse: scale / factor}), _ONE
    return Value(over, under)

  def _plus(self, a: Sum, b: Sum, sign: int) -> Sum:
    self._spend(len(a) + len(b))
    total = dict(a)
    for monomial, factor in b.items():
      factor = total.pop(monomial, 0) + sign * factor
      if factor:
        total[monomial] = factor
    return total

  def _times(self, a: Sum, b: Sum) -> Sum:
    if a == _ONE or b == _ONE:
      return b if a == _ONE else a
    total: Sum = {}
    for left, x in a.items():
      for right, y in b.items():
        scale, monomial = self._joined(left, right)
        factor = total.pop(monomial, 0) + self._bounded(x * y * scale)
        if factor:
          total[monomial] = factor
    return total

  def _term_power(self, term: Sum, n: int) -> Sum:
    """The n-th power of a sum of at most one term."""
    if not term:
      return {} if n else _ONE
    (monomial, factor), = term.items()
    bits = max(factor.numerator.bit_length(), factor.denominator.bit_length())
    if (bits - 1) * n > _MAX_BITS:
      raise Unread
    scale, monomial = self._normal({name: m * n for name, m in monomial})
    return {monomial: self._bounded(scale * factor ** n)}

  def _joined(self, a: Monomial, b: Monomial) -> tuple[Fraction | int,
                                                       Monomial]:
    """The product of two monomials: a number and a monomial."""
    if not a or not b:
      return 1, a or b
    exponents = dict(a)
    for name, n in b:
      exponents[name] = exponents.get(name, 0) + n
    return self._normal(exponents)

  def _normal(self, exponents: dict[str, Fraction]) -> tuple[Fraction,
                                                             Monomial]:
    """Takes what is rational out of a monomial."""
    self._spend(len(exponents))
    scale, kept = Fraction(1), []
    for name, n in exponents.items():
      if abs(n.numerator) > _MAX_EXPONENT:
        raise Unread
      if name == 'i':
        scale *= -1 if n % 4 >= 2 else 1
        n %= 2
      elif name.isdigit():
        whole = math.floor(n)
        if abs(whole) * int(name).bit_length() > _MAX_BITS:
          raise Unread
        scale *= Fraction(int(name)) ** whole
        n -= whole
      if n:
        kept.append((name, n))
    return scale, tuple(sorted(kept))

  def _factors(self, integer: int) -> dict[int, int]:
    """The prime factors and how often each divides."""
    found: dict[int, int] = {}
    prime = 2
    while prime * prime <= integer:
      if prime * prime > _MAX_RADICAND:
        raise Unread
      while integer % prime == 0:
        found[prime] = found.get(prime, 0) + 1
        integer //= prime
      prime += 1 + prime % 2
    self._spend(prime // 10)
    if integer > 1:
      found[integer] = found.get(integer, 0) + 1
    return found

  def _bounded(self, factor: Fraction) -> Fraction:
    bits = max(factor.numerator.bit_length(), factor.denominator.bit_length())
    if bits > _MAX_BITS:
      raise Unread
    self._spend(1 + bits // 64)
    return factor

  def _spend(self, work: int) -> None:
    self._left -= work
    if self._left < 0:
      raise Unread
