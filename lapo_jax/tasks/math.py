# SPDX-License-Identifier: Apache-2.0
r"""Mathematics with a boxed answer: MATH, DeepScaleR, AIME, AMC, OlympiadBench.

Reads the publishers' files as they are: `problem`, and an `answer` that is
text, a number or, in OlympiadBench, a list of texts, some of them with a
`unit` and an `error`. The level is `difficulty` or `level`, '' where that is
absent or 0. A gold answer that the grader cannot read would make its problem
unsolvable, unseen: such rows are left out and counted.

An answer counts only after `</think>`: the last box, which must hold all
answers where the problem has several. What equals what: `_equivalence.py`.

Files are mixed by count or by weight. LAPO's mixture (arXiv 2507.15758):

  sources = ({'path': 'deepscaler.json', 'count': 6000},
             {'path': 'math_train.json', 'count': 4000, 'levels': (3, 4, 5)})

Two files that share a problem may both contribute it.
"""

from collections.abc import Sequence
import math
import re
from typing import Any

from lapo_jax import types
from lapo_jax.tasks import _answers, _equivalence, _mixture, _problems, _rows

_ANSWER_TYPES = ('Numerical', 'Expression', 'Equation', 'Tuple', 'Interval')
# A list as Python prints it. LaTeX whose backslashes were not doubled passes.
_TEXT = r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\""""
_ESCAPED = re.compile(r"""\\(['"\\])""")
_LIST = re.compile(rf'\[(?:{_TEXT})(?:, ?(?:{_TEXT}))*\]')
# A comma that could be that of 1,000.
_COMMA = re.compile(r'(?<=[0-9]),(?=[0-9]{3}(?![0-9]))')


class Math(_problems.Problems):
  """Problems whose answer is boxed."""

  def grade(self, completion: str, example: types.Example) -> dict[str, float]:
    """Grades a completion.

    Returns:
      'correct' and 'parsed', each 0.0 or 1.0; 'parsed' says that a box was
      found after the thoughts.
    """
    answer = _answers.last_boxed(
        _answers.after_thinking(completion, self._thinking))
    if answer is None:
      return {'correct': 0.0, 'parsed': 0.0}
    correct = _equivalence.equal(answer, example.answer, unit=example.unit,
                                 tolerance=example.tolerance)
    return {'correct': float(correct), 'parsed': 1.0}


def make(path: str = '', sources: Sequence[Any] = (), num_examples: int = 0,
         seed: int = 0, thinking: bool = True, bad_rows: str = 'refuse',
         cache: str = '') -> Math:
  """Prepares the problems; they are read when first asked for.

  Args:
    path: a JSON array, JSON lines or parquet file, local or on gs://; with
      `sources` the folder of their relative paths.
    sources: files to mix: each a mapping of 'path', either 'count' or
      'weight', and 'levels' where only some are wanted.
    num_examples: problems to choose, 0 = all of the one file. Weights share
      it; with counts it stays 0.
    seed: chooses the problems.
    thinking: whether the prompt opens `<think>`; if not, a completion without
      thoughts is all answer.
    bad_rows: 'refuse' a file with rows that are not as they should be, or
      'drop' those rows, counted.
    cache: folder of prepared problems, '' = ~/.cache/lapo_jax/datasets.

  Raises:
    ValueError: settings that do not fit, a source with too few problems, or a
      bad file; the message names the file and the place in it. Or math-verify
      is not installed.
  """
  if not path and not sources:
    raise ValueError('math needs a file: set --config.task.path=... to a JSON, '
                     'JSONL or parquet file of problems, or task.sources.')
  # Imported now, so that no completion's deadline pays for it.
  _equivalence.require()
  parts = _mixture.wanted(path, sources, num_examples)
  files = [_problems.prepare(part.path, _example, bad_rows, cache)
           for part in parts]
  return Math(*_mixture.mix(parts, files, seed), thinking)


def _example(fields: dict[str, Any]) -> types.Example | str:
  """The problem of a row, or the reason why it is left out."""
  question = _rows.text(fields, 'problem')
  if not _is_blank(fields.get('context')):
    question = f'{_rows.text(fields, "context")}\n\n{question}'
  answer = _gold(fields)
  unit = ('' if _is_blank(fields.get('unit')) else
          _plain(_rows.text(fields, 'unit')))
  tolerance = _number(fields, 'error')
  if tolerance < 0:
    raise _rows.BadRow("field 'error' is negative", str(tolerance))
  level = _number(fields, 'difficulty') or _number(fields, 'level')
  if not answer:
    return 'no answer'
  if not _equivalence.readable(answer):
    kind = fields.get('answer_type')
    return f'unreadable {kind if kind in _ANSWER_TYPES else "answer"}'
  return types.Example(question=question, answer=answer, unit=unit,
                       tolerance=tolerance,
                       level=_mixture.level(level) if level else '')


def _gold(fields: dict[str, Any]) -> str:
  """The gold answer as one text, '' if there is none."""
  value = fields.get('answer', ...)
  if _is_blank(value):
    return ''
  if isinstance(value, float) and math.isfinite(value):
    return str(int(value)) if value.is_integer() else repr(value)
  if isinstance(value, int) and not isinstance(value, bool):
    return str(value)
  if isinstance(value, str) and _LIST.fullmatch(value):
    value = [_ESCAPED.sub(r'\1', quoted[1:-1])
             for quoted in re.findall(_TEXT, value)]
  several = (fields.get('is_multiple_answer') is True or
             fields.get('answer_type') in ('Tuple', 'Interval'))
  if isinstance(value, list):
    several = several or len(value) > 1
    texts = [_rows.text({'answer': part}, 'answer') for part in value]
  else:
    texts = [_rows.text(fields, 'answer')]
  gold = ', '.join(map(_plain, texts))
  # Between several answers a space tells it from that.
  return _COMMA.sub(', ', gold) if several else gold


def _plain(text: str) -> str:
  """The text without the dollars that open and close LaTeX."""
  return re.sub(r'(?<!\\)\$', '', text).strip().removesuffix('.')


def _number(fields: dict[str, Any], name: str) -> float:
  """The number of a field that a row may have, 0 without one."""
  value = fields.get(name)
  if _is_blank(value):
    return 0.0
  try:
    number = math.nan if isinstance(value, bool) else float(value)
  except (TypeError, ValueError, OverflowError):
    number = math.nan
  if not math.isfinite(number):
    raise _rows.BadRow(f'field {name!r} is no number',
                       f'got {_rows.kind(value)}')
  return number


def _is_blank(value: Any) -> bool:
  if isinstance(value, float):
    return math.isnan(value)  # null in a parquet column of numbers
  return value is None or (isinstance(value, str) and not value.strip())
