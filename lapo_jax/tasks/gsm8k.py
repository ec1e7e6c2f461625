# SPDX-License-Identifier: Apache-2.0
"""GSM8K: grade-school word problems (arXiv 2110.14168).

Reads the publisher's JSON lines (github.com/openai/grade-school-math):
`question`, and an `answer` whose gold number follows `####`. The order of the
file is the problem id. The problems have no difficulty levels.

An answer counts only after `</think>`: the last box, else the number after
`####`, else the last number.
"""

import json

from etils import epath

from lapo_jax import types
from lapo_jax.tasks import _answers

_MARK = '####'


class GSM8K:
  """The problems of one file, held in memory (4 MB for the training split)."""

  def __init__(self, examples: list[types.Example]):
    self._examples = examples

  def __len__(self) -> int:
    return len(self._examples)

  def __getitem__(self, index: int) -> types.Example:
    return self._examples[index]

  def grade(self, completion: str, example: types.Example) -> dict[str, float]:
    """Grades a completion.

    Returns:
      'correct' and 'parsed', each 0.0 or 1.0; 'parsed' says that an answer
      was found after the thoughts.
    """
    answer = _answer(_answers.after_thinking(completion))
    if answer is None:
      return {'correct': 0.0, 'parsed': 0.0}
    correct = _answers.equal(answer, example.answer)
    return {'correct': float(correct), 'parsed': 1.0}


def make(path: str = '') -> GSM8K:
  """Reads the problems.

  Args:
    path: the publisher's train.jsonl or test.jsonl, local or on gs://.

  Raises:
    ValueError: no path, an unreadable or empty file, or a line that is not a
      problem; the message names file and line.
  """
  if not path:
    raise ValueError('gsm8k needs a file: set --config.task.path=... to the '
                     'train.jsonl or test.jsonl of grade-school-math.')
  try:
    lines = epath.Path(path).read_bytes().split(b'\n')
  except OSError as error:
    raise ValueError(f'gsm8k cannot read {path!r} ({error}): set '
                     '--config.task.path=... to a JSONL file.') from error
  examples = []
  for number, line in enumerate(lines, start=1):
    if not line.strip():
      continue
    try:
      examples.append(_example(line))
    except ValueError as error:
      raise ValueError(f'{path}, line {number}: {error}') from error
  if not examples:
    raise ValueError(f'{path} holds no problems: expected JSON lines with '
                     '"question" and "answer".')
  return GSM8K(examples)


def _example(line: bytes) -> types.Example:
  """One line of the file; ValueError says what is wrong with it."""
  row = json.loads(line)
  if not isinstance(row, dict):
    raise ValueError('expected a JSON object with "question" and "answer".')
  for field in ('question', 'answer'):
    if not isinstance(row.get(field), str):
      raise ValueError(f'expected text in the field {field!r}.')
  _, mark, gold = row['answer'].rpartition(_MARK)
  gold = gold.strip()
  # A gold that cannot be read would make its problem unsolvable, unseen.
  if not mark or _answers.first_number(gold) != gold:
    raise ValueError(f'expected "answer" to end in {_MARK} and a number, got '
                     f'{row["answer"][-40:]!r}.')
  return types.Example(question=row['question'], answer=gold)


def _answer(text: str) -> str | None:
  """What the text answers, None if nothing."""
  boxed = _answers.last_boxed(text)
  if boxed is not None:
    return boxed
  _, mark, after = text.rpartition(_MARK)
  marked = _answers.first_number(after) if mark else None
  return marked if marked is not None else _answers.last_number(text)
