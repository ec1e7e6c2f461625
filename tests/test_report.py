# SPDX-License-Identifier: Apache-2.0
"""The table by hand; the picture for every number of stages and levels; the
page, which must show what a model wrote and never obey it.
"""

import base64
import html.parser
import json
import struct
import sys

import folders_of_runs
import pytest

from lapo_jax import arms, report


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


# A page of a run's folder, or of several.


class Page(html.parser.HTMLParser):
  """What a browser would see: tags that close, addresses, the text."""

  def __init__(self, path):
    super().__init__()
    self.open, self.tags, self.addresses, self.shown = [], set(), [], []
    self.feed(path.read_text(encoding='utf-8'))
    assert not self.open

  def handle_starttag(self, tag, attrs):
    self.tags.add(tag)
    self.addresses += [v for k, v in attrs if k in ('src', 'href', 'srcset')]
    assert not [name for name, _ in attrs if name.startswith('on')]
    if tag not in ('meta', 'img'):
      self.open.append(tag)

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    self.shown.append(data)


def check_page(path):
  page = Page(path)
  assert not page.tags & {'script', 'link', 'iframe', 'object', 'form', 'base'}
  assert all(address.startswith('data:image/png;base64,')
             for address in page.addresses)
  for address in page.addresses:
    png = base64.b64decode(address.partition(',')[2], validate=True)
    assert png.startswith(b'\x89PNG')
  return page


def test_page_of_one_run(tmp_path):
  folder = folders_of_runs.write(tmp_path / 'a <b> run', steps=8,
                                 stages=('discovery', 'internalisation'))
  out = report.report([folder], tmp_path / 'new' / 'report.html')
  page = check_page(out)
  text = ' '.join(page.shown)
  assert 'Run a <b> run' in text and 'internalisation' in text
  # Shown as it was written, but for what a browser would obey.
  assert ('</pre><script>alert(1)</script> $\\bad{$ \ufffd\ufffd & "quoted"'
          in text)
  assert '\u202e' not in text and '\x00' not in text
  assert text.count('step 0, ') == 1 and 'step 2, ' not in text
  assert len(page.addresses) == 2


def test_page_of_a_run_that_goes_on(tmp_path):
  folder = folders_of_runs.write(tmp_path / 'r', finished=False, levels=())
  (folder / 'stages' / '1.json').unlink()
  (folder / 'metrics.jsonl').unlink()
  (folder / 'samples.jsonl').unlink()
  page = check_page(report.report([folder], tmp_path / 'x.html'))
  assert 'still going on' in ' '.join(page.shown)
  assert len(page.addresses) == 1


def test_page_of_several_runs(tmp_path):
  folders = [
      folders_of_runs.write(tmp_path / f'{method}_{seed}', seed=seed,
                            method=method, tokens=tokens, finished=seed == 0)
      for method, tokens in (('lapo', 40.0), ('sar', 50.0)) for seed in (0, 1)]
  page = check_page(report.report(folders, tmp_path / 'x.html'))
  text = ' '.join(page.shown)
  assert 'Not finished: lapo_1, sar_1.' in text
  assert '4 runs side by side' in text and 'reward.name' in text
  assert 'lapo' in page.shown and 'sar' in page.shown  # arms, not runs
  # plane, levels; length, correct, truncated, entropy.
  assert len(page.addresses) == 6


def test_what_is_no_run_is_told_in_one_line(tmp_path, monkeypatch, capsys):
  for folder, words in ((tmp_path / 'none', 'expected the --workdir of a run'),
                        (tmp_path / 'empty', 'has evaluated nothing yet')):
    if folder.name == 'empty':
      folder.mkdir()
      (folder / 'config.json').write_text('{}')
    with pytest.raises(ValueError, match=words):
      arms.load(folder)
  monkeypatch.setattr(sys, 'argv', [
      'report', f'--workdir={tmp_path}/none', f'--out={tmp_path}/x.html'])
  with pytest.raises(SystemExit) as end:
    report.main()
  assert end.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1
  assert not (tmp_path / 'x.html').exists()
