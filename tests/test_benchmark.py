# SPDX-License-Identifier: Apache-2.0
"""An evaluation on benchmarks: its numbers, and that no kill is seen.

Random weights answer the toy task now and then; nothing else is a toy.
"""

import json
import math
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from configs import benchmarks as benchmarks_config
from lapo_jax import (
    benchmark,
    eval_folder,
    hosts,
    protocol,
    sampling,
    scores,
)

_ROOT = pathlib.Path(__file__).parent.parent
_TOY = {'task': 'toys.task'}
_BENCHMARKS = {
    'sums': {**_TOY, 'num_samples': 4,
             'settings': {'split': 'test', 'num_examples': 11}},
    'more': {**_TOY, 'num_samples': 2,
             'settings': {'split': 'train', 'num_examples': 5}},
}


def make_config(model_folder, **overrides):
  config = benchmarks_config.get_config()
  config.benchmarks = _BENCHMARKS
  config.model.update(path=model_folder, dtype='float32',
                      param_dtype='float32')
  config.update(template='{question} <think>', max_prompt_length=96,
                max_completion_length=16, batch_size=8, group_size=2)
  config.conflict.update(budgets=(5, 900), benchmark='sums', num_problems=3,
                         num_samples=2)
  config.lock()
  config.update_from_flattened_dict(
      {key.replace('__', '.'): value for key, value in overrides.items()})
  return config


@pytest.fixture(scope='module', autouse=True)
def cache(compile_cache):
  """Every evaluation here compiles the same program."""
  return compile_cache


@pytest.fixture(scope='module')
def straight(tmp_path_factory, model_folder):
  """(folder, what it returned) of an uninterrupted evaluation."""
  folder = tmp_path_factory.mktemp('straight') / 'eval'
  return folder, benchmark.benchmark(make_config(model_folder), str(folder))


def lines(folder):
  return [json.loads(line) for line in
          (folder / 'chunks.jsonl').read_text().splitlines()]


def rows_of(folder, name, budget=0):
  """Rows by problem and sample, each once."""
  rows = [scores.Row(*row[:-1], tuple(row[-1])) for line in lines(folder)
          if (line['benchmark'], line['budget']) == (name, budget)
          for row in line['rows']]
  found = {row[:2]: row for row in rows}
  assert len(found) == len(rows)
  return found


def timeless(found):
  return {key: value for key, value in found.items() if key != 'seconds'}


@pytest.fixture
def count_samples(monkeypatch):
  """How many chunks are sampled from now on, in a list of one number."""
  found = [0]
  make = sampling.make_sample_fn

  def counting(*args, **kwargs):
    sample = make(*args, **kwargs)
    def call(*inputs):
      found[0] += 1
      return sample(*inputs)
    return call

  monkeypatch.setattr(sampling, 'make_sample_fn', counting)
  return found


# ---- What it finds.


def test_every_problem_and_sample_once(straight):
  folder, _ = straight
  sums, more = rows_of(folder, 'sums'), rows_of(folder, 'more')
  assert sums.keys() == {(i, j) for i in range(11) for j in range(4)}
  assert more.keys() == {(i, j) for i in range(5) for j in range(2)}
  for row in (*sums.values(), *more.values()):
    assert row.correct in (0.0, 1.0) and 1 <= row.tokens <= 16
    assert row.verdict in scores.VERDICTS and len(row.keywords) == 4
    assert (row.verdict == 'correct') == (row.correct == 1.0)
    assert row.verdict != 'truncated' or row.tokens == 16


