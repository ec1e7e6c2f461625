# SPDX-License-Identifier: Apache-2.0
"""Problems of mathematics: the published files, their warts, mixtures."""

import collections
import functools
import itertools
import json
import pathlib
import re
import subprocess
import sys

import pytest

from lapo_jax import grader, plugins, types
from lapo_jax.tasks import _equivalence, math

_ROOT = pathlib.Path(__file__).parents[1]
_DATA = _ROOT.parent / 'shared' / 'data'

if not _equivalence.available():
  pytest.skip('math-verify is not installed', allow_module_level=True)

# File -> rows, rows without an answer, and the answers that may be beyond the
# grader's reader (experiments/problems lists those that are).
_FILES = {
    'math_train.json': (7474, 4, 7),
    'aime_train.json': (975, 0, 0),
    'math500.json': (500, 0, 0),
    'aime24.json': (30, 0, 0),
    'amc23.jsonl': (40, 0, 0),
    'olympiad_bench.json': (675, 0, 3),
}


@pytest.fixture(scope='session')
def cache(tmp_path_factory):
  return str(tmp_path_factory.mktemp('datasets'))


_PREPARE = """
import pathlib, sys
from lapo_jax.tasks import gsm8k, math
for path in pathlib.Path(sys.argv[1]).glob('*.json*'):
  task = gsm8k if 'gsm8k' in path.name else math
  task.make(path=str(path), cache=sys.argv[2])
"""


