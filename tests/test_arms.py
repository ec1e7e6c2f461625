# SPDX-License-Identifier: Apache-2.0
"""Numbers of arms by hand, and pictures of any number of them."""

import dataclasses
import json
import math

import folders_of_runs
import numpy as np
import pytest

from lapo_jax import arms, comparison, curves, pictures


def arm(tmp_path, name, results, family='', **settings):
  """An arm of runs that reached (accuracy, tokens), one a seed."""
  found = []
  for seed, (accuracy, tokens) in enumerate(results):
    folder = folders_of_runs.write(
        tmp_path / f'{name}_{seed}', seed=seed, accuracy=accuracy,
        tokens=tokens, **settings)
    found.append(arms.load(folder))
  return arms.Arm(name, found, family)


def test_the_interval_is_students():
  mean, half = arms.spread([1.0, 2.0, 3.0])
  assert mean == 2.0
  # t with two degrees of freedom, sd 1 divided by n − 1, n = 3.
  assert half == pytest.approx(4.303 / math.sqrt(3))
  assert arms.spread([1.0, 3.0]) == (2.0, pytest.approx(12.706))
  assert arms.spread([5.0])[0] == 5.0 and math.isnan(arms.spread([5.0]).half)
  assert arms.spread([4.0] * 12) == (4.0, 0.0)
  assert math.isnan(arms.spread([]).mean)
  wide = np.arange(12.0)
  assert arms.spread(wide).half == pytest.approx(
      2.262 * wide.std(ddof=1) / math.sqrt(12))


def test_an_interval_covers_the_mean_as_often_as_it_says():
  draws = np.random.default_rng(0).normal(size=(4000, 3))
  found = [arms.spread(row) for row in draws]
  covered = np.mean([abs(mean) <= half for mean, half in found])
  assert covered == pytest.approx(0.95, abs=0.012)  # three standard errors


def test_rows_by_hand(tmp_path):
  first = arm(tmp_path, 'first', [(0.9, 40.0), (0.8, 30.0)])
  second = arm(tmp_path, 'second', [(0.6, 35.0)])
  base, row, other = arms.rows([first, second])
  assert (base.number, base.name, base.runs) == (0, 'base', 2)
  assert base.accuracy == (pytest.approx(80.0), 0.0)
  assert base.tokens.mean == 70.0 and math.isnan(base.seconds.mean)
  assert row.accuracy == (pytest.approx(85.0), pytest.approx(12.706 * 5.0))
  assert row.tokens == (35.0, pytest.approx(12.706 * 5.0))
  assert row.change.mean == pytest.approx(-50.0)
  assert row.gain.mean == pytest.approx(row.accuracy.mean - 80.0)
  # ΔL + 3ΔA: 3/7 + 3/8 and 4/7 + 0; with a loss, ΔL − 5|ΔA|.
  assert row.aes.mean == pytest.approx((3 / 7 + 3 / 8 + 4 / 7) / 2)
  assert other.aes.mean == pytest.approx(0.5 - 5 * 0.25)
  assert row.seconds.mean == 30.0  # six steps of 2 and 3 s
  one = first.runs[0]
  # Of steps that were not logged the times are those of their neighbours.
  rare = dataclasses.replace(one, config={**one.config, 'log_every': 5})
  assert rare.seconds == 5 * one.seconds
  assert row.by_level['1'] == {'accuracy': pytest.approx(0.85),
                               'mean_tokens': pytest.approx(28.0)}
  assert math.isnan(row.lead.mean)
  # Seed by seed; the other has the first alone.
  _, control, against = arms.rows([first, second], 'first')
  assert control.lead == (0.0, 0.0)
  assert against.lead.mean == pytest.approx(60.0 - 90.0)
  # The other is as long and less often right, the base is both.
  assert [r.front for r in (base, row, other)] == [False, True, False]


def test_equal_arms_share_the_front(tmp_path):
  both = [arm(tmp_path, name, [(0.9, 40.0)]) for name in 'ab']
  assert [row.front for row in arms.rows(both)] == [False, True, True]


def test_runs_that_differ_in_their_seed_are_one_arm(tmp_path):
  runs = [run for a in (
      arm(tmp_path, 'lapo', [(0.9, 40.0)] * 2),
      arm(tmp_path, 'run 7', [(0.9, 40.0)], method='sar'),
      arm(tmp_path, '12', [(0.9, 40.0)], method='dler')) for run in a.runs]
  found = arms.grouped(runs)
  assert [(a.name, len(a.runs)) for a in found] == [
      ('lapo', 2), ('run 7_0', 1), ('12_0', 1)]
  # Twice the same run would be a second seed to every interval.
  with pytest.raises(ValueError, match='lapo_0 and lapo_0 are runs of one'):
    arms.grouped([*runs, runs[0]])


def test_other_problems_do_not_compare(tmp_path):
  mine = arm(tmp_path, 'mine', [(0.9, 40.0)])
  theirs = arm(tmp_path, 'theirs', [(0.9, 40.0)],
               config={'task': {'name': 'gsm8k'}})
  with pytest.raises(ValueError, match=r'differ in config\.task: expected'):
    arms.rows([mine, theirs])
  with pytest.raises(ValueError, match='expected one folder'):
    arms.rows([])