def test_the_scores_are_of_the_rows(straight):
  folder, found = straight
  assert json.loads((folder / 'eval.json').read_text()) == found
  assert list(found['benchmarks']) == ['more', 'sums']
  for name, shape in (('sums', (11, 4)), ('more', (5, 2))):
    rows, mine = rows_of(folder, name), found['benchmarks'][name]
    right = np.array([[rows[i, j].correct for j in range(shape[1])]
                      for i in range(shape[0])])
    tokens = np.array([row.tokens for row in rows.values()])
    assert (mine['problems'], mine['completions']) == (shape[0], right.size)
    assert mine['pass_at_1'] == pytest.approx(right.mean())
    assert mine['standard_error'] == pytest.approx(
        right.mean(1).std(ddof=1) / math.sqrt(shape[0]))
    assert list(mine['pass_at_k']) == ['1', '2', '4'][:shape[1] // 2 + 1]
    # With k = n, pass@k asks whether any sample is right.
    assert mine['pass_at_k'][str(shape[1])] == pytest.approx(
        right.max(1).mean())
    assert mine['mean_tokens'] == pytest.approx(tokens.mean())
    assert mine['median_tokens'] == pytest.approx(np.median(tokens))
    assert sum(mine['verdicts'].values()) == right.size
    assert mine['verdicts']['correct'] == right.sum()
    levels = mine['by_level']
    assert list(levels) == ['1', '2', '3']
    assert levels['2']['pass_at_1'] == pytest.approx(right[1::3].mean())
  mean = lambda key: np.mean([b[key] for b in found['benchmarks'].values()])
  assert found['average']['pass_at_1'] == pytest.approx(mean('pass_at_1'))
  assert found['average']['mean_tokens'] == pytest.approx(mean('mean_tokens'))
  assert found['base'] is None
  # Something is right, something wrong, something cut: a test of something.
  verdicts = found['benchmarks']['sums']['verdicts']
  assert min(verdicts[v] for v in ('correct', 'wrong', 'truncated')) > 0


def test_a_stated_budget_is_asked_of_the_same_problems(straight):
  folder, found = straight
  conflict = found['conflict']
  assert conflict['benchmark'] == 'sums'
  assert list(conflict['budgets']) == ['none', '5', '900']
  told, plain = rows_of(folder, 'sums', 5), rows_of(folder, 'sums')
  assert len(told) == 6 and told.keys() == rows_of(folder, 'sums', 900).keys()
  assert conflict['budgets']['none']['mean_tokens'] == pytest.approx(
      np.mean([plain[key].tokens for key in told]))
  assert conflict['budgets']['5']['mean_tokens'] == pytest.approx(
      np.mean([row.tokens for row in told.values()]))
  assert told != {key: plain[key] for key in told}


def test_the_sentence_of_a_budget(model_folder):
  config = make_config(model_folder)
  passes = protocol.passes(
      config.benchmarks.to_dict(), conflict=config.conflict.to_dict(),
      grader={}, data='', num_samples=0, num_problems=0, seed=0)
  assert [p.label for p in passes] == ['more', 'sums', 'sums told 5',
                                       'sums told 900']
  assert passes[1].example(3) == passes[1].task[3]
  assert passes[2].example(3).prefill == (
      ' I will answer the question with 5 tokens.')
  assert set(passes[2].problems) <= set(passes[1].problems)


def test_the_picture_and_the_table(straight, capsys):
  folder, found = straight
  assert (folder / 'eval.png').read_bytes().startswith(b'\x89PNG')
  text = scores.table(found)
  for name in ('sums', 'more', 'average', 'truncated %', 'verdicts',
               'conclusion', 'sums, level 3', 'stated budget', '900'):
    assert name in text
  assert all(len(line) < 140 for line in text.splitlines())
  # A name from outside is no formula.
  scores.draw({**found, 'benchmarks': {'a$b$': found['benchmarks']['sums']}},
              folder / 'other.png')


# ---- What decides a completion.


@pytest.mark.parametrize('overrides', [
    {'batch_size': 16, 'group_size': 1}, {'group_size': 4, 'num_slots': 8}],
                         ids=str)
def test_batches_decide_nothing(straight, model_folder, tmp_path, overrides):
  folder, found = straight
  again = benchmark.benchmark(make_config(
      model_folder, conflict__budgets=(), **overrides), str(tmp_path))
  assert rows_of(tmp_path, 'sums') == rows_of(folder, 'sums')
  assert again['benchmarks'] == found['benchmarks']
  assert again['conflict'] == {}


def test_a_subset_has_the_completions_of_the_whole(straight, model_folder,
                                                   tmp_path):
  folder, _ = straight
  found = benchmark.benchmark(make_config(
      model_folder, num_problems=4, num_samples=2, conflict__budgets=()),
                              str(tmp_path))
  part, whole = rows_of(tmp_path, 'sums'), rows_of(folder, 'sums')
  assert len(part) == 8 and part.items() <= whole.items()
  assert found['benchmarks']['sums']['problems'] == 4


def test_the_seed_decides(straight, model_folder, tmp_path):
  folder, _ = straight
  benchmark.benchmark(make_config(model_folder, seed=1, conflict__budgets=()),
                      str(tmp_path))
  assert rows_of(tmp_path, 'more') != rows_of(folder, 'more')


# ---- Killed and started again.


_RUN = """
import sys
sys.path[:0] = ['tests']
import test_benchmark
from lapo_jax import benchmark
benchmark.benchmark(test_benchmark.make_config(sys.argv[1]), sys.argv[2])
"""


def test_a_killed_evaluation_ends_with_the_same_scores(
    straight, model_folder, tmp_path, cache, count_samples):
  folder, found = straight
  log = tmp_path / 'chunks.jsonl'
  process = subprocess.Popen(
      [sys.executable, '-c', _RUN, model_folder, str(tmp_path)], cwd=_ROOT,
      env={**os.environ, **cache, 'PYTHONPATH': str(_ROOT)},
      stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
  deadline = time.monotonic() + 120
  while not (log.exists() and log.read_bytes().count(b'\n') >= 2):
    assert process.poll() is None, process.stderr.read().decode()[-2000:]
    assert time.monotonic() < deadline
    time.sleep(0.005)
  process.send_signal(signal.SIGKILL)
  process.wait()
  process.stderr.close()
  whole = log.read_bytes()
  whole = whole[:whole.rfind(b'\n') + 1]
  before = whole.count(b'\n')
  total = len(lines(folder))
  assert 2 <= before < total - 1  # or the kill came too late to test anything
  assert not (tmp_path / 'eval.json').exists()
  # As if the kill had hit the middle of a write.
  log.write_bytes(whole + b'{"benchmark": "sums", "budg')

  # Asked to end, as one of several hosts may be: after a chunk that is kept.
  left = total - before - 1
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(hosts, 'asked_to_stop', lambda number: number == before + 1)
    with pytest.raises(hosts.Stopped, match=f'{left} of {total} chunks left'):
      benchmark.benchmark(make_config(model_folder), str(tmp_path))
  assert log.read_bytes().count(b'\n') == before + 1

  again = benchmark.benchmark(make_config(model_folder), str(tmp_path))
  assert timeless(again) == timeless(found)
  assert count_samples[0] == total - before
  assert log.read_bytes().startswith(whole)
  # Once more there is nothing to do, and the same to say.
  assert timeless(benchmark.benchmark(make_config(model_folder),
                                      str(tmp_path))) == timeless(found)
  assert count_samples[0] == total - before


def test_a_line_is_whole_or_absent(tmp_path):
  row = scores.Row(3, 1, 1.0, 7, 'correct', (0, 1, 2, 3))
  other = row._replace(problem=4)
  log = eval_folder.Log(tmp_path)
  for rows in ([row], [other]):
    log.append(('a', 0), rows, (0.5, 0.25))
  text = (tmp_path / 'chunks.jsonl').read_bytes()
  wanted = [(('a', 0), np.array([3]), range(1, 2)),
            (('a', 0), np.array([3, 4]), range(1, 2)),
            (('a', 0), np.array([3]), range(2)),
            (('a', 5), np.array([3]), range(1, 2))]
  for cut in range(len(text) + 1):
    (tmp_path / 'chunks.jsonl').write_bytes(text[:cut])
    log = eval_folder.Log(tmp_path)
    kept = text[:cut].count(b'\n')
    assert log.done(wanted).tolist() == [kept > 0, kept > 1, False, False]
    assert (tmp_path / 'chunks.jsonl').read_bytes().count(b'\n') == kept
  assert log.rows(('a', 0), np.array([], int), 1) == []
  assert log.seconds(('a', 0)) == {'sample': 1.0, 'grade': 0.5}
  for broken in (b'{"bench"\n', b'3\n', b'{"rows": []}\n'):
    (tmp_path / 'chunks.jsonl').write_bytes(text + broken)
    with pytest.raises(ValueError, match=r'chunks\.jsonl, line 3: expected'):
      eval_folder.Log(tmp_path)


# ---- Beside a base run.


def test_against_itself_nothing_has_changed(straight, model_folder, tmp_path,
                                            capsys):
  folder, found = straight
  copy = tmp_path / 'eval'
  copy.mkdir()
  for name in ('config.json', 'chunks.jsonl'):
    (copy / name).write_bytes((folder / name).read_bytes())
  again = benchmark.benchmark(make_config(model_folder, base_run=str(folder)),
                              str(copy))
  assert again['base']['aes'] == 0.0
  assert again['base']['average'] == {
      key: found['average'][key] for key in ('pass_at_1', 'mean_tokens')}
  assert 'AES against the base run: +0.000' in capsys.readouterr().out


@pytest.mark.parametrize('overrides', [
    {'max_completion_length': 15}, {'num_problems': 5}], ids=str)
def test_a_base_run_of_another_protocol(straight, model_folder, tmp_path,
                                        overrides):
  with pytest.raises(ValueError, match='evaluate both alike'):
    benchmark.prepare(make_config(model_folder, base_run=str(straight[0]),
                                  **overrides), str(tmp_path / 'x'))
  assert not (tmp_path / 'x').exists()


# ---- A user's mistakes.


@pytest.mark.parametrize('overrides, said', [
    ({'num_samples': -1}, 'num_samples -1'),
    ({'batch_size': 12}, 'batch_size 12.*8 devices.*such as 8'),
    ({'top_p': 0.0}, 'top_p 0.0'), ({'top_p': 1.5}, 'top_p 1.5'),
    ({'top_k': -1}, 'top_k -1'), ({'temperature': -0.5}, 'temperature -0.5'),
    ({'temperature': math.nan}, 'temperature nan'),
    ({'max_completion_length': 0}, 'max_completion_length 0'),
    ({'group_size': 0}, 'group_size 0'),
    ({'num_slots': -1}, 'num_slots -1'), ({'seed': 2**32}, 'less than 2..32'),
    ({'cache_share': 1.0}, 'cache_share 1.0'),
    ({'cache_dtype': 'int4'}, "cache_dtype 'int4'.*'int8'"),
    ({'max_prompt_length': 9}, "'more'.*slots hold 9"),
    ({'template': 'no question'}, 'template'),
    ({'benchmarks__sums__num_samples': 0}, 'benchmarks.sums.num_samples 0'),
    ({'benchmarks__sums__task': 'matth'}, "'sums'.*'matth'"),
    ({'conflict__budgets': (5, 0)}, 'conflict.budgets'),
    ({'conflict__budgets': (5, 5)}, 'each once'),
    ({'conflict__benchmark': 'math'}, "'math'.*more.*sums"),
    ({'base_run': 'no/such'}, "'no/such'.*eval.json"),
    ({'model__path': 'no/such'}, 'no/such'),
    ({'mesh__tensor': 3}, "'tensor': 3"),
], ids=str)
def test_a_mistake_is_told_before_anything_is_done(
    model_folder, tmp_path, count_samples, overrides, said):
  with pytest.raises(ValueError, match=said) as caught:
    benchmark.benchmark(make_config(model_folder, **overrides),
                        str(tmp_path / 'x'))
  assert '\n' not in str(caught.value)
  assert count_samples[0] == 0 and not (tmp_path / 'x').exists()


def test_a_folder_is_one_evaluation(straight, model_folder, tmp_path):
  folder, _ = straight
  for name in ('config.json', 'data.json'):
    (tmp_path / name).write_bytes((folder / name).read_bytes())
  with pytest.raises(ValueError, match='temperature: got 0.7.*has 0.6'):
    benchmark.prepare(make_config(model_folder, temperature=0.7),
                      str(tmp_path))
  # What decides no completion may change.
  benchmark.prepare(make_config(model_folder, batch_size=16, group_size=4,
                                grader__num_workers=2, data='else',
                                base_run=str(folder)), str(tmp_path))
  # Same settings, other problems.
  data = json.loads((tmp_path / 'data.json').read_text())
  (tmp_path / 'data.json').write_text(json.dumps({**data, 'sums': 'f00d'}))
  with pytest.raises(ValueError, match='data.json: sums: got'):
    benchmark.prepare(make_config(model_folder), str(tmp_path))
  (tmp_path / 'config.json').write_text('[1')
  with pytest.raises(ValueError, match='config.json.*another --workdir'):
    benchmark.prepare(make_config(model_folder), str(tmp_path))


# ---- Scores of rows.


def rows(*items):
  return [scores.Row(problem, sample, float(verdict == 'correct'), tokens,
                     verdict, (1, 0, 0, 2))
          for problem, sample, tokens, verdict in items]


def test_scores_of_literal_rows():
  found = scores.of_rows(rows(
      (7, 0, 10, 'correct'), (7, 1, 30, 'wrong'), (2, 0, 60, 'truncated'),
      (2, 1, 20, 'unparsed')), {7: 'easy', 2: ''})
  assert (found['problems'], found['completions']) == (2, 4)
  assert found['pass_at_1'] == 0.25
  assert found['standard_error'] == pytest.approx(0.25)
  assert found['pass_at_k'] == {'1': 0.25, '2': 0.5}
  assert found['mean_tokens'] == 30.0 and found['median_tokens'] == 25.0
  assert found['correct_tokens'] == 10.0
  assert found['wrong_tokens'] == pytest.approx(110 / 3)
  assert found['truncated'] == 0.25
  assert found['verdicts'] == {'correct': 1, 'wrong': 1, 'unparsed': 1,
                               'timeout': 0, 'crash': 0, 'truncated': 1}
  assert list(found['keywords_per_1000_tokens'].values()) == pytest.approx(
      [4000 / 120, 0, 0, 8000 / 120])
  assert list(found['by_level']) == ['easy']
  assert found['by_level']['easy']['pass_at_1'] == 0.5


def test_pass_at_k_of_the_samples_that_came_back():
  # Three samples of one problem, one of the other: k ends at 1.
  found = scores.of_rows(rows((0, 0, 1, 'correct'), (0, 1, 1, 'wrong'),
                              (0, 2, 1, 'wrong'), (1, 0, 1, 'correct')))
  assert found['pass_at_k'] == {'1': pytest.approx(2 / 3)}
  assert found['pass_at_1'] == pytest.approx(2 / 3)


def test_eight_devices_share_a_batch(straight):
  assert jax.device_count() == 8  # or `straight` was no test of sharding
