# SPDX-License-Identifier: Apache-2.0
"""Keywords are whole words, counted once, in time linear in the text."""

import time

import pytest

from lapo_jax import keywords


def counts(text):
  return tuple(keywords.count(text).values())


def test_the_four_classes():
  assert list(keywords.WORDS) == ['correction', 'exploration', 'context',
                                  'conclusion']
  assert keywords.count('') == dict.fromkeys(keywords.WORDS, 0)


@pytest.mark.parametrize('text, expected', [
    ('Wait, 7 is odd.', (1, 0, 0, 0)),
    ('wait WAIT Wait', (3, 0, 0, 0)),
    ('Perhaps another way works; what if x = 2?', (0, 3, 0, 0)),
    ('The problem says: we need to find x.', (0, 0, 2, 0)),
    ('Therefore 5, thus the answer is 5.', (0, 0, 0, 3)),
    # Whole words only.
    ('await waiting recheckers thusly', (0, 0, 0, 0)),
    ('(wait) *wait* wait.wait', (4, 0, 0, 0)),
    # One for the longest, none for what is inside it.
    ('Let me double-check.', (1, 0, 0, 0)),
    ('double check, check', (2, 0, 0, 0)),
    # Line breaks and typographic marks are no hindrance.
    ('what\nif', (0, 1, 0, 0)),
    ('let’s try', (0, 1, 0, 0)), ("LET'S TRY", (0, 1, 0, 0)),
    ('wh at if', (0, 0, 0, 0)),
])
def test_words_by_class(text, expected):
  assert counts(text) == expected


def test_every_phrase_is_found_and_of_one_class():
  phrases = [(name, phrase) for name, words in keywords.WORDS.items()
             for phrase in words]
  assert len({phrase for _, phrase in phrases}) == len(phrases)
  for name, phrase in phrases:
    assert keywords.count(phrase.upper())[name] == 1, phrase
    assert sum(keywords.count(phrase).values()) == 1, phrase


@pytest.mark.parametrize('unit', [
    'wait', 'wait ', 'let me ', 'the ', 'the\n\n\n\n\n', 'double-', ' ', 'ſ',
    "let'", 'what  if', '\0', '不'])
def test_time_is_linear_whatever_the_text(unit):
  def seconds(repeats):
    text = unit * (repeats // len(unit))
    start = time.process_time()
    keywords.count(text)
    return time.process_time() - start

  seconds(1000)
  short = min(seconds(20_000) for _ in range(3))
  # Quadratic time would be a hundredfold.
  assert min(seconds(200_000) for _ in range(2)) < 30 * short + 0.05