@pytest.fixture(scope='session')
def published(cache):
  """file -> the task."""
  if not _DATA.exists():
    pytest.skip(f'{_DATA} is not here')
  # In a process that checks no types: that takes ten times as long.
  done = subprocess.run([sys.executable, '-c', _PREPARE, str(_DATA), cache],
                        cwd=_ROOT, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr

  @functools.cache
  def make(file):
    name = 'gsm8k' if 'gsm8k' in file else 'math'
    return plugins.make('tasks', name, path=str(_DATA / file), cache=cache)

  return make


@pytest.fixture
def make(tmp_path, cache):
  """rows, settings -> the task of a file that holds them."""

  def make(rows, **settings):
    (tmp_path / 'rows.json').write_text(json.dumps(rows))
    return math.make(path=str(tmp_path / 'rows.json'), cache=cache, **settings)

  return make


def _rows(count, first=0, levels=(1, 2, 3, 4, 5)):
  return [{'problem': f'What is {i} + 0?', 'answer': str(i),
           'difficulty': float(levels[i % len(levels)])}
          for i in range(first, first + count)]


def _answers(task):
  return [int(task[i].answer) for i in range(len(task))]


@pytest.mark.parametrize('file', _FILES)
def test_published_rows(published, file):
  task = published(file)
  num_rows, num_without, most_unreadable = _FILES[file]
  entry, = task.manifest['files']
  dropped = dict(entry['dropped'])
  assert entry['rows'] == num_rows
  assert dropped.pop('no answer', 0) == num_without
  assert set(dropped) <= {'unreadable answer', 'unreadable Expression',
                          'unreadable Interval', 'unreadable Tuple'}
  assert sum(dropped.values()) <= most_unreadable
  assert len(task) == entry['chosen'] == entry['kept'] == (
      num_rows - num_without - sum(dropped.values()))
  assert len(set(task.ids)) == len(task)
  for i in range(0, len(task), 1 + len(task) // 500):
    example = task[i]
    assert example.question and example.answer and '$' not in (
        example.answer.replace('\\$', ''))
    completion = f'So \\boxed{{1}}</think> It is $\\boxed{{{example.answer}}}$.'
    assert task.grade(completion, example) == {'correct': 1, 'parsed': 1}, i
    assert task.grade(completion.replace('</think>', ''), example) == {
        'correct': 0, 'parsed': 0}


def test_levels(published):
  def levels(file):
    task = published(file)
    return collections.Counter(task[i].level for i in range(len(task)))

  found = levels('math_train.json')
  assert 2296 - 7 <= found.pop('5') <= 2296
  assert found == {'': 2, '1': 564, '2': 1345, '3': 1581, '4': 1681}
  assert levels('math500.json') == {
      '1': 43, '2': 90, '3': 105, '4': 128, '5': 134}
  assert levels('aime24.json')['4'] == 10
  assert levels('aime24.json')['2.375'] == 1
  assert set(levels('amc23.jsonl')) == set(levels('olympiad_bench.json')) == {
      ''}


def test_ids_units_and_golds(published):
  task = published('math500.json')
  assert task.ids[0] == 'test/precalculus/807.json'
  assert task[0].answer == '\\left( 3, \\frac{\\pi}{2} \\right)'
  assert published('math_train.json').ids[1] == '#2'
  task = published('amc23.jsonl')
  assert [task[i].answer for i in (0, 3, 15)] == ['27', '3159', '-1']
  task = published('olympiad_bench.json')
  examples = [task[i] for i in range(len(task))]
  units = collections.Counter(example.unit for example in examples)
  assert units.pop('') > 660
  assert units == {
      '^{\\circ}': 1, 'minute': 1, 'km': 1, 'cm^2': 1, 'km/h': 1,
      'min': 1, 'minutes': 1, '%': 1}
  loose = examples[[example.tolerance > 0 for example in examples].index(True)]
  assert (loose.answer, loose.unit, loose.tolerance) == ('4.2', '%', 0.1)
  for answer, correct in (('4.2', 1), ('4.2\\%', 1), ('4.15', 1), ('4.4', 0)):
    assert task.grade(f'</think>\\boxed{{{answer}}}', loose)[
        'correct'] == correct
  assert task.ids[0] == '1606' and '69,84' in {x.answer for x in examples}


def _level_text(text):
  """A problem's text without what only sets it."""
  text = re.sub(r'\\(?:left|right|qquad|quad|[,;:! ])|\$|~|\\[()\[\]]', '',
                text.lower())
  return re.sub(r'\s', '', text)


def test_train_problems_in_test_files(published):
  def texts(*files):
    return {_level_text(task[i].question): f'{file} {task.ids[i]}'
            for file in files for task in [published(file)]
            for i in range(len(task))}

  train = texts('math_train.json', 'aime_train.json', 'gsm8k_train.jsonl')
  test = texts('math500.json', 'aime24.json', 'amc23.jsonl',
               'olympiad_bench.json', 'gsm8k_test.jsonl')
  assert len(train) > 15_000 and len(test) > 2_500
  # None by the exact text. These five, set a little differently, are in both:
  # whoever trains on AIME must leave them out.
  assert {train[text] for text in train.keys() & test.keys()} == {
      f'aime_train.json #{row}' for row in (2, 303, 561, 726, 787)}
  assert all(test[text].startswith('math500.json')
             for text in train.keys() & test.keys())
  assert _level_text('$\\left( X\\,\\right)$ ') == _level_text('(x)')


@pytest.mark.parametrize('answer, more, gold', [
    ('5', {}, '5'), (5, {}, '5'), (27.0, {}, '27'), (2.5, {}, '2.5'),
    (10**30, {}, str(10**30)), (-0.0, {}, '0'), ('27.0', {}, '27.0'),
    (' $\\frac{1}{2}$. ', {}, '\\frac{1}{2}'), ('\\$18.90', {}, '\\$18.90'),
    ('1,000', {}, '1,000'),
    (['$69$,$84$'], {'is_multiple_answer': True}, '69,84'),
    ("['$69$,$84$']", {'is_multiple_answer': True}, '69,84'),
    (['69', '84'], {}, '69, 84'), ("['69', '84']", {}, '69, 84'),
    ("['$221,$8$']", {'is_multiple_answer': True}, '221,8'),
    ("['27,54,108,135']", {'is_multiple_answer': True}, '27,54, 108, 135'),
    ("['1{,}000,7']", {'is_multiple_answer': True}, '1{,}000,7'),
    ("['(312,123,231)']", {'answer_type': 'Tuple'}, '(312, 123, 231)'),
    ("['\\\\frac{1}{2}']", {}, '\\frac{1}{2}'),
    ("['\\frac{1}{2}']", {}, '\\frac{1}{2}'),
    ("['2500,000']", {'answer_type': 'Numerical'}, '2500,000'),
    ('[1,2]', {}, '[1,2]'), ('[0, 1]', {}, '[0, 1]'),
])
def test_gold(make, answer, more, gold):
  task = make([{'problem': 'q', 'answer': answer, **more}])
  assert task[0].answer == gold


@pytest.mark.parametrize('row, reason', [
    ({'answer': None}, 'no answer'), ({'answer': ''}, 'no answer'),
    ({'answer': ' '}, 'no answer'), ({'answer': '$$'}, 'no answer'),
    ({'answer': []}, 'no answer'),
    ({'answer': '\\mho(a) where a'}, 'unreadable answer'),
    ({'answer': '9' * 201}, 'unreadable answer'),
    ({'answer': '\\mho(a) where a', 'answer_type': 'Tuple'},
     'unreadable Tuple'),
    ({'answer': '\\mho(a) where a', 'answer_type': 'x'}, 'unreadable answer'),
])
def test_left_out(make, row, reason):
  task = make([{'problem': 'q', 'answer': '1'}, {'problem': 'q', **row}])
  assert task.manifest['files'][0]['dropped'] == {reason: 1}


@pytest.mark.parametrize('row, reason', [
    ({}, "no field 'answer': the row has 'problem'"),
    ({'answer': True}, "field 'answer' is not text: got a truth value"),
    ({'answer': {}}, "field 'answer' is not text: got an object"),
    ({'answer': [1]}, "field 'answer' is not text: got a number"),
    ({'answer': [['1']]}, "field 'answer' is not text: got an array"),
    ({'answer': float('inf')}, "field 'answer' is not text: got a number"),
    ({'answer': '1', 'problem': 5}, "field 'problem' is not text"),
    ({'answer': '1', 'problem': None}, "field 'problem' is not text"),
    ({'answer': '1', 'context': 5}, "field 'context' is not text"),
    ({'answer': '1', 'unit': 5}, "field 'unit' is not text"),
    ({'answer': '1', 'error': 'small'}, "field 'error' is no number"),
    ({'answer': '1', 'error': -1}, "field 'error' is negative"),
    ({'answer': '1', 'difficulty': 'hard'}, "field 'difficulty' is no number"),
    ({'answer': '1', 'difficulty': True}, "field 'difficulty' is no number"),
    ({'answer': '1', 'level': [5]}, "field 'level' is no number"),
    ({'answer': '1', 'level': 10**400}, "field 'level' is no number"),
])
def test_a_bad_row(make, row, reason):
  rows = [{'problem': 'q', 'answer': '1'}, {'problem': 'q', **row}]
  with pytest.raises(ValueError, match='rows.json, row 2, line 1: ') as error:
    make(rows)
  assert reason in str(error.value)
  entry, = make(rows, bad_rows='drop').manifest['files']
  assert (entry['rows'], entry['kept']) == (2, 1)
  assert entry['dropped'] == {reason.partition(':')[0]: 1}


def test_what_a_row_may_say_besides(make):
  rows = [
      {'problem': 'q', 'answer': '3', 'context': 'c', 'error': '1e-1',
       'unit': '$cm^2$', 'difficulty': 4.25},
      {'problem': 'q', 'answer': '3', 'context': None, 'error': None,
       'unit': None, 'difficulty': 0.0, 'level': 3},
      {'problem': 'q', 'answer': '3', 'error': float('nan'),
       'difficulty': float('nan'), 'level': '5'}]
  task = make(rows)
  assert [task[i] for i in range(3)] == [
      types.Example(question='c\n\nq', answer='3', unit='cm^2', tolerance=0.1,
                    level='4.25'),
      types.Example(question='q', answer='3', level='3'),
      types.Example(question='q', answer='3', level='5')]


@pytest.mark.parametrize('completion, thinking, correct, parsed', [
    ('</think>\\boxed{0.5}', True, 1, 1),
    ('</think>\\boxed{3} or \\boxed{\\dfrac12}', True, 1, 1),
    ('</think>\\boxed{\\dfrac12} or \\boxed{3}', True, 0, 1),
    ('</think>0.5', True, 0, 0),
    ('\\boxed{0.5}</think>', True, 0, 0),
    ('\\boxed{0.5}', True, 0, 0),
    ('\\boxed{0.5}', False, 1, 1),
    ('<think>\\boxed{3}</think>\\boxed{0.5}', False, 1, 1),
    ('<think>\\boxed{0.5}', False, 0, 0),
    ('', True, 0, 0),
])
def test_grade(make, completion, thinking, correct, parsed):
  task = make([{'problem': 'q', 'answer': '\\frac{1}{2}'}], thinking=thinking)
  assert task.grade(completion, task[0]) == {
      'correct': correct, 'parsed': parsed}


def test_one_file_keeps_its_order(make):
  task = make(_rows(50))
  assert _answers(task) == list(range(50))
  few, more = (_answers(make(_rows(50), num_examples=n, seed=1))
               for n in (10, 20))
  assert few == sorted(few) and len(few) == 10 and set(few) < set(more)
  assert few != list(range(10))
  # A new row may take the place of one other and moves no more.
  now = _answers(make(_rows(1, 99) + _rows(50), num_examples=20, seed=1))
  assert set(now) <= {99, *more} and len(now) == 20


@pytest.fixture
def mixed(tmp_path, cache):
  """settings -> the task over two files of 50 problems each."""
  for name, first in (('a', 0), ('b', 1000)):
    (tmp_path / f'{name}.json').write_text(json.dumps(_rows(50, first)))

  def mixed(*sources, **settings):
    return math.make(path=str(tmp_path), sources=sources, cache=cache,
                     **settings)

  return mixed


def test_a_mixture_by_count_and_level(mixed):
  sources = ({'path': 'a.json', 'count': 30},
             {'path': 'b.json', 'count': 12, 'levels': (3, 4, 5)})
  task = mixed(*sources)
  answers = _answers(task)
  assert len(task) == len(set(answers)) == 42
  assert sum(answer >= 1000 for answer in answers) == 12
  assert {task[i].level for i in range(42) if answers[i] >= 1000} == {
      '3', '4', '5'}
  # Any cut is a mixture: 12 of the second file do not stand together.
  assert len(list(itertools.groupby(answers, lambda x: x >= 1000))) > 6
  assert {x >= 1000 for x in answers[:20]} == {x >= 1000 for x in answers[20:]}
  assert [file['chosen'] for file in task.manifest['files']] == [30, 12]
  # The same again, also from settings that went through JSON.
  settings = json.loads(json.dumps({'sources': sources}))
  assert _answers(mixed(*settings['sources'])) == answers
  assert set(_answers(mixed(*sources, seed=1))) != set(answers)
  # What a source gives does not depend on its neighbours.
  alone = set(_answers(mixed(sources[1])))
  assert alone == {x for x in answers if x >= 1000}
  # Levels apart are two sources in one file.
  task = mixed({'path': 'a.json', 'count': 3, 'levels': [1]},
               {'path': 'a.json', 'count': 4, 'levels': [2, 3]})
  levels = collections.Counter(task[i].level for i in range(7))
  assert levels['1'] == 3 and levels['2'] + levels['3'] == 4


@pytest.mark.parametrize('weights, total, counts', [
    ((1, 1), 10, [5, 5]), ((1, 1), 11, [6, 5]), ((0.6, 0.4), 50, [30, 20]),
    ((3, 1), 10, [8, 2]), ((2, 1), 50, [33, 17])])
def test_a_mixture_by_weight(mixed, weights, total, counts):
  task = mixed(*({'path': f'{name}.json', 'weight': weight}
                 for name, weight in zip('ab', weights, strict=True)),
               num_examples=total)
  assert [file['chosen'] for file in task.manifest['files']] == counts
  assert len(_answers(task)) == total


@pytest.mark.parametrize('sources, settings, message', [
    ([{'path': 'a.json', 'count': 51}], {}, '50 problems, asked for 51'),
    ([{'path': 'a.json', 'count': 11, 'levels': (3,)}], {},
     '10 problems of level 3, asked for 11'),
    ([{'path': 'a.json', 'count': 1, 'levels': (7,)}], {}, '0 problems of'),
    ([{'path': 'a.json', 'weight': 1}], {'num_examples': 60}, 'asked for 60'),
    ([{'path': 'a.json', 'weight': 1}], {}, 'num_examples above 0'),
    ([{'path': 'a.json', 'count': 1}], {'num_examples': 1}, 'expected 0 where'),
    ([{'path': 'a.json', 'count': 1}, {'path': 'b.json', 'weight': 1}],
     {'num_examples': 5}, 'a weight for every source'),
    ([{'path': 'a.json', 'weight': 1}, {'path': 'b.json', 'weight': 99}],
     {'num_examples': 10}, 'leaves nothing'),
    ([{'path': 'a.json', 'count': 1}, {'path': 'a.json', 'count': 1}], {},
     'repeats the problems'),
    ([{'path': 'a.json'}], {}, r'sources\[0\]: expected either'),
    ([{'path': 'a.json', 'count': 1, 'weight': 1}], {}, 'expected either'),
    ([{'path': 'a.json', 'count': 0}], {}, 'expected either'),
    ([{'path': 'a.json', 'count': 1.5}], {}, 'expected either'),
    ([{'path': 'a.json', 'count': True}], {}, 'expected either'),
    ([{'path': 'a.json', 'weight': float('nan')}], {}, 'expected either'),
    ([{'path': 'a.json', 'count': 1, 'level': 5}], {}, 'keys among'),
    ([{'count': 1}], {}, 'expected a "path"'),
    (['a.json'], {}, 'expected a mapping'),
    ([{'path': 'a.json', 'count': 1, 'levels': '345'}], {}, r'\(3, 4, 5\)'),
    ([{'path': 'a.json', 'count': 1, 'levels': 5}], {}, r'\(3, 4, 5\)'),
    ([{'path': 'c.json', 'count': 1}], {}, 'cannot read .*c.json'),
])
def test_a_mixture_that_cannot_be(mixed, sources, settings, message):
  with pytest.raises(ValueError, match=message) as error:
    mixed(*sources, **settings)
  assert '\n' not in str(error.value)


def test_settings_of_one_file(make):
  with pytest.raises(ValueError, match=r'--config\.task\.path='):
    math.make()
  with pytest.raises(ValueError, match='num_examples -1'):
    make(_rows(3), num_examples=-1)
  with pytest.raises(ValueError, match='3 problems, asked for 4'):
    make(_rows(3), num_examples=4)


def test_the_manifest_tells_every_change(make, tmp_path, cache):
  before = make(_rows(5)).manifest
  entry, = before['files']
  assert entry == {'file': 'rows.json', 'sha256': entry['sha256'], 'rows': 5,
                   'kept': 5, 'dropped': {}, 'chosen': 5}
  json.dumps(before)
  # Neither name nor layout of a file decides its problems.
  (tmp_path / 'other.json').write_text(json.dumps(_rows(5), indent=1))
  other = math.make(path=str(tmp_path / 'other.json'), cache=cache).manifest
  assert other['fingerprint'] == before['fingerprint']
  assert other['files'][0]['sha256'] != entry['sha256']
  changes = [_rows(5)[::-1], _rows(4), _rows(5, levels=(2,))]
  for field, value in (('problem', 'q'), ('answer', '7'), ('unit', 'km'),
                       ('error', 0.5), ('id', 'x')):
    changes.append(_rows(5))
    changes[-1][2][field] = value
  found = {make(rows).manifest['fingerprint'] for rows in changes}
  assert len(found) == len(changes) and before['fingerprint'] not in found
  assert before == make(_rows(5)).manifest


def test_the_graders_workers(make, tmp_path, cache):
  task = make([{'problem': 'q', 'answer': '4.2', 'unit': '%', 'error': 0.1}])
  settings = {'path': str(tmp_path / 'rows.json'), 'cache': cache}
  with grader.Grader(('math', settings), deadline=20.0) as graded:
    found = graded.grade(['</think>\\boxed{4.25\\%}', '</think>\\boxed{42}',
                          'no'], 3 * [task[0]])
  assert [x['verdict'] for x in found] == ['correct', 'wrong', 'unparsed']
