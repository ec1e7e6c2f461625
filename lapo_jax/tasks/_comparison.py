# SPDX-License-Identifier: Apache-2.0
r"""Whether two forms are the same answer, as far as exact arithmetic goes.

The rules:

  69, 84 = 84 and 69       a bare list has no order, \pm makes two of it
  (1, 2) ≠ (2, 1), [1, 2]  a bracketed one has, and brackets around two count:
                           a point, and intervals open and closed
  \{1, 2\} = 1, 2          a set is a list without repetitions, \{1\} is 1
  x = 5, x \in [0, 1]      a name on the left may be left out
  0 < x is (0, \infty)     and inequalities of one name are intervals
  2x = 4y is x - 2y = 0    equations and inequalities up to a factor
  8 cm = 8, but not 8 m    a unit in \text may be left out, not exchanged
  90^\circ = 90, 5 ≠ 5\%   so may degrees; percent is another kind
  101_2 = 101 ≠ 5          and so may the base that the gold answer has
"""

from collections.abc import Iterable

from lapo_jax.tasks import _algebra
from lapo_jax.tasks._forms import Form

# Kinds in which the same may be written in two ways.
_KINDRED = ({'tuple', 'matrix'}, {'ratio', 'value'}, {'union', 'tuple'},
            {'union', 'set'}, {'relation', 'tuple'}, {'relation', 'union'},
            {'relation', 'set'})


def same(a: Form, b: Form) -> bool | None:
  """Whether two forms are the same answer; b is the gold one.

  Returns:
    None if exact arithmetic does not decide.
  """
  return _same(a, b, _algebra.Algebra())


def _same(a: Form, b: Form, algebra: _algebra.Algebra) -> bool | None:
  """`same`, with what is left of an allowance of work."""
  if 'relation' in (a.kind, b.kind) and a.kind != b.kind:
    return _same_unnamed(a, b, algebra)
  kinds = {a.kind, b.kind}
  if kinds <= {'list', 'set'}:
    return _same_unordered(_distinct(a, algebra), _distinct(b, algebra),
                           algebra)
  if kinds == {'based', 'value'}:
    digits = b.detail.partition('_')[0]
    return b.kind == 'based' and str(_algebra.rational(a.parts[0])) == digits
  if kinds == {'set', 'value'}:
    x, y = (form.parts if form.kind == 'set' else (form,) for form in (a, b))
    return _same_unordered(x, y, algebra)
  if len(kinds) > 1:
    return None if kinds in _KINDRED else False
  if a.kind == 'value':
    return _same_values(a, b, algebra)
  if a.kind == 'relation':
    return _same_relations(a, b, algebra)
  if a.kind == 'union':
    same_number = len(a.parts) == len(b.parts)
    return _same_unordered(a.parts, b.parts, algebra) if same_number else None
  # Three numbers in [ ] are a point: no interval has three.
  point = a.kind == 'tuple' and len(a.parts) > 2
  if len(a.parts) != len(b.parts) or (a.detail != b.detail and not point):
    return False
  return _all(_same(x, y, algebra)
              for x, y in zip(a.parts, b.parts, strict=True))


def _same_values(a: Form, b: Form,
                 algebra: _algebra.Algebra) -> bool | None:
  """Values are equal and their units, if both have one, agree."""
  if a.detail and b.detail and a.detail != b.detail:
    return False
  x, y = (_algebra.without(form.parts[0], 'deg') for form in (a, b))
  try:
    return algebra.equal(x, y)
  except _algebra.Unread:
    return None


def _same_relations(a: Form, b: Form,
                    algebra: _algebra.Algebra) -> bool | None:
  """The same name and the same right side, or the same up to a factor."""
  same_right = None
  if a.detail == b.detail and a.name and a.name == b.name:
    same_right = _same(a.parts[-1], b.parts[-1], algebra)
    if same_right is None or a.detail == r'\in':
      return same_right
  if same_right or None in (a.parts[0], b.parts[0]):
    return same_right if a.name == b.name else False
  x, y = _differences(a, algebra), _differences(b, algebra)
  if None in (x, y) or len(x) != len(y):
    return None
  return _all(_same_difference(*pair, algebra)
              for pair in zip(x, y, strict=True))


