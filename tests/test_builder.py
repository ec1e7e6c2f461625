# SPDX-License-Identifier: Apache-2.0
"""Foreign files: what is read, what is refused where, what the cache keeps."""

import importlib
import json
import logging
import pathlib
import subprocess
import sys

import pytest

from lapo_jax import types
from lapo_jax.tasks import _builder, _problems, _rows, gsm8k

_ROOT = pathlib.Path(__file__).parents[1]
_ROWS = [{'question': f'q{i}', 'answer': f'{i}'} for i in range(3)]


def _parse(fields):
  if fields.get('answer') == 'none':
    return 'no answer'
  return types.Example(question=_rows.text(fields, 'question'),
                       answer=_rows.text(fields, 'answer'))


@pytest.fixture
def prepare(tmp_path):
  """bytes -> the file's problems, the cache being beside the file."""

  def prepare(data, bad_rows='refuse', name='rows.jsonl'):
    path = tmp_path / name
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return _problems.prepare(str(path), _parse, bad_rows,
                             str(tmp_path / 'cache'))

  return prepare


def _lines(rows):
  return '\n'.join(json.dumps(row) for row in rows) + '\n'


def _parquet(rows):
  pyarrow = pytest.importorskip('pyarrow')
  parquet = pytest.importorskip('pyarrow.parquet')
  sink = pyarrow.BufferOutputStream()
  parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
  return sink.getvalue().to_pybytes()


@pytest.mark.parametrize('write', [
    lambda: _lines(_ROWS),
    lambda: _lines(_ROWS).rstrip('\n'),
    lambda: _lines(_ROWS).replace('\n', '\r\n\r\n'),
    lambda: '\ufeff' + _lines(_ROWS),
    lambda: json.dumps(_ROWS),
    lambda: json.dumps(_ROWS, indent=4).replace('\n', '\r\n') + '\r\n',
    lambda: '\ufeff ' + json.dumps(_ROWS, indent=1),
    lambda: _parquet(_ROWS),
], ids=['lines', 'no end', 'windows', 'mark', 'array', 'array windows',
        'array mark', 'parquet'])
@pytest.mark.parametrize('name', ['rows', 'rows.json'])
def test_one_content_in_every_format(prepare, write, name):
  file = prepare(write(), name=name)
  assert file.problems() == [
      (f'#{i + 1}', types.Example(question=f'q{i}', answer=f'{i}'))
      for i in range(3)]
  assert file.entry['rows'] == file.entry['kept'] == 3
  assert not file.entry['dropped']


def test_text_comes_back_as_it_was(prepare):
  odd = 'a\u2028b\r\n\t\0 \\frac{1}{2} 𝛑 é e\u0301 "\''
  for data in (_lines([{'question': odd, 'answer': odd}]),
               json.dumps([{'question': odd, 'answer': odd}],
                          ensure_ascii=False)):
    assert prepare(data).problems()[0][1] == types.Example(
        question=odd, answer=odd)


def test_all_that_a_file_decides_is_kept(tmp_path):
  example = types.Example(question='q', answer='4.2', unit='%', tolerance=0.1,
                          level='4.25')
  record = _problems._record('x', example)
  _builder.write(tmp_path / 'a', [record], {})
  assert _builder.read(tmp_path / 'a') == [record]
  assert _problems._named(record) == ('x', example)


def test_ids_are_the_files_own(prepare):
  rows = [{**row, **own} for row, own in zip(
      _ROWS, ({'id': 7}, {'unique_id': 'test/1', 'id': 7}, {'id': None}),
      strict=True)]
  assert [name for name, _ in prepare(_lines(rows)).problems()] == [
      '7', 'test/1', '#3']


_GOOD = '{"question": "q", "answer": "1"}'


@pytest.mark.parametrize('line, reason', [
    ('{"question": "q"', 'not JSON'),
    ('{"question": "q", "answer": "1"} x', 'not JSON'),
    ('[]', 'not an object with fields'),
    ('5', 'not an object with fields'),
    ('null', 'not an object with fields'),
    ('{}', "no field 'question'"),
    ('{"question": "q"}', "no field 'answer'"),
    ('{"question": "q", "answer": 5}', "field 'answer' is not text"),
    ('{"question": null, "answer": "1"}', "field 'question' is not text"),
    ('{"question": " ", "answer": "1"}', "field 'question' is empty"),
    ('{"question": "\\ud800", "answer": "1"}',
     "field 'question' is not Unicode"),
    ('{"question": "q", "answer": "1", "id": 1.5}', "field 'id' is not text"),
    ('{"question": "q", "answer": "1", "id": true}', "field 'id' is not text"),
    ('[' * 100_000, 'not JSON that can be read'),
    ('{"question": ' + '{"a": ' * 100_000, 'not JSON that can be read'),
    ('{"id": ' + '9' * 5000 + '}', 'not JSON that can be read'),
    (b'\xff\xfe'.decode('latin-1'), 'not UTF-8'),
], ids=range(17))
def test_a_bad_line_is_named_or_counted(prepare, line, reason):
  encoding = 'latin-1' if reason == 'not UTF-8' else 'utf-8'
  data = '\n'.join([_GOOD, '', line, _GOOD]).encode(encoding)
  with pytest.raises(ValueError, match=r'rows\.jsonl, line 3: ') as error:
    prepare(data)
  message = str(error.value)
  assert reason in message and 'bad_rows=drop' in message
  assert '\n' not in message and len(message) < 500
  entry = prepare(data, 'drop').entry
  assert (entry['rows'], entry['kept']) == (3, 2)
  assert entry['dropped'] == {reason: 1}
  with pytest.raises(ValueError, match='line 3: '):
    prepare(data)  # the cache of a run that dropped it does not hide it


