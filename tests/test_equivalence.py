# SPDX-License-Identifier: Apache-2.0
"""The same answer or not: spellings, false friends, hostility, laws."""

import contextlib
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import threading
import time

import pytest

from lapo_jax.tasks import _equivalence, _forms, _spelling

_DATA = pathlib.Path(__file__).parents[1].parent / 'shared' / 'data'
# The deadline rings again where its exception is lost, as in the collector's
# callback of JAX, which no grading process has.
pytestmark = pytest.mark.filterwarnings(
    'ignore:Exception ignored in. <function _xla_gc_callback:'
    'pytest.PytestUnraisableExceptionWarning')

_SAME = [
    # numbers
    ('5', '5'), (r'\frac{1}{2}', '0.5'), (r'\frac12', '1/2'), ('27.0', '27'),
    (r'1{,}000', '1000'), ('1,000', '1000'), (r'1,\!000,\!000', '1000000'),
    (r'11,\! 111', '11111'), (r'1\,000', '1000'), (r'\frac 34', '.75'),
    (r'3\frac{1}{2}', '7/2'), ('3 1/2', r'3\frac12'), ('\u00bd', '0.5'),
    (r'-15\frac{3}{5}', '-15.6'), ('\u22125', '-5'), (r'\$5.00', '5'),
    (r'\mathbf{2340}', '2340'), ('2^{10}', '1024'), ('2^10', '1024'),
    (r'\binom{5}{2}', '10'), ('5!', '120'), (r'10^{-2}', '0.01'),
    (r'\frac{100!}{2^{50}}', r'100! \cdot 2^{-50}'), ('2^{4950}', '4^{2475}'),
    # roots, constants
    (r'2\sqrt{3}', r'\sqrt{12}'), (r'\frac{\sqrt{3}}{3}', r'1/\sqrt{3}'),
    (r'\sqrt{\frac{2}{3}}', r'\frac{\sqrt6}{3}'),
    (r'\sqrt[3]{16}', r'2\sqrt[3]2'),
    (r'\frac{8}{\sqrt[3]{7}}', r'\frac{8\sqrt[3]{49}}{7}'),
    ('sqrt(8)', r'2\sqrt2'),
    (r'\frac{\sqrt{3}}{4\sqrt{2}-3}', r'\frac{4\sqrt{6}+3\sqrt{3}}{23}'),
    (r'10 + \frac{15}{2}\pi', r'\frac{15\pi+20}{2}'), ('2\u03c0', r'2\pi'),
    (r'(1+i)^2', '2i'), (r'\sqrt{-4}', '2i'), ('i^{2006}', '-1'),
    (r'2^{-2/3}', r'\frac{\sqrt[3]{2}}{2}'), (r'\sqrt[3]{-8}', '-2'),
    # variables
    ('2n-2', '2(n-1)'), (r'\frac{3 m}{2}-1', r'\frac{3m-2}{2}'),
    ('(x+1)^2', 'x^2+2x+1'), ('p - q', '-q+p'),
    (r'\frac{1}{x-1}', r'-\frac{1}{1-x}'),
    (r'\frac{x^2-1}{x-1}', 'x+1'), (r'42x\sqrt{5x}', r'42\sqrt5 x^{3/2}'),
    (r'2^{n-1}', r'\frac{2^n}{2}'), ('(n-2) 2^{n}+1', '2^n(n-2)+1'),
    (r'2 \sin b \cos a', r'2\cos a\sin b'), (r'\sin^2 t', r'(\sin t)^2'),
    (r'\binom{2n}{n}', r'\dbinom{2n}{n}'), (r'm_{\max}', r'm_{\max }'),
    # lists, tuples, sets, intervals, matrices
    ('69, 84', '84 and 69'), (r'2, 3, \text{ and } 4', '2,3,4'),
    (r'6, 8\text{, and }10', '6,8,10'), (r'-12 \text{ or } -30', '-30,-12'),
    (r'1 \pm \sqrt{19}', r'1+\sqrt{19}, 1-\sqrt{19}'), ('100,101', '101, 100'),
    (r'(3,\frac{\pi}{2})', r'\left( 3, \frac{\pi}{2} \right)'),
    (r'\{1, 2\}', '2,1'), (r'\{1,1,2\}', r'\{2,1\}'),
    (r'\{1\pm\sqrt{5},-2\}', r'-2, 1-\sqrt5, 1+\sqrt5'),
    ('(1,2)', '(1, 2)'), ('(-4, 27);(2, 15)', '(2,15), (-4,27)'),
    (r'(-\infty,1)\cup(1, \infty)', r'(1,\infty) \cup (-\infty, 1)'),
    (r'\begin{pmatrix} 1/2 \\ 0 \end{pmatrix}',
     r'\begin{bmatrix} \frac12\\0\end{bmatrix}'),
    ('1 : 2', '1:2'), ('1011_2', '1011_{2}'), (r'\{5\}', '5'),
    ('[1,2,3]', '(1,2,3)'), (r'\approx 8.24 \text{ mph}', '8.24'),
    # equations, names
    ('x=5', '5'), ('5', 'x=5'), (r'x \in [0,1]', '[0,1]'), ('f(x)=2 x', '2x'),
    ('AB=9, CD=4', '9, 4'),
    ('3x+4y+14=0', '6x+8y+28=0'), ('y=2x+3', '2x-y+3=0'), ('y=x', 'x=y'),
    (r'M=2^{N-2}+1', '2^{N-2}+1'), (r'\angle BEA_1=90', r'90^\circ'),
    (r'k \geqslant 2', r'2 \le k'), ('(x, y) = (1, 2)', '(1,2)'),
    (r'-80\leq g(x)\leq 82', r'82 \ge g(x) \ge -80'),
    (r'-2 \le x \le 7', '[-2,7]'), (r'x > 2', r'(2,\infty)'),
    (r'2 \ge x', r'(-\infty,2]'), ('7 > t > 2', '(2,7)'),
    # words, units
    (r'\text{even}', 'even'), (r'\text{Even}', r'\textbf{even}'),
    (r'\text{(A)}', 'A'), (r'\textbf{(A)}', r'\text{A}'),
    (r'\text{A, B}', 'B,A'), ('Monday', r'\text{Monday}'),
    (r'10\text{ cm}', '10'), (r'15\mbox{ cm}^2', r'15 \text{ square cm}'),
    (r'8\text{ cm}', r'8\text{ centimeters}'), (r'90^\circ', '90'),
    (r'90^{\circ}', r'90\degree'), (r'90\text{ degrees}', r'90^\circ'),
    (r'5\%', '5 %'), (r'5 \text{ percent}', r'5\%'),
    (r'16\text{ daps}', '16'), (r'1.85\ \text{USD}', '1.85'),
    (r'8\!:\!34 \text{ p.m.}', '8:34'),
]
_DIFFERENT = [
    ('5', '6'), ('5', r'5\%'), ('5', r'500\%'), ('0.05', r'5\%'),
    ('1331 and 1728', '1728'), ('1728', '1331 and 1728'),
    (r'1-\frac{1}{e}', r'1+\frac{1}{e}'), ('1-1/e', '1+1/e'),
    ('3x-y+13=0', '3x+4y+14=0'), ('(1,2)', r'\{1,2\}'), ('(1,2)', '[1,2]'),
    ('(1,2)', '(2,1)'), ('(1,2]', '[1,2)'), ('1,2', '(1,2)'), ('1,2', '1,2,3'),
    ('1,1,2', '1,2,2'), ('1 2', '12'), ('0.3333', '1/3'), ('3.14', r'\pi'),
    (r'\sqrt{2}', '1.41421356'), (r'\sqrt{2}', r'-\sqrt{2}'), ('2i', '2'),
    ('x+1', 'x-1'), ('x^2', '2^x'), ('xy', 'x+y'), ('x', 'X'), ('2n', '2m'),
    ('0', '3x+4y+14=0'), ('2x+3=5', '5'), ('xy=4', '4'), ('x=5', 'x=6'),
    ('x=5', 'y=5'),
    ('x=1', 'y=2'), ('x<5', 'x>5'), ('x<5', r'x \le 5'), ('-x<2', 'x<-2'),
    (r'x \ge 2', r'(2,\infty)'), ('2<x<3', '(2,4)'), ('x<2', r'(2,\infty)'),
    (r'\text{even}', 'odd'), (r'\text{(A)}', r'\text{(B)}'), ('ABC', 'CBA'),
    (r'\text{A,B}', r'\text{A}'), ('4', r'\mbox{four}'), ('A', '5'),
    (r'8\text{ cm}', r'8\text{ inches}'), (r'8\text{ cm}^2', r'8\text{ cm}'),
    (r'8\!:\!34 \text{ p.m.}', r'8:34 \text{ a.m.}'), ('1:2', '2:1'),
    (r'90^\circ', r'\frac{\pi}{2}'), ('1011_2', '1010_2'), ('1_6', '1_7'),
    ('5', '101_2'), ('0, 1', '1,000'), (r'5\text{ or 6}', '5'),
    (r'5\text{ million}', '5'), (r'5 \text{ or } 6', '5'),
    (r'\{5,6\}', '5'), ('1, 1', '1'),
    (r'\tan\theta = 3\theta', r'\tan\theta=2\theta'),
    (r'2017+\frac\pi2', r'2007+\frac\pi2'), (r'\frac{1}{2^{99}}', '2^{-98}'),
    ('0.57 = 56\\%', '0.56 = 56\\%'), (r'x \in [-2,8]', r'x \in [-2,7]'),
    ('', ''), ('$', ''), ('', '5'), ('5', ''), ('1/0', '1/0+1'),
    (r'\begin{pmatrix} 1 \\ 0 \end{pmatrix}',
     r'\begin{pmatrix} 1 & 0 \end{pmatrix}'),
    ('9' * 201, '9' * 201),
]
# No two of these are equal, and none may cost more than a moment.
_HOSTILE = [
    '9^9^9', '9**9**9', '9^{9^{9^9}}', '10^{10^{10}}', '((9^{99})^{99})^{99}',
    '99999999!', '100000!!', '(9^{99})!', '9!!!!!!', r'\binom{999999}{500000}',
    r'\binom{10^9}{5\cdot 10^8}', '(0,1)' + r'\cup(2,3)' * 19,
    r'\sum_{n=1}^{10^9} n', r'\int_0^{10^9} e^{x^2} dx', r'\lim_{x\to0} x',
    r'\prod_{k=1}^{99999} k', '__import__("os").system("true")', "eval('1')",
    'lambda: 0', 'factorial(99999)', '{' * 190, '(' * 190, '[' * 190,
    r'\frac{1}{' * 20 + '1' + '}' * 20, '\ud800', '\x00', '\u0665',
    '\U0001f600' * 90, '1' * 190, '1e999999999', '0.' + '1' * 190,
    '(a+b+c+d+e+f)^{64}', '(x+1)(x+2)' * 19, '(1+' * 48 + '1' + ')' * 48,
    r'\sqrt{' * 27 + '2' + '}' * 27, r'\sqrt{99999989}' * 13, '2^{9999}',
    '1/' * 95 + '1', '-' * 190, '.' * 190, r'\pm' * 60, '1,' * 95, 'x_' * 90,
    r'\begin{pmatrix}' + '1&' * 80 + r'1\end{pmatrix}', '=' * 190, '1<' * 90,
    r'\text{' * 30, '_' * 190, '^' * 190, "'" * 190, r'\\' * 95, ':' * 190,
    '10^{100}' * 24, '(10^{99}+1)' * 17, '(x^{99}+y)' * 19, 'ab' * 95,
]


