# SPDX-License-Identifier: Apache-2.0
"""GSM8K: grade-school word problems (arXiv 2110.14168).

Reads the publisher's JSON lines (github.com/openai/grade-school-math):
`question`, and an `answer` whose gold number follows `####`. The order of the
file is the problem id. The problems have no difficulty levels.

An answer counts only after `</think>`: the last box, else the number after
`####`, else the last number.
"""

from typing import Any

from lapo_jax import types
from lapo_jax.tasks import _answers, _problems, _rows

_MARK = '####'
_SHOWN = 40


class GSM8K(_problems.Problems):
  """The problems of one file."""

  def grade(self, completion: str, example: types.Example) -> dict[str, float]:
    """Grades a completion.

    Returns:
      'correct' and 'parsed', each 0.0 or 1.0; 'parsed' says that an answer
      was found after the thoughts.
    """
    answer = _answer(_answers.after_thinking(completion, self._thinking))
    if answer is None:
      return {'correct': 0.0, 'parsed': 0.0}
    correct = _answers.equal(answer, example.answer)
    return {'correct': float(correct), 'parsed': 1.0}


def make(path: str = '', thinking: bool = True, bad_rows: str = 'refuse',
         cache: str = '') -> GSM8K:
  """Prepares the problems; they are read when first asked for.

  Args:
    path: the publisher's train.jsonl or test.jsonl, local or on gs://.
    thinking: whether the prompt opens `<think>`; if not, a completion without
      thoughts is all answer.
    bad_rows: 'refuse' a file with lines that are not as they should be, or
      'drop' those lines, counted.
    cache: folder of prepared problems, '' = ~/.cache/lapo_jax/datasets.

  Raises:
    ValueError: no path, an unreadable or empty file, or a line that is not a
      problem; the message names file and line.
  """
  if not path:
    raise ValueError('gsm8k needs a file: set --config.task.path=... to the '
                     'train.jsonl or test.jsonl of grade-school-math.')
  file = _problems.prepare(path, _example, bad_rows, cache)
  return GSM8K(file.problems, [{**file.entry, 'chosen': file.entry['kept']}],
               thinking)


def _example(fields: dict[str, Any]) -> types.Example:
  """The problem of a line."""
  question = _rows.text(fields, 'question')
  answer = _rows.text(fields, 'answer')
  _, mark, gold = answer.rpartition(_MARK)
  gold = gold.strip()
  # A gold that cannot be read would make its problem unsolvable, unseen.
  if not mark or _answers.first_number(gold) != gold:
    raise _rows.BadRow(f'"answer" does not end in {_MARK} and a number',
                       f'got {answer[-_SHOWN:]!r}')
  return types.Example(question=question, answer=gold)


def _answer(text: str) -> str | None:
  """What the text answers, None if nothing."""
  boxed = _answers.last_boxed(text)
  if boxed is not None:
    return boxed
  _, mark, after = text.rpartition(_MARK)
  marked = _answers.first_number(after) if mark else None
  return marked if marked is not None else _answers.last_number(text)
