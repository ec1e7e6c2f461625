# SPDX-License-Identifier: Apache-2.0
"""Logs never double, JSON is always valid, hostile text stays harmless."""

import json
import struct
import time
import unicodedata

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from lapo_jax import metrics, types, wording

ROW = {'prompt': 'What is 6·7?', 'completion': 'It is\n\\boxed{42}.',
       'gold': '42', 'verdict': 'correct', 'length': 9, 'reward': 1.5}


def read(path):
  """Lines as JSON, strictly: NaN is not JSON."""
  def refuse(word):
    raise ValueError(word)
  return [json.loads(line, parse_constant=refuse)
          for line in path.read_text().splitlines()]


def events(folder):
  """Every TensorBoard event of a folder, oldest file first."""
  found = []
  for path in sorted(folder.iterdir()):
    data = path.read_bytes()
    while data:
      size, = struct.unpack('<Q', data[:8])
      found.append(event_pb2.Event.FromString(data[12:12 + size]))
      data = data[16 + size:]
  return found


def test_writer_keeps_numbers_as_lines_and_events(tmp_path):
  with metrics.Writer(tmp_path / 'new' / 'run') as writer:
    writer.write(3, 'discovery', {'a': 1, 'b': np.float32(0.5)})
    # Before any close: a killed run keeps what it wrote.
    assert read(tmp_path / 'new/run/metrics.jsonl') == [
        {'step': 3, 'stage': 'discovery', 'a': 1.0, 'b': 0.5}]
  scalars = {(v.tag, e.step, v.simple_value)
             for e in events(tmp_path / 'new/run/tensorboard')
             for v in e.summary.value}
  assert scalars == {('a', 3, 1.0), ('b', 3, 0.5)}


def test_numbers_that_are_not_finite_are_null(tmp_path):
  with metrics.Writer(tmp_path) as writer:
    writer.write(0, 's', {'nan': float('nan'), 'inf': np.float32(-np.inf)})
    writer.write_samples(0, 's', [ROW | {'reward': np.float32('nan')}])
  line, = read(tmp_path / 'metrics.jsonl')
  assert line == {'step': 0, 'stage': 's', 'nan': None, 'inf': None}
  assert read(tmp_path / 'samples.jsonl')[0]['reward'] is None


def test_samples_keep_the_whole_text(tmp_path):
  completion = 'x\x1b[31m\ud800\u2028```\n' * 200
  with metrics.Writer(tmp_path) as writer:
    writer.write_samples(2, 's', [ROW | {'completion': completion}])
  line, = read(tmp_path / 'samples.jsonl')
  assert line == {'step': 2, 'stage': 's', **ROW, 'completion': completion}
  text, = [v.tensor.string_val[0].decode()
           for e in events(tmp_path / 'tensorboard') for v in e.summary.value]
  # All of it indented: nothing in the text can end the block of code.
  assert all(line.startswith('    ') for line in text.splitlines())


def test_resume_never_doubles_a_step(tmp_path):
  with metrics.Writer(tmp_path) as writer:
    for step in range(8):
      writer.write(step, 's', {'a': step})
      writer.write_samples(step, 's', [ROW])
  with (tmp_path / 'metrics.jsonl').open('a') as file:
    file.write('{"step": 8, "sta')  # killed in the middle of a line
  with metrics.Writer(tmp_path, resume_step=5) as writer:
    for step in range(6, 10):
      writer.write(step, 's', {'a': -step})
      writer.write_samples(step, 's', [ROW])
  lines = read(tmp_path / 'metrics.jsonl')
  assert [line['step'] for line in lines] == list(range(10))
  assert [line['a'] for line in lines] == [0, 1, 2, 3, 4, 5, -6, -7, -8, -9]
  samples = read(tmp_path / 'samples.jsonl')
  assert [line['step'] for line in samples] == list(range(10))
  starts = [e.step for e in events(tmp_path / 'tensorboard')
            if e.session_log.status == event_pb2.SessionLog.START]
  assert starts == [6]
  assert not list(tmp_path.glob('*.tmp'))


@pytest.mark.parametrize('resume_step, kept', [(-1, []), (None, [0, 1])])
def test_resume_from_nothing_and_without_resume(tmp_path, resume_step, kept):
  lines = '{"step": 0}\n{"step": 1}\n{"step"'
  (tmp_path / 'metrics.jsonl').write_text(lines)
  metrics.Writer(tmp_path, resume_step).close()
  found = read(tmp_path / 'metrics.jsonl')
  assert [line['step'] for line in found] == kept