@pytest.mark.parametrize('answer, gold', _SAME)
def test_same(answer, gold):
  assert _equivalence.equal(answer, gold)
  assert _equivalence.equal(gold, answer)
  assert _equivalence.decide(answer, gold) is True


@pytest.mark.parametrize('answer, gold', _DIFFERENT)
def test_different(answer, gold):
  assert not _equivalence.equal(answer, gold)
  assert not _equivalence.equal(gold, answer)


@pytest.mark.parametrize('answer, gold, unit, tolerance, expected', [
    (r'4.2\%', '4.2', '%', 0.0, True), ('4.2', '4.2', '%', 0.0, True),
    (r'4.1\%', '4.2', '%', 0.1, True), ('4.3', '4.2', '%', 0.1, True),
    ('4.31', '4.2', '%', 0.1, False), (r'\frac{21}{5}', '4.2', '%', 0.1, True),
    ('4.25', '4.2', '', 0.0, False), ('0.042', '4.2', '%', 0.0, False),
    ('45', '45', 'minute', 0.0, True), (r'45\text{ minutes}', '45', 'minute',
                                       0.0, True),
    ('45 minutes', '45', 'minute', 0.0, True), ('45 min', '45', 'min', 0.0,
                                                True),
    (r'45\text{ seconds}', '45', 'minute', 0.0, False),
    (r'45\text{ min}', '45', 'minutes', 0.0, True),
    ('166', '$166$', '$cm^2$', 0.0, True), ('166 cm^2', '166', '$cm^2$', 0.0,
                                           True),
    (r'166\text{ cm}^2', '166', '$cm^2$', 0.0, True),
    (r'166\text{ m}^2', '166', '$cm^2$', 0.0, False),
    (r'166\text{ cm}', '166', '$cm^2$', 0.0, False),
    (r'\frac{600}{7} \text{ km/h}', r'$\frac{600}{7}$', 'km/h', 0.0, True),
    (r'90^\circ', '90', r'^{\circ}', 0.0, True), ('90', '90', r'^{\circ}', 0.0,
                                                 True),
    ('x', '4.2', '', 0.1, False),
])
def test_unit_and_tolerance(answer, gold, unit, tolerance, expected):
  assert _equivalence.equal(answer, gold, unit=unit,
                            tolerance=tolerance) is expected