@pytest.mark.parametrize('bad_rows', _problems.BAD_ROWS)
@pytest.mark.parametrize('array, place, reason', [
    ('[' + _GOOD, 'row 1, line 1', 'not JSON'),
    ('[\n' + _GOOD + ',\n{"question": "q', 'row 2, line 3', 'not JSON'),
    ('[\n' + _GOOD + '\n' + _GOOD + ']', 'row 1, line 3', 'Expecting , or ]'),
    ('[\n' + _GOOD + ',\n]', 'row 2, line 3', 'not JSON'),
    ('[' + _GOOD + ']\n\nx', 'line 3', 'more after the end'),
    ('[\n\n' + '[' * 100_000, 'row 1, line 3', 'nested too deeply'),
    ('[\n{"a":' * 100_000, 'row 1, line 2', 'nested too deeply'),
    ('[' + _GOOD + ',\n' + '9' * 5000 + ']', 'row 2, line 2', 'the rest'),
    (('[\n' + _GOOD).encode() + b'\xff]', 'line 2', 'not UTF-8'),
], ids=range(9))
def test_a_broken_array_is_refused(prepare, array, place, reason, bad_rows):
  with pytest.raises(ValueError, match='rows.json, ' + place) as error:
    prepare(array, bad_rows, name='rows.json')
  assert reason in str(error.value) and '\n' not in str(error.value)


def test_a_bad_row_of_an_array_or_of_parquet(prepare):
  rows = [*_ROWS, {'question': 'q', 'answer': None}]
  for data, place in ((json.dumps(rows, indent=1), 'row 4, line 14'),
                      (_parquet(rows), 'row 4')):
    with pytest.raises(ValueError, match=f"{place}: field 'answer'"):
      prepare(data)
    assert prepare(data, 'drop').entry['dropped'] == {
        "field 'answer' is not text": 1}


def test_two_rows_of_one_id(prepare):
  rows = [{**row, 'id': min(i, 1)} for i, row in enumerate(_ROWS)]
  with pytest.raises(ValueError, match='line 3: duplicate id: that of line 2'):
    prepare(_lines(rows))
  file = prepare(_lines(rows), 'drop')
  assert file.entry['dropped'] == {'duplicate id': 1}
  assert [named[1].question for named in file.problems()] == ['q0', 'q1']


def test_rows_left_out_are_no_error(prepare):
  rows = [*_ROWS, {'question': 'q', 'answer': 'none'}]
  entry = prepare(_lines(rows)).entry
  assert (entry['rows'], entry['kept']) == (4, 3)
  assert entry['dropped'] == {'no answer': 1}


@pytest.mark.parametrize('data', ['', '\n', '[]', '[\n]', '\ufeff',
                                  '{"question": "q", "answer": "none"}'])
def test_no_problems(prepare, data):
  with pytest.raises(ValueError, match='rows.jsonl holds no problems: . rows'):
    prepare(data)


def test_broken_parquet(prepare, monkeypatch):
  whole = _parquet(_ROWS)
  for data in (b'PAR1', whole[:-20], b'PAR1' + b'x' * 500 + b'PAR1'):
    with pytest.raises(ValueError, match='not parquet that can be') as error:
      prepare(data)
    assert '\n' not in str(error.value)
  monkeypatch.setitem(sys.modules, 'pyarrow', None)
  with pytest.raises(ValueError, match='pip install'):
    prepare(whole)


def test_no_file_no_cache_no_such_choice(prepare, tmp_path):
  for path in (tmp_path, tmp_path / 'absent'):
    with pytest.raises(ValueError, match=r'cannot read .*task\.path='):
      _problems.prepare(str(path), _parse, 'refuse', '')
  with pytest.raises(ValueError, match="'ignore': expected one of"):
    prepare(_GOOD, 'ignore')
  (tmp_path / 'rows.jsonl').write_text(_GOOD)
  with pytest.raises(ValueError, match=r'--config\.task\.cache='):
    _problems.prepare(str(tmp_path / 'rows.jsonl'), _parse, 'refuse',
                      str(tmp_path / 'rows.jsonl'))