def test_other_processes_touch_nothing(tmp_path, monkeypatch):
  monkeypatch.setattr(jax, 'process_index', lambda: 1)
  with metrics.Writer(tmp_path / 'run', resume_step=3) as writer:
    writer.write(0, 's', {'a': 1.0})
    writer.write_samples(0, 's', [ROW])
  assert not (tmp_path / 'run').exists()
  assert wording.progress(3, 0, 'x').disable


def test_closing_twice_is_fine_but_not_writing_after(tmp_path):
  writer = metrics.Writer(tmp_path)
  writer.close()
  writer.close()
  with pytest.raises(ValueError, match='closed'):
    writer.write(0, 's', {})


def test_timer_adds_up_by_stage_even_when_the_block_raises():
  timer = metrics.Timer()
  for _ in range(2):
    with timer('sample'):
      time.sleep(0.01)
  with pytest.raises(KeyError), timer('grade'):
    raise KeyError
  assert list(timer.seconds) == ['time/sample', 'time/grade']
  assert 0.02 <= timer.seconds['time/sample'] < 1.0
  assert timer.seconds['time/grade'] < 0.02


def test_every_counts_steps_from_zero():
  due = lambda n, last=None: [s for s in range(10) if metrics.every(s, n, last)]
  assert due(1) == list(range(10))
  assert due(5) == [4, 9]
  assert due(4, last=9) == [3, 7, 9]
  assert due(5, last=9) == [4, 9]
  assert due(0) == due(-1) == []
  assert due(0, last=9) == [9]


def step_of(correct, keep=None, **rest):
  outcomes = types.Outcomes(
      correct=jnp.array(correct), lengths=jnp.array([[10, 20], [30, 40]]),
      truncated=jnp.array([[False, False], [False, True]]),
      prompt_index=jnp.arange(2), target_lengths=jnp.zeros(2, jnp.int32),
      extras={'parsed': jnp.array([[1.0, 1.0], [1.0, 0.0]])})
  rewards = types.Rewards(
      {'accuracy': jnp.array([[1.0, 0.0], [0.0, 0.0]]),
       'length': jnp.array([[2.0, 4.0], [6.0, 8.0]])},
      weights={'length': jnp.array(0.5)}, keep=keep)
  advantages = jnp.array([[1.0, -1.0], [3.0, -3.0]])
  return metrics.summary(outcomes, rewards, advantages, **rest)


def test_summary_by_hand():
  timer = metrics.Timer()
  timer._seconds = {'sample': 3.0, 'update': 1.0}
  found = step_of([[1.0, 0.0], [0.0, 0.0]], timer=timer, update_metrics={
      'update/grad_norm': jnp.array(0.5), 'policy/entropy': 2})
  assert found == pytest.approx({
      'reward/accuracy': 0.25, 'reward/length': 5.0, 'reward/total': 2.75,
      'length/mean': 25.0, 'length/correct': 10.0, 'length/p90': 37.0,
      'length/max': 40.0, 'outcome/correct': 0.25, 'outcome/truncated': 0.25,
      'outcome/parsed': 0.75, 'advantage/zero_groups': 0.5,
      'advantage/std': 5**0.5, 'update/grad_norm': 0.5, 'policy/entropy': 2.0,
      'time/sample': 3.0, 'time/update': 1.0, 'time/tokens_per_second': 25.0})
  assert {type(value) for value in found.values()} == {float}


def test_summary_leaves_out_means_over_nothing():
  found = step_of([[0.0, 0.0], [0.0, 0.0]], keep=jnp.zeros((2, 2), bool),
                  update_metrics={}, timer=metrics.Timer())
  assert all(np.isfinite(list(found.values())))
  missing = {'length/correct', 'reward/total', 'reward/length',
             'advantage/std', 'time/tokens_per_second'}
  assert not missing & set(found)


def test_summary_counts_dropped_completions_as_absent():
  keep = jnp.array([[True, True], [False, False]])
  found = step_of([[1.0, 0.0], [0.0, 0.0]], keep=keep, update_metrics={},
                  timer=metrics.Timer())
  assert found['reward/length'] == 3.0
  assert found['advantage/std'] == 1.0
  assert found['length/mean'] == 25.0