def test_the_gold_answer_may_say_more():
  assert _equivalence.equal('1011', '1011_2')
  assert not _equivalence.equal('1011_2', '1011')
  assert _equivalence.equal(r'56\%', r'0.56 = 56\%')
  assert _equivalence.equal('0.56', r'0.56 = 56\%')
  assert not _equivalence.equal(r'0.56 = 56\%', '0.56')
  assert not _equivalence.equal('6=5', '5')


@pytest.mark.parametrize('answer, gold, expected', [
    (r'\tan 15^\circ', r'\tan 15^{\circ}', True),
    (r'\sqrt{3+2\sqrt{2}}', r'1+\sqrt{2}', True),
    (r'\log_2 8', '3', True), (r'\cos\frac{\pi}{3}', '0.5', True),
    (r'\sin^2 x', r'1-\cos^2 x', True), (r'|-3|', '3', True),
    (r'\sqrt{3+2\sqrt{2}}', r'1+\sqrt{3}', False), (r'\log_2 8', '4', False),
    (r'[0,1] \cup [1,2]', '[0,2]', True),
])
def test_the_second_tier(answer, gold, expected):
  assert _equivalence.decide(answer, gold) is not (not expected)
  assert _equivalence.equal(answer, gold) is expected


_PIECES = (
    '1', '23', '0.5', 'x', 'y', 'n', 'e', 'i', '+', '-', '*', '/', '^', '_',
    '(', ')', '[', ']', '{', '}', r'\{', r'\}', ',', ';', ':', '=', '<', '!',
    '%', r'\%', ' ', '$', '.', "'", '|', '&', r'\\', r'\frac', r'\sqrt', r'\pi',
    r'\cdot', r'\left(', r'\right)', r'\infty', r'\cup', r'\pm', r'\le', r'\in',
    r'\text{', r'\text{ cm}', r'^\circ', r'\binom', r'\sin', r'\log',
    r'\lfloor', r'\rfloor', r'\begin{pmatrix}', r'\end{pmatrix}', ' and ',
    '{2}', '(x+1)',
    '^{2}', r'\frac{1}{2}', r'\sqrt{2}', '\u00bd', '\u2212', '\ud800', '\x00')