def _differences(form: Form, algebra: _algebra.Algebra
                 ) -> list[tuple[str, _algebra.Value]] | None:
  """a < b <= c as b - a > 0, c - b >= 0; None if a side is not a value."""
  if any(part.kind != 'value' for part in form.parts):
    return None
  links = []
  for sign, x, y in zip(form.detail.split(), form.parts, form.parts[1:],
                        strict=False):
    larger = 1 if sign[0] != '>' else -1
    try:
      difference = algebra.add(y.parts[0], x.parts[0], -1)
    except _algebra.Unread:
      return None
    links.append((sign.replace('<', '>'), difference, larger))
  # a < b < c and c > b > a list the same links in opposite orders.
  if links and links[0][2] < 0:
    links.reverse()
  return [(sign, difference if larger > 0 else _algebra.negative(difference))
          for sign, difference, larger in links]


def _same_difference(a: tuple, b: tuple,
                     algebra: _algebra.Algebra) -> bool | None:
  """Whether two `difference sign 0` say the same."""
  (sign, x), (other, y) = a, b
  if sign != other:
    return False
  if not x.over or not y.over:
    return not x.over and not y.over
  if x.under != y.under and sign != '=':
    return None
  if sign != '=' and (x.over[min(x.over)] > 0) != (
      y.over.get(min(x.over), -1) > 0):
    return False
  try:
    return algebra.proportional(x.over, y.over)
  except _algebra.Unread:
    return None


def _same_unnamed(a: Form, b: Form,
                  algebra: _algebra.Algebra) -> bool | None:
  """A relation against something else: `x = 5` and 5, 0 < x and (0, ∞)."""
  relation, other = (a, b) if a.kind == 'relation' else (b, a)
  if relation.name and relation.detail in ('=', r'\in'):
    right = relation.parts[-1]
    pair = (right, other) if relation is a else (other, right)
    return _same(*pair, algebra)
  interval = _interval(relation)
  if interval and other.kind == 'tuple':
    return _same(interval, other, algebra)
  if relation.detail == '=' and other.kind == 'value' and all(
      map(_is_constant, relation.parts)):
    # A gold 0.56 = 56\% allows both, an answer 6 = 5 is neither.
    results = [_same(side, other, algebra) for side in relation.parts]
    return _all(results) if relation is a else True in results
  if relation.detail == '=':
    return False  # 2x + 3 = 5 does not state 5
  return None if {'relation', other.kind} in _KINDRED else False


def _interval(relation: Form) -> Form | None:
  """a <= x < b as [a, b) and x >= a as [a, inf), None if it is neither."""
  signs, sides = relation.detail.split(), list(relation.parts)
  if len(signs) > 2 or any(sign[0] not in '<>' for sign in signs):
    return None
  if any(side is None or side.kind != 'value' for side in sides):
    return None
  infinity = _algebra.atom('inf')
  if len(signs) == 1:  # x < b as -inf < x < b, a < x as a < x < inf
    ends = infinity, _algebra.negative(infinity)
    if signs[0][0] == '<':
      ends = ends[::-1]
    first = _is_name(sides[0])
    sides.insert(0 if first else 2, Form('value', (ends[0 if first else 1],)))
    signs.insert(0 if first else 1, signs[0][0])
  if signs[0][0] != signs[1][0] or not _is_name(sides[1]):
    return None
  if signs[0][0] == '>':
    signs, sides = signs[::-1], sides[::-1]
  shape = '(['['=' in signs[0]] + ')]'['=' in signs[1]]
  return Form('tuple', (sides[0], sides[2]), shape)


def _is_name(form: Form) -> bool:
  """Whether a value is one variable."""
  return not _is_constant(form) and form.parts[0] == _algebra.atom(
      next((name for monomial in form.parts[0].over for name, _ in monomial),
           ''))


def _is_constant(form: Form | None) -> bool:
  return form is not None and form.kind == 'value' and all(
      name.isdigit() or name in ('i', 'e', 'pi', '%', 'deg')
      for terms in form.parts[0] for monomial in terms for name, _ in monomial)


def _distinct(form: Form, algebra: _algebra.Algebra) -> tuple[Form, ...]:
  """The parts, those of a set without repetitions."""
  if form.kind == 'list':
    return form.parts
  kept: list[Form] = []
  for part in form.parts:
    if not any(_same(part, other, algebra) for other in kept):
      kept.append(part)
  return tuple(kept)


def _same_unordered(a: tuple[Form, ...], b: tuple[Form, ...],
                    algebra: _algebra.Algebra) -> bool | None:
  """Whether the parts can be paired off."""
  if len(a) != len(b):
    return False
  left, open_question = list(b), False
  for part in a:
    results = [_same(part, other, algebra) for other in left]
    if True in results:
      left.pop(results.index(True))
    elif None in results:
      open_question = True
    else:
      return False
  return None if open_question else True


def _all(results: Iterable[bool | None]) -> bool | None:
  results = list(results)
  if False in results:
    return False
  return None if None in results else True
