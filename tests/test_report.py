# SPDX-License-Identifier: Apache-2.0
"""The table by hand; the picture for every number of stages and levels."""

import json
import struct

import pytest

from lapo_jax import report


def stage(name, steps, accuracy, tokens, levels=()):
  return {'name': name, 'steps': steps, 'accuracy': accuracy,
          'mean_tokens': tokens, 'truncated': 0.031,
          'by_level': {level: {'accuracy': accuracy, 'mean_tokens': tokens}
                       for level in levels}}


STAGES = [stage('base', 0, 0.4, 200.0, ('1', '2')),
          stage('discovery', 100, 0.5, 150.0, ('1', '2')),
          stage('internalisation', 60, 0.45, 100.0, ('2',))]


def size(path):
  """Width and height of a PNG, in pixels."""
  return struct.unpack('>II', path.read_bytes()[16:24])


def test_table_by_hand():
  assert report.table(STAGES).splitlines() == [
      'stage            steps  accuracy %  points  mean tokens  tokens %'
      '  truncated %',
      'base                 0        40.0       -        200.0         -'
      '          3.1',
      'discovery          100        50.0   +10.0        150.0     -25.0'
      '          3.1',
      'internalisation     60        45.0    +5.0        100.0     -50.0'
      '          3.1',
      '',
      'accuracy % / mean tokens          base     discovery  internalisation',
      '1                         40.0 / 200.0  50.0 / 150.0                -',
      '2                         40.0 / 200.0  50.0 / 150.0     45.0 / 100.0',
  ]


def test_table_without_levels_or_tokens():
  base = stage('base', 0, 0.4, 0.0)
  lines = report.table([base, stage('train', 1, float('nan'), 3.0)])
  assert len(lines.splitlines()) == 3
  assert lines.splitlines()[-1].split() == [
      'train', '1', '-', '-', '3.0', '-', '3.1']


def test_summary_is_the_records_and_a_picture(tmp_path):
  path = report.write_summary(tmp_path / 'new', STAGES, 12.5)
  assert path == tmp_path / 'new' / 'summary.json'
  assert json.loads(path.read_text()) == {'stages': STAGES, 'seconds': 12.5}
  assert size(tmp_path / 'new' / 'summary.png') == (1200, 500)
  assert sorted(p.name for p in path.parent.iterdir()) == [
      'summary.json', 'summary.png']


def test_summary_holds_null_for_what_is_not_finite(tmp_path):
  stages = [stage('base', 0, float('nan'), float('inf'), ('1',))]
  text = report.write_summary(tmp_path, stages, 1.0).read_text()
  assert json.loads(text)['stages'][0]['accuracy'] is None
  assert 'NaN' not in text and 'Infinity' not in text


def test_no_stages_is_an_error(tmp_path):
  with pytest.raises(ValueError, match='expected at least the base'):
    report.write_summary(tmp_path, [], 0.0)


# Warnings are errors here: a layout that does not fit would fail.
@pytest.mark.parametrize('stages, width', [
    ([stage('base', 0, 1, 200)], 700),
    ([stage('base', 0, 0.4, 200.0, ('easy',))], 1200),
    ([stage('a', 0, 0.4, 200.0), stage('a', 1, 0.4, 200.0)], 700),
    ([stage('$x$ $\\bad{$', 0, 1.0, 0.0, ('$', '$\\bad{$'))], 1200),
    ([stage(f'a stage with a long name {i}', i, i / 9, 100.0 * i,
            [f'Level {n}, a long name' for n in range(9)])
      for i in range(9)], 1200)])
def test_picture_of_any_stages(tmp_path, stages, width):
  report.draw_summary(stages, tmp_path / 'x.png')
  assert size(tmp_path / 'x.png') == (width, 500)