def test_thousands_in_a_process_without_run_time_types():
  # The checks of conftest make a call fifty times dearer.
  files = [_DATA / name for name in
           ('math_train.json', 'math500.json', 'olympiad_bench.json')]
  if not all(file.exists() for file in files):
    files = []
  done = subprocess.run([sys.executable, __file__, *map(str, files)],
                        cwd=pathlib.Path(__file__).parents[1], text=True,
                        env=os.environ | {'PYTHONPATH': '.'},
                        capture_output=True)
  assert done.returncode == 0, done.stderr
  if not files:
    pytest.skip('the data sets are not here: junk only')


def _hostile_answers_are_quick_and_wrong():
  _equivalence.require()
  for text in _HOSTILE:
    for gold in ('5', 'x+1', '(1,2)', r'\sqrt{2}', r'\text{even}', r'\log_2 8'):
      start = time.thread_time()
      assert not _equivalence.decide(text, gold), text
      seconds = time.thread_time() - start
      assert seconds < 0.05, (text, seconds)  # 0.005 on an idle machine
      assert not _equivalence.equal(text, gold), text
      assert not _equivalence.equal(gold, text), text
    _equivalence.readable(text)


def _junk_never_raises_and_is_quick():
  rng = random.Random(0)
  slowest = 0.0
  for _ in range(5000):
    text = ''.join(rng.choices(_PIECES, k=rng.randint(1, 40)))[:200]
    other = ''.join(rng.choices(_PIECES, k=rng.randint(1, 8)))
    start = time.thread_time()
    decided = _equivalence.decide(text, other)
    slowest = max(slowest, time.thread_time() - start)
    assert decided in (True, False, None)
    if '_' not in text + other:  # a base may be left out, not added
      assert _equivalence.decide(other, text) is decided, (text, other)
    assert not _spelling.clean(text) or _equivalence.decide(text, text)
    _equivalence.hostile(text)
  assert slowest < 0.02, slowest  # 0.002 on an idle machine


