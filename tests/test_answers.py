# SPDX-License-Identifier: Apache-2.0
"""Finding and comparing answers: tricky spellings, false friends, hostility."""

import time

import pytest

from lapo_jax.tasks import _answers


@pytest.mark.parametrize('text, expected', [
    ('so 5</think> it is 6', ' it is 6'),
    ('a</think>b</think>c', 'c'),
    ('</think>', ''),
    (r'still thinking, \boxed{5}', ''),
    ('', ''),
    ('a</think>b<think>c', ''),       # thoughts reopened, never closed
    ('a</think>b<think>c</think>d', 'd'),
])
def test_after_thinking(text, expected):
  assert _answers.after_thinking(text) == expected


@pytest.mark.parametrize('text, expected', [
    (r'\boxed{5}', r'\boxed{5}'),
    ('<think>a</think>b', 'b'),
    ('<think>a', ''),
])
def test_after_thinking_of_a_model_that_does_not_think(text, expected):
  assert _answers.after_thinking(text, thinking=False) == expected


@pytest.mark.parametrize('text, expected', [
    (r'\boxed{5}', '5'),
    (r'\boxed{\frac{1}{2}}', r'\frac{1}{2}'),
    (r'\boxed{1} then \boxed{ 2 }.', '2'),
    (r'\boxed{1} then \fbox{2}', '2'),
    (r'\fbox{1} then \boxed{2}', '2'),
    (r'\boxed{\boxed{3}}', '3'),
    (r'\boxed 5', '5'),
    (r'$\boxed 57$.', '57'),
    (r'\boxed 5. Done', '5'),
    (r'\boxed {5}', '5'),
    (r'\boxed{\{1, 2\}}', r'\{1, 2\}'),
    (r'\boxed{\left\{ 1 \right.}', r'\left\{ 1 \right.'),
    (r'\boxed{a\\}', 'a\\\\'),
    (r'\boxed{5', None),
    (r'\boxed{1} and \boxed{{5}', None),
    (r'\boxed{}', None),
    (r'\boxed', None),
    (r'\boxed{' + '{}' * 200 + '}', None),    # more than an answer
    (r'\boxed{' + 'x' * 200 + '}', 'x' * 200),
    (r'\boxed{' + 'x' * 201 + '}', None),
    ('boxed{5}', None),
    ('', None),
])
def test_last_boxed(text, expected):
  assert _answers.last_boxed(text) == expected


@pytest.mark.parametrize('text, first, last', [
    ('none', None, None),
    ('', None, None),
    ('5', '5', '5'),
    ('from 3 to 4.', '3', '4'),
    ('1,000 and 12,345.50', '1,000', '12,345.50'),
    ('1,2,3', '1', '3'),
    ('1,2345', '1', '2345'),
    ('10-7 = 3', '10', '3'),
    ('10-7', '10', '7'),
    ('= -7', '-7', '-7'),
    ('= \u22127', '\u22127', '\u22127'),
    ('$18, no -$5.', '$18', '-$5'),
    ('half is .5', '.5', '.5'),
    ('3/4 of it', '3/4', '3/4'),
    ('50 % or 60\\%', '50 %', '60\\%'),
    ('\u0665', None, None),                  # an Arabic-Indic five
])
def test_numbers_in_text(text, first, last):
  assert _answers.first_number(text) == first
  assert _answers.last_number(text) == last


@pytest.mark.parametrize('answer, gold', [
    ('5', '5'), ('05', '5'), ('+3', '3'), ('-0', '0'), ('5.', '5'),
    ('1,000', '1000'), ('1{,}000', '1000'), (r'1\,000', '1000'),
    ('27', '27.0'), ('0.50', '.5'), ('0.5', '1/2'), ('2/4', '1/2'),
    (r'\frac{1}{2}', '0.5'), (r'\dfrac{2}{4}', r'\tfrac{1}{2}'),
    (r'\frac12', '0.5'), (r'-\frac{1}{2}', '-1/2'), (r'\frac{-1}{2}', '-.5'),
    (r'\frac{1,000}{3}', '1000/3'), ('1/-2', '-1/2'),
    ('\u22125', '-5'), ('\u2212\u00bd', '-1/2'), ('-\u00bd', '-0.5'),
    ('\u00be', '0.75'),
    ('$5', '5'), (r'\$5', '5'), ('$5$', '5'), ('-$5', '-5'),
    ('$1,000.00', '1000'),
    ('5%', r'5\%'), ('5 %', '5.0%'),
    ('7' * 100, '7' * 100),
    ('x + 1', 'x+1'), (r'\dfrac{x}{2}', r'\frac{x}{2}'), ('( 1, 2 )', '(1,2)'),
    (r'\left(1,2\right)', '(1,2)'), (r'\text{even}', r'\text{even}'),
])
def test_equal(answer, gold):
  assert _answers.equal(answer, gold)
  assert _answers.equal(gold, answer)


@pytest.mark.parametrize('answer, gold', [
    ('5', '6'), ('5', '-5'), ('1/3', '0.3333'),
    ('5', '5%'), ('5', '500%'), ('0.05', '5%'), ('5', '5 cm'),
    ('1331 and 1728', '1728'),
    ('1-1/e', '1+1/e'), ('3x-y+13=0', '3x+4y+14=0'),
    ('(1,2)', r'\{1,2\}'), ('(1,2)', '[1,2]'), ('1,2', '12'),
    ('1 2', '12'), ('a b', 'ab'), ('1,00', '100'),
    ('1/0', '2/0'), ('0/0', '0'),
    ('', ''), ('$', ''), (' ', ' '), ('', '5'), ('5', ''),
    ('2\u00bd', '10.5'), ('--5', '5'), ('1/2/3', '1/6'), ('5e2', '500'),
    ('9' * 201, '9' * 201), ('x', 'X'),
])
def test_not_equal(answer, gold):
  assert not _answers.equal(answer, gold)
  assert not _answers.equal(gold, answer)


@pytest.mark.parametrize('hostile', [
    '9^9^9', '9**9**9', '99999999!', '10**10**10', '__import__("os")',
    '1' * 200, '1e999999999', '(' * 100, '{' * 100, '\\frac' * 40,
    '1/' * 100, '\ud800', '\x00', '\u00bd' * 100, '\u215f', '-', '%', '/',
    '.', ',', '\\', '$$$', '+-\u2212', r'\frac{}{}', r'\frac{1}{0}', '\u2189',
])
def test_equal_survives(hostile):
  assert not _answers.equal(hostile, '5')
  assert not _answers.equal('5', hostile)
  assert not _answers.equal(hostile, 'x')


@pytest.mark.parametrize('pattern', [
    '{', '}', '\\', '\\boxed', '\\boxed{', '</think>', '<think>', '1', '1,',
    '1,111', ',111', '-', '$', '.', '1.', '1/', '1 %', '\\$', ' ', '\u00bd',
    '####', '#### 1', '\ud800', '\x00',
])
def test_time_is_linear(pattern):
  text = pattern * 200_000 + 'x'
  start = time.perf_counter()
  for thinking in (True, False):
    _answers.after_thinking(text, thinking)
  _answers.last_boxed(text)
  _answers.first_number(text)
  _answers.last_number(text)
  _answers.equal(text[:200], text[1:200])
  assert time.perf_counter() - start < 0.5
