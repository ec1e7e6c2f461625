# SPDX-License-Identifier: Apache-2.0
"""Text to tokens and back; which tokens stop."""

import json

import numpy as np
import pytest

from lapo_jax import tokenizer as tokenizer_lib

TEXTS = [
    '', ' ', 'What is 2+2?', '\\boxed{42}', 'tab\tline\r\nend ',
    '  two  spaces  ', 'naïve façade', '数学 ответ', '😀👩‍👩‍👧‍👦🏳️‍🌈',
    'a\x00b\x01\x7f', '\ufeff\u200b\u202e', "I 'm n't , .",
]


@pytest.fixture
def load(tmp_path, write_tokenizer):
  """settings, files -> the tokenizer of a folder that holds them."""

  def loader(settings=None, **files):
    folder = write_tokenizer(tmp_path / 'model', **(settings or {}))
    for name, content in files.items():
      (folder / f'{name}.json').write_text(json.dumps(content))
    return tokenizer_lib.load(folder)

  return loader


def test_any_text_comes_back(load):
  tokenizer = load({'eos_token': '<|end|>', 'pad_token': '<|pad|>'})
  rows = tokenizer.encode(TEXTS)
  assert tokenizer.decode([np.array(row) for row in rows]) == TEXTS
  # Without merges a token is a byte, and nothing is added.
  assert [len(row) for row in rows] == [len(t.encode()) for t in TEXTS]


def test_tokenizer_json_counts_whatever_the_model_type(load):
  # transformers' class for qwen2 would compose the accent and add a pad token.
  tokenizer = load({'eos_token': '<|end|>', 'pad_token': '<|pad|>'},
                   config={'model_type': 'qwen2'})
  assert tokenizer.vocab_size == 258
  assert len(tokenizer.encode(['e\u0301'])[0]) == 3


def test_every_byte_has_a_token(load):
  tokenizer = load({'eos_token': '<|end|>', 'pad_token': '<|pad|>'})
  assert tokenizer.vocab_size == 258
  # U+0000 … U+07FF hold every byte but those that lead longer characters.
  texts = [chr(n) for n in range(0x800)] + ['\u0800', '\U00010000',
                                            '\U0010ffff', '\ue000', '\uffff']
  assert tokenizer.decode(
      [np.array(row) for row in tokenizer.encode(texts)]) == texts


def test_bytes_that_are_no_text_decode_without_an_error(load):
  tokenizer = load({'eos_token': '<|end|>', 'pad_token': '<|pad|>'})
  row = tokenizer.encode(['é'])[0]
  assert tokenizer.decode([np.array(row[:1])]) == ['\ufffd']


def test_a_lone_surrogate_becomes_a_question_mark(load):
  tokenizer = load({'eos_token': '<|end|>', 'pad_token': '<|pad|>'})
  assert tokenizer.encode(['a\ud800b', 'c\udfff']) == tokenizer.encode(
      ['a?b', 'c?'])


def test_stop_and_pad_tokens_vanish(load):
  tokenizer = load({'eos_token': '<|end|>', 'pad_token': '<|pad|>'})
  row = tokenizer.encode(['four'])[0]
  ended = np.array([*row, *tokenizer.eos_ids, tokenizer.pad_id])
  assert tokenizer.decode([ended]) == ['four']


@pytest.mark.parametrize('files,stops', [
    ({'generation_config': {'eos_token_id': [7, 9]},
      'config': {'eos_token_id': 5}}, (7, 9)),
    ({'generation_config': {'eos_token_id': 7}}, (7,)),
    ({'generation_config': {'temperature': 0.6},
      'config': {'eos_token_id': 5}}, (5,)),
    ({'config': {'eos_token_id': [0]}}, (0,)),
    ({'config': {'eos_token_id': None}}, (256,)),
    ({}, (256,)),
])
def test_stop_tokens_come_from_the_most_specific_file(load, files, stops):
  files = {name: {'model_type': 'qwen2', **content}
           for name, content in files.items()}
  tokenizer = load({'eos_token': '<|end|>'}, **files)
  assert tokenizer.eos_ids == stops
  # No pad token is named: the first stop token fills empty slots.
  assert tokenizer.pad_id == stops[0]


def test_a_pad_token_of_its_own_is_used(load):
  assert load({'eos_token': '<|end|>', 'pad_token': '<|pad|>'}).pad_id == 257


def test_a_folder_without_a_stop_token_is_refused(load):
  with pytest.raises(ValueError, match='got no stop token; expected eos_token'):
    load()


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
  with pytest.raises(ValueError, match='got no tokenizer.json'):
    tokenizer_lib.load(tmp_path)


def test_chat_is_the_tokenizers_own_template(load):
  template = ('{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}'
              '{% if add_generation_prompt %}<assistant>{% endif %}')
  tokenizer = load({'eos_token': '<|end|>', 'chat_template': template})
  assert tokenizer.chat('What is {x}?') == '<user>What is {x}?<assistant>'


def test_chat_without_a_template_says_what_to_set(load):
  with pytest.raises(ValueError, match='no chat template; set a text with'):
    load({'eos_token': '<|end|>'}).chat('What is 2+2?')


@pytest.mark.parametrize('template,match', [
    ('{{ nope.foo() }}', 'template fails .UndefinedError'),
    ('{% for', 'template fails .TemplateSyntaxError'),
    ("{{ raise_exception('no user here') }}", 'fails.*no user here'),
    ('<user>', 'leaves the question out')])
def test_a_chat_template_that_does_not_work(load, template, match):
  tokenizer = load({'eos_token': '<|end|>', 'chat_template': template})
  with pytest.raises(ValueError, match=match):
    tokenizer.chat('What is 2+2?')