def test_curves_end_with_the_shortest_run(tmp_path):
  mine = arm(tmp_path, 'mine', [(0.9, 40.0)], steps=6)
  longer = arm(tmp_path, 'longer', [(0.9, 40.0)], steps=8)
  steps, values = arms.series(
      arms.Arm('', [*mine.runs, *longer.runs]), 'time/sample')
  assert steps.tolist() == [0, 1, 2, 3, 4, 5]
  assert values.shape == (2, 6) and (values == 2.0).all()
  assert np.isnan(arms.series(mine, 'policy/kl')[1]).all()
  assert curves.smooth(np.array([1.0, 2.0, 6.0, math.nan])).tolist() == [
      1.5, 3.0, 4.0, 6.0]


def test_numbers_that_are_not_finite(tmp_path):
  folder = tmp_path / 'r'
  folders_of_runs.write(folder)
  records = json.loads((folder / 'summary.json').read_text())
  records['stages'][1].update(accuracy=None, mean_tokens=None)
  (folder / 'summary.json').write_text(json.dumps(records))
  found = [arms.Arm('r', [arms.load(folder)])]
  rows = arms.rows(found)
  assert [row.front for row in rows] == [True, False]
  assert comparison.cells(rows)[2][2:8] == ['1', *['-'] * 5]
  assert comparison.drawn(found, rows)['plane'][0].startswith(b'\x89PNG')


def test_the_tables(tmp_path):
  found = [arm(tmp_path, 'a|b', [(0.9, 40.0), (0.8, 30.0)], levels=('1',))]
  assert comparison.markdown(arms.rows(found)).splitlines()[:4] == [
      '| # | arm | seeds | accuracy % | points over base | mean tokens | '
      'tokens % of base | AES | truncated % | seconds |',
      '|---|---|---|---|---|---|---|---|---|---|',
      '| 0 | base | 2 | 80.0 ± 0.0 | - | 70.0 ± 0.0 | - | - | 0.0 ± 0.0 | - |',
      '| 1 | **a\\|b** | 2 | 85.0 ± 63.5 | +5.0 ± 63.5 | 35.0 ± 63.5 | '
      '-50.0 ± 90.8 | '
      '0.69 ± 1.47 | 0.0 ± 0.0 | 30 ± 0 |']
  found.append(arm(tmp_path, 'c', [(0.8, 40.0), (0.8, 30.0)], levels=('1',)))
  over = [row[5] for row in comparison.cells(arms.rows(found, 'c'), 'c')]
  assert over == ['points over c', '-', '+5.0 ± 63.5', '-']
  del found[1]
  assert comparison.level_cells(arms.rows(found)) == [
      ['#', 'arm', '1'], ['0', 'base', '80.0 / 56'],
      ['1', 'a|b', '85.0 / 28']]


# Warnings are errors here: a layout that does not fit would fail.
@pytest.mark.parametrize('count, families', [(1, 1), (13, 1), (21, 5)])
def test_pictures_of_many_arms(tmp_path, count, families):
  one = arm(tmp_path, 'x', [(0.9, 40.0), (0.8, 30.0)])
  found = [arms.Arm(f'arm $ {i}', one.runs,
                    f'family {i % families}' if families > 1 else '')
           for i in range(count)]
  found.sort(key=lambda a: a.family)
  rows = [dataclasses.replace(
      row, tokens=arms.Spread(30.0 + row.number % 7, 1.0))
      for row in arms.rows(found)]
  panels = pictures.panels(rows, control=found[0].name)
  # Every arm once, but for those that stand in all.
  shown = [row.number for _, drawn in panels for row, _, _ in drawn]
  assert sorted(set(shown)) == list(range(count + 1))
  assert len(shown) == count - 1 + 2 * len(panels)
  for _, drawn in panels:
    assert len({colour for _, colour, _ in drawn}) == len(drawn) <= 8
    assert len({marker for _, _, marker in drawn}) == len(drawn)
  for picture in (pictures.plane(rows), pictures.levels(rows, found[0].name),
                  curves.of_arms(found, rows, 'length/mean', 'tokens')):
    assert pictures.png(picture).startswith(b'\x89PNG')


@pytest.mark.parametrize('near, num_panels', [(13, 2), (5, 1)])
def test_arms_that_crowd_are_shown_again(tmp_path, near, num_panels):
  one = arm(tmp_path, 'x', [(0.9, 40.0), (0.8, 30.0)])
  rows = arms.rows([arms.Arm(f'arm {i}', one.runs) for i in range(15)])
  tokens = lambda row: 30.0 + (row.number if row.number <= near else
                               40.0 * row.number)
  rows = [dataclasses.replace(row, tokens=arms.Spread(tokens(row), 1.0))
          for row in rows]
  picture = pictures.plane(rows)
  assert len(picture.axes) == num_panels
  told = [sorted(int(text.get_text()) for text in panel.texts)
          for panel in picture.axes]
  assert told[0] == list(range(16))
  if num_panels == 2:
    # The base is as short here, and less often right.
    assert told[1] == list(range(1, near + 1))