def test_built_once_per_content(prepare, tmp_path, monkeypatch):
  first = prepare(_lines(_ROWS))
  assert prepare(_lines(_ROWS[:2])).folder != first.folder
  monkeypatch.setattr(_builder, 'write', None)
  assert prepare(_lines(_ROWS)) == first
  names = {path.name for path in (tmp_path / 'cache').iterdir()}
  assert len(names) == 2 and all(name.startswith('rows-') for name in names)


def test_changed_code_builds_anew(tmp_path, monkeypatch):
  code = ('from lapo_jax import types\n'
          'def parse(fields):\n'
          '  return types.Example(question="{}", answer=fields["answer"])\n')
  monkeypatch.syspath_prepend(tmp_path)
  (tmp_path / 'rows.jsonl').write_text(_lines(_ROWS))
  found = []
  for word in ('one', 'three'):
    (tmp_path / 'their_rows.py').write_text(code.format(word))
    importlib.invalidate_caches()
    sys.modules.pop('their_rows', None)
    parse = importlib.import_module('their_rows').parse
    file = _problems.prepare(str(tmp_path / 'rows.jsonl'), parse, 'refuse',
                             str(tmp_path / 'cache'))
    found.append(file.problems()[0][1].question)
  sys.modules.pop('their_rows')
  assert found == ['one', 'three']


def test_a_build_that_dies_leaves_nothing(prepare, tmp_path, monkeypatch):
  with monkeypatch.context() as broken:
    broken.setattr(_builder, '_SUMMARY', None)
    with pytest.raises(TypeError):
      prepare(_lines(_ROWS))
  assert not list((tmp_path / 'cache').iterdir())
  assert len(prepare(_lines(_ROWS)).problems()) == 3


@pytest.mark.parametrize('file', ['summary.json', 'problems/1.0.0/*.array*'])
def test_a_damaged_cache_is_named(prepare, tmp_path, file):
  prepare(_lines(_ROWS))
  [there] = (tmp_path / 'cache').glob(f'*/{file}')
  there.write_bytes(there.read_bytes()[:-3])
  with pytest.raises(ValueError, match='data cache .*/cache/.* is damaged .*: '
                                       'delete it'):
    prepare(_lines(_ROWS)).problems()


def test_the_first_of_two_builds_wins(tmp_path):
  for word in ('first', 'second'):
    _builder.write(tmp_path / 'cache' / 'x', [{'a': word}], {'a': word})
  assert _builder.read(tmp_path / 'cache' / 'x') == [{'a': 'first'}]
  assert _builder.read_summary(tmp_path / 'cache' / 'x') == {'a': 'first'}
  assert [path.name for path in (tmp_path / 'cache').iterdir()] == ['x']


def test_the_log_is_quiet_and_as_loud_as_before(prepare, capfd, caplog):
  before = logging.getLogger().level, logging.getLogger('absl').level
  with caplog.at_level('INFO'):
    prepare(_lines(_ROWS)).problems()
  assert not caplog.records and capfd.readouterr() == ('', '')
  assert before == (logging.getLogger().level,
                    logging.getLogger('absl').level)


_BUILD = """
import sys
sys.addaudithook(lambda event, _: event != 'socket.connect' or sys.exit(event))
from lapo_jax.tasks import gsm8k
import tensorflow_datasets
print('ready', flush=True)
sys.stdin.readline()
task = gsm8k.make(path=sys.argv[1], cache=sys.argv[2])
assert len(task) == 500 and task[499].answer == '499'
assert 'tensorflow' not in sys.modules
"""


def test_three_builds_at_once_without_tensorflow_or_network(tmp_path):
  rows = [{'question': f'q{i}', 'answer': f'#### {i}'} for i in range(500)]
  (tmp_path / 'rows.jsonl').write_text(_lines(rows))
  builds = [subprocess.Popen(
      [sys.executable, '-W', 'error', '-c', _BUILD,
       str(tmp_path / 'rows.jsonl'), str(tmp_path / 'cache')],
      cwd=_ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT, text=True) for _ in range(3)]
  for build in builds:
    assert build.stdout.readline() == 'ready\n'
  for build in builds:
    build.stdin.write('go\n')
    build.stdin.flush()
  for build in builds:
    assert build.communicate()[0] == '' and build.returncode == 0
  assert len(list((tmp_path / 'cache').iterdir())) == 1


def test_a_warm_cache_needs_no_tensorflow_datasets(tmp_path):
  path = tmp_path / 'rows.jsonl'
  path.write_text(_lines([{'question': 'q', 'answer': '#### 1'}]))
  settings = {'path': str(path), 'cache': str(tmp_path / 'cache')}
  gsm8k.make(**settings)
  done = subprocess.run(
      [sys.executable, '-c',
       'import sys, json\n'
       'from lapo_jax.tasks import gsm8k\n'
       'assert len(gsm8k.make(**json.loads(sys.argv[1]))) == 1\n'
       'assert "tensorflow_datasets" not in sys.modules',
       json.dumps(settings)], cwd=_ROOT, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