def explain(correct, zero_groups, truncated=0.0, **update):
  scalars = {'outcome/correct': correct, 'outcome/truncated': truncated,
             'advantage/zero_groups': zero_groups,
             **{f'update/{name}': value for name, value in update.items()}}
  return wording.explain(scalars, completions=256, max_completion_length=128)


def test_explain_says_what_stands_out_and_nothing_else():
  assert explain(0.5, 0.5, truncated=0.5, loss=0.3, grad_norm=1.0) == []
  line, = explain(0.4, 0.2, truncated=0.83)
  assert '83%' in line and '128 tokens' in line and 'rollout.max_' in line
  line, = explain(0.0, 1.0)
  assert 'No completion' in line and '0 of 256' in line
  line, = explain(1.0, 1.0)
  assert 'Every completion' in line and '256 of 256' in line
  line, = explain(0.1, 0.75)
  assert '75%' in line and 'mostly wrong' in line and 'too hard' in line
  line, = explain(0.9, 0.75)
  assert 'mostly right' in line and 'too easy' in line
  line, = explain(0.5, 0.1, loss=-1e-6, grad_norm=0.25)
  assert 'normal' in line and 'grad_norm (0.25)' in line
  # The sampler's own numerics are worth a word from 1 % of the tokens on.
  for outside, lines in ((0.01, 0), (0.034, 1)):
    found = wording.explain(
        {'outcome/correct': 0.5, 'outcome/truncated': 0.0,
         'advantage/zero_groups': 0.1,
         'policy/sampler_ratio_outside': outside}, 256, 128)
    assert len(found) == lines
  assert '3.4%' in found[0] and 'loss.importance_cap=2' in found[0]
  # A gradient of zero is not normal, so the note would mislead.
  assert explain(0.5, 0.1, loss=0.0, grad_norm=0.0) == []


def test_log_line_is_compact_and_skips_what_is_missing():
  assert wording.log_line(7, 300, {'length/mean': 25.04}) == (
      'step   7/300  length 25.0  s/step 0.00')
  line = wording.log_line(12, 300, {
      'reward/total': 1.2345, 'outcome/correct': 0.5, 'length/mean': 132.0,
      'outcome/truncated': 0.03, 'advantage/zero_groups': 0.4,
      'policy/entropy': 0.51, 'update/grad_norm': 0.123456,
      'time/sample': 1.5, 'time/update': 0.25, 'time/tokens_per_second': 9e9})
  assert line == (
      'step  12/300  reward 1.234  correct 50.0%  length 132.0  truncated 3.0%'
      '  zero groups 40%  entropy 0.510  grad norm 0.123  s/step 1.75')


def columns(line):
  return sum(2 if unicodedata.east_asian_width(c) in 'WF' else 1 for c in line)


@pytest.mark.parametrize('text', [
    'plain ' * 300, 'x' * 3000, '数学' * 900, 'a数 ' * 900, '\n' * 900, '',
    '\x1b[31mred\x1b[0m\x1b]0;title\x07\x1b]8;;http://x\x1b\\\x9b2J\x9d0;t\x9c',
    '\0', '\x1b', '\x1b[', '\x1b]0;' * 900, '\x9d' * 900,
    '\u202eevil\u200b\ud800\r'])
def test_samples_table_fits_and_holds_nothing_a_terminal_obeys(text):
  row = ROW | {'prompt': text, 'completion': text, 'gold': text,
               'verdict': text}
  table = wording.samples_table([row, row])
  assert all(columns(line) <= 100 for line in table.split('\n'))
  assert all(c.isprintable() or c == '\n' for c in table)
  for word in ('[31m', '[0m', 'title', 'http', '2J'):
    assert word not in table


def test_samples_table_shows_both_ends_of_long_text():
  text = 'START ' + 'middle ' * 900 + '\n\\boxed{7}'
  table = wording.samples_table([ROW | {'completion': text}])
  assert 'START' in table and ' … ' in table and '\\n\\boxed{7}' in table
  assert 'What is 6·7?' in table and '+1.500  42' in table
  assert len(table.splitlines()) < 12


def test_hostile_escapes_cost_linear_time():
  start = time.perf_counter()
  for text in ('\x1b]', '\x9d', '\x1b[0', '\x1b'):
    wording.samples_table([ROW | {'completion': text * 100_000}])
  assert time.perf_counter() - start < 5.0


def test_progress_is_silent_off_a_terminal(capsys):
  with wording.progress(3, 1, 'train') as bar:
    bar.update()
  assert capsys.readouterr() == ('', '')