def _golds_equal_their_other_spelling_and_neighbours_agree(files):
  golds = []
  for file in files:
    for row in json.loads(pathlib.Path(file).read_text()):
      gold = row['answer'] or ''
      golds.append(', '.join(gold) if isinstance(gold, list) else gold)
  golds = [gold for gold in golds if _spelling.clean(gold)]
  read = [bool(_forms.readings(text) or _spelling.words(text))
          for text in map(_spelling.clean, golds)]
  assert len(golds) == 8645 and read.count(False) <= 6
  for gold, is_read in zip(golds, read, strict=True):
    spelt = gold.replace(r'\frac{', r'\dfrac{').replace(r'\left', '')
    spelt = spelt.replace(r'\right', '').replace('(', r'\left( ')
    spelt = spelt.replace(')', r'\right)').replace(' ', '  ') + ' '
    assert _equivalence.decide(spelt, gold) or not is_read, gold
  for gold, other in zip(golds, golds[1:], strict=False):
    decided = _equivalence.decide(gold, other)
    if '_' not in gold + other:
      assert _equivalence.decide(other, gold) is decided, (gold, other)


def test_the_soft_deadline_ends_what_hangs(monkeypatch):
  _equivalence.require()

  def hang(*arguments):
    while True:
      with contextlib.suppress(Exception):  # as libraries do
        sum(range(10**5))

  monkeypatch.setattr(_equivalence, '_verified', hang)
  monkeypatch.setattr(_equivalence, '_SOFT_DEADLINE', 0.1)
  before = signal.getsignal(signal.SIGPROF)
  with pytest.raises(TimeoutError, match='more than 0.1 s of CPU'):
    _equivalence.equal(r'\log_2 8', '4')
  assert signal.getsignal(signal.SIGPROF) is before
  assert signal.getitimer(signal.ITIMER_PROF) == (0.0, 0.0)


def test_another_thread_may_ask():
  found = []
  thread = threading.Thread(
      target=lambda: found.append(_equivalence.equal(r'\log_2 8', '3')))
  thread.start()
  thread.join()
  assert found == [True]


def test_without_math_verify_one_line_says_what_to_install(monkeypatch):
  monkeypatch.setitem(sys.modules, 'math_verify', None)
  _equivalence.require.cache_clear()
  assert _equivalence.equal('x=5', '5')  # the first tier needs nothing
  with pytest.raises(ValueError, match="pip install 'math-verify>=0.9'"):
    _equivalence.equal(r'\log_2 8', '3')


@pytest.mark.parametrize('gold, expected', [
    ('5', True), (r'\text{even}', True), ('f(4 - x)', True), ('', False),
    (' ', False), ('$$', False), ('x' * 201, False), (r'\undefined{', False),
    ('9^9^9', False),
])
def test_readable(gold, expected):
  assert _equivalence.readable(gold) is expected


if __name__ == '__main__':
  if _equivalence.available():
    _hostile_answers_are_quick_and_wrong()
  _junk_never_raises_and_is_quick()
  if sys.argv[1:]:
    _golds_equal_their_other_spelling_and_neighbours_agree(sys.argv[1:])
