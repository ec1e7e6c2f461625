# SPDX-License-Identifier: Apache-2.0
"""GSM8K: every published row, what counts as an answer, broken files."""

import json
import pathlib

import pytest

from lapo_jax import plugins, types
from lapo_jax.tasks import gsm8k

_DATA = pathlib.Path(__file__).parents[1] / '..' / 'shared' / 'data'


@pytest.fixture(autouse=True)
def _home(tmp_path, monkeypatch):
  """Prepared problems go where this test's files are."""
  monkeypatch.setenv('HOME', str(tmp_path / 'home'))


def _write(path, rows):
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  return str(path)


@pytest.mark.parametrize('split, num_rows', [('train', 7473), ('test', 1319)])
def test_published_rows(split, num_rows):
  path = _DATA / f'gsm8k_{split}.jsonl'
  if not path.exists():
    pytest.skip(f'{path} is not here')
  task = plugins.make('tasks', 'gsm8k', path=str(path))
  assert len(task) == num_rows
  assert task.manifest['files'][0]['dropped'] == {}
  for i in range(num_rows):
    example = task[i]
    assert example.question and example.level == ''
    for form in ('\\boxed{%s}', '#### %s', 'The answer is $%s.'):
      completion = 'Hm, 4.</think> So ' + form % example.answer
      assert task.grade(completion, example) == {'correct': 1.0, 'parsed': 1.0}
    wrong = f'</think>\\boxed{{{example.answer}1}}'
    assert task.grade(wrong, example)['correct'] == 0.0


def test_the_order_of_the_file_is_the_problem_id(tmp_path):
  path = tmp_path / 'rows.jsonl'
  rows = [{'question': f'q{i}\u2028', 'answer': f'w\n#### {i},000'}
          for i in range(3)]
  # Raw line separators inside strings, Windows line ends, an empty line.
  path.write_bytes('\r\n'.join(
      json.dumps(row, ensure_ascii=False) for row in rows).encode() + b'\n\n')
  task = gsm8k.make(path=str(path))
  assert [task[i] for i in range(len(task))] == [
      types.Example(question=f'q{i}\u2028', answer=f'{i},000')
      for i in range(3)]
  assert len(list(task)) == 3
  assert task.ids == ['#1', '#2', '#3']


@pytest.mark.parametrize('completion, correct, parsed', [
    (r'</think>\boxed{1,080}', 1, 1),
    (r'</think>\boxed{\$1080.00}', 1, 1),
    (r'</think>#### 1080' '\n(2 days)', 1, 1),
    (r'</think>#### none, 1080', 1, 1),
    (r'</think>first 7, then 1080.', 1, 1),
    (r'</think>\boxed{7} #### 1080', 0, 1),         # the box comes first
    (r'</think>#### 7, not 1080', 0, 1),
    (r'</think>\boxed{1080\%}', 0, 1),
    (r'</think>\boxed{x}', 0, 1),
    (r'</think>no idea', 0, 0),
    (r'</think>', 0, 0),
    (r'\boxed{1080}', 0, 0),                        # never stopped thinking
    (r'\boxed{1080}</think>no idea', 0, 0),         # an answer in thought only
    ('', 0, 0),
])
def test_grade(tmp_path, completion, correct, parsed):
  task = gsm8k.make(path=_write(
      tmp_path / 'x', [{'question': 'q', 'answer': '#### 1,080'}]))
  assert task.grade(completion, task[0]) == {
      'correct': correct, 'parsed': parsed}


def test_a_prompt_that_opens_no_thoughts(tmp_path):
  path = _write(tmp_path / 'x', [{'question': 'q', 'answer': '#### 1,080'}])
  task = gsm8k.make(path=path, thinking=False)
  for completion, correct in (('It is 1080.', 1), ('<think>1080', 0),
                              ('<think>7</think>1080', 1)):
    assert task.grade(completion, task[0])['correct'] == correct


_GOOD = '{"question": "q", "answer": "#### 1"}\n'


@pytest.mark.parametrize('line', [
    '{"question": "q"', '[]', '5', '{"question": "q"}', '{"answer": "#### 1"}',
    '{"question": "q", "answer": null}', '{"question": "q", "answer": "1"}',
    '{"question": "q", "answer": "####"}',
    '{"question": "q", "answer": "#### many"}',
    '{"question": "q", "answer": "#### 1 apple"}', '\ud800',
])
def test_a_bad_line_is_named(tmp_path, line):
  path = tmp_path / 'rows.jsonl'
  path.write_bytes((_GOOD + line + '\n').encode('utf-8', 'surrogatepass'))
  with pytest.raises(ValueError, match=r'rows\.jsonl, line 2: '):
    gsm8k.make(path=str(path))
  path.write_bytes(path.read_bytes() + _GOOD.encode())
  task = gsm8k.make(path=str(path), bad_rows='drop')
  entry, = task.manifest['files']
  assert len(task) == entry['kept'] == 2
  assert entry['rows'] == 3 and sum(entry['dropped'].values()) == 1
  assert pathlib.Path('~/.cache/lapo_jax/datasets').expanduser().exists()


def test_no_file(tmp_path):
  (tmp_path / 'empty').write_text('\n')
  for path, message in (('', r'--config\.task\.path='),
                        (str(tmp_path / 'absent'), r'--config\.task\.path='),
                        (str(tmp_path), r'--config\.task\.path='),
                        (str(tmp_path / 'empty'), 'holds no problems')):
    with pytest.raises(ValueError, match=message):
      gsm8k.make(path=path)
