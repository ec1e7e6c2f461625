# SPDX-License-Identifier: Apache-2.0
"""How a model reasons, told by its words: four classes, counted.

LAPO (arXiv 2507.15758) counts keywords of self-correction and verification,
of exploring alternatives, of setting the context and of drawing conclusions,
and prints no list. These lists are ours: words and phrases that the
reasoning models of the DeepSeek-R1 family use for it. A word with an everyday
meaning ('so', 'but', 'or', 'let') is left out, at the price of missing some.
"""

import re

WORDS = {
    'correction': (
        'wait', 'hold on', 'hmm', 'oops', 'actually', 'mistake', 'mistaken',
        'double-check', 'double check', 'check', 'checking', 'recheck',
        're-check', 'verify', 'verifying', 'confirm', 'reconsider',
        're-examine', 'reexamine', 'made an error', 'not right', 'is wrong',
        'go back', 'does that make sense', 'to be sure', 'make sure'),
    'exploration': (
        'alternatively', 'another way', 'another approach', 'another method',
        'other way', 'different approach', 'different way', 'different method',
        'maybe', 'perhaps', 'what if', 'instead', 'let me try', "let's try",
        'try to', 'might', 'possibility', 'or maybe', 'suppose'),
    'context': (
        'the problem', 'the question', 'we are given', "we're given",
        'given that', 'we know', 'it says', 'is asking', 'asks for',
        'we need to', 'i need to', 'need to find', 'recall', 'remember',
        'first', 'let me start', 'to understand', 'denote', 'defined as',
        'in this case'),
    'conclusion': (
        'therefore', 'thus', 'hence', 'consequently', 'as a result',
        'in conclusion', 'to conclude', 'to sum up', 'in summary', 'finally',
        'final answer', 'the answer is', 'so the answer', 'which means',
        'this means', 'it follows', 'we conclude', 'we get', 'must be'),
}


def count(text: str) -> dict[str, int]:
  """Keywords in a text, by class.

  Whole words, upper or lower case, none inside another of its class. The time
  is linear in the text, whatever it says.
  """
  return {name: len(pattern.findall(text))
          for name, pattern in _PATTERNS.items()}


def _pattern(phrases: tuple[str, ...]) -> re.Pattern:
  # The longest first: 'double-check' is not a 'check'. The gap between words
  # is bounded, so that no run of blanks is read again and again.
  ordered = sorted(phrases, key=len, reverse=True)
  spelt = [re.escape(phrase).replace(r'\ ', r'\s{1,4}').replace("'", "['’]")
           for phrase in ordered]
  return re.compile(rf'(?<!\w)(?:{"|".join(spelt)})(?!\w)', re.IGNORECASE)


_PATTERNS = {name: _pattern(phrases) for name, phrases in WORDS.items()}
