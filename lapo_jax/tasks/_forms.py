# SPDX-License-Identifier: Apache-2.0
r"""Takes an answer apart: a value, a list, a tuple, a set, an equation.

The form says what the text looks like, exact values are at its leaves. `(1,2)`
is a tuple with its brackets, be it a point or an interval; `\pm` makes a list
of two; `1011_2` keeps its digits.
"""

from collections.abc import Callable
import re
from typing import NamedTuple

from lapo_jax.tasks import _algebra, _expressions, _spelling

_MAX_PARTS = 32
_MAX_DEPTH = 6

_MATRIX = re.compile(r'\\begin\{pmatrix\}(.*)\\end\{pmatrix\}')
_GROUPED = re.compile(r'-?[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]+)? *%?')
_BASED = re.compile(r'(-?[0-9A-F]+) *_ *(?:\{ *([0-9]{1,2}) *\}|([0-9]))')
# What may stand left of = or \in without being part of the answer: x, f(x),
# m_{\max}, \theta, AB, \angle ABC, (x, y). Not xy, which is a product.
_INDEX = r" *(?:_ *(?:\{[^{}]*\}|[A-Za-z0-9]))?'? *"
_NAME = re.compile(
    rf'(?:[A-Za-z]|\\(?!pi|sin|cos|tan|sqrt)[a-z]+){_INDEX}'
    r'(?:\([A-Za-z, ]*\))?'
    rf'|(?:\\(?:angle|triangle|overline) *\{{?)?(?:[A-Z]{_INDEX}){{1,4}}\}}?'
    r'|\( *[A-Za-z](?: *, *[A-Za-z])* *\)')
_RELATION = re.compile(r'<=|>=|[=<>]|\\(?:le|ge|in)(?![A-Za-z])')


class Form(NamedTuple):
  """An answer taken apart.

  Attributes:
    kind: 'value', 'list', 'tuple', 'set', 'union', 'matrix', 'relation',
      'ratio' or 'based'.
    parts: the forms it consists of; of a value, the one value.
    detail: a tuple's brackets, a matrix's row length, a number's base, the
      signs of a relation, a value's unit.
    name: what is left of the first sign of a relation, if that is a name.
  """

  kind: str
  parts: tuple
  detail: str = ''
  name: str = ''


def read(text: str) -> Form:
  """The form of a cleaned text.

  Raises:
    _algebra.Unread: not understood, undefined or too large.
  """
  return _read(text, _algebra.Algebra(), 0)


def readings(text: str) -> list[Form]:
  """The forms that a cleaned text may have.

  100,101 is a number or a list; 1,000 is a number, for 000 is none.
  """
  texts = [text]
  if _GROUPED.fullmatch(text):
    joined = text.replace(',', '')
    texts = [joined] if ',0' in text else [text, joined]
  forms = []
  for each in texts:
    try:
      forms.append(read(each))
    except _algebra.Unread:
      continue
  return forms


def _read(text: str, algebra: _algebra.Algebra, depth: int) -> Form:
  """`read`, of an answer or of a part of one."""
  if depth > _MAX_DEPTH or not text:
    raise _algebra.Unread

  def parts(kind: str, texts: list[str], detail: str = '') -> Form:
    if len(texts) > _MAX_PARTS:
      raise _algebra.Unread
    forms = [_read(part.strip(), algebra, depth + 1) for part in texts]
    if kind in ('list', 'set'):  # \pm has made a list of a part
      forms = [form for part in forms for form in
               (part.parts if part.kind == 'list' else (part,))]
    return Form(kind, tuple(forms), detail)

  listed = _spelling.split(_spelling.listed(text), ',;')
  if len(listed) > 1:
    return parts('list', listed)
  pieces = _spelling.split(text.replace(r'\cup', '\u222a'), '\u222a')
  if len(pieces) > 1:
    return parts('union', pieces)
  if _RELATION.search(text):
    return _relation(text, parts)
  terms = _spelling.split(text, ':')
  if len(terms) > 1:
    return parts('ratio', terms)
  matrix = _MATRIX.fullmatch(text)
  if matrix:
    rows = [row.split('&') for row in matrix.group(1).split('\u240d')
            if row.strip()]
    if not rows or len({len(row) for row in rows}) > 1:
      raise _algebra.Unread
    return parts('matrix', [cell for row in rows for cell in row],
                 str(len(rows[0])))
  if _spelling.is_bracketed(text):
    inside = _spelling.split(text[1:-1], ',;')
    if text[0] == '\u27e8':
      return parts('set', inside if inside != [''] else [])
    if len(inside) > 1 and text[0] in '([':
      return parts('tuple', inside, text[0] + text[-1])
  based = _BASED.fullmatch(text)
  if based:
    digits, *base = based.groups()
    return Form('based', (), f'{digits.lstrip("0")}_{base[0] or base[1]}')
  if text.count(r'\pm') == 1:
    return parts('list', [text.replace(r'\pm', sign) for sign in '+-'])
  text, unit = _spelling.without_unit(text)
  return Form('value', (_expressions.read(text, algebra),), unit)


def _relation(text: str, parts: Callable) -> Form:
  """An equation, a chain of inequalities, or `name = …`, `name \\in …`."""
  signs = [s.replace(r'\le', '<=').replace(r'\ge', '>=')
           for s in _RELATION.findall(text)]
  sides = [side.strip() for side in _RELATION.split(text)]
  name = sides[0].replace(' ', '') if _NAME.fullmatch(sides[0]) else ''
  if r'\in' in signs and not name or len(sides) > 2 and (
      '=' in signs or r'\in' in signs):
    raise _algebra.Unread
  try:
    return parts('relation', sides, ' '.join(signs))._replace(name=name)
  except _algebra.Unread:
    if not name or len(sides) > 2:
      raise
    # A name that is no value, such as AB or m_{\max}: the right side counts.
    right = parts('relation', sides[1:], ' '.join(signs))
    return right._replace(parts=(None, *right.parts), name=name)
