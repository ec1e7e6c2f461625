# SPDX-License-Identifier: Apache-2.0
"""Text to tokens and back, through transformers' reader of tokenizer.json."""

from collections.abc import Sequence
import json
import os
import pathlib

import numpy as np


class Tokenizer:
  """The small interface that the rest of the package uses.

  Attributes:
    eos_ids: the stop tokens, several for some families.
    pad_id: fills empty slots; never read as text.
    vocab_size: number of token ids.
  """

  def __init__(self, reader, eos_ids: Sequence[int]):
    self._reader = reader
    self.eos_ids = tuple(eos_ids)
    self.pad_id = (reader.pad_token_id if reader.pad_token_id is not None
                   else self.eos_ids[0])
    self.vocab_size = len(reader)

  def encode(self, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text; no token is added."""
    # A lone surrogate is not text and would stop the reader.
    clean = [t.encode('utf-8', 'replace').decode('utf-8') for t in texts]
    return self._reader(clean, add_special_tokens=False)['input_ids']

  def decode(self, rows: Sequence[np.ndarray]) -> list[str]:
    """The text of each row of ids; stop and pad tokens vanish."""
    return self._reader.batch_decode(
        [np.asarray(row).tolist() for row in rows], skip_special_tokens=True,
        clean_up_tokenization_spaces=False)

  def token(self, text: str) -> int:
    """The id of a text that is one token.

    Raises:
      ValueError: it is none, or several.
    """
    [ids] = self.encode([text])
    if len(ids) != 1:
      raise ValueError(f'{text!r} is {len(ids)} tokens, {ids}: expected a text '
                       'that is one to this tokenizer.')
    return ids[0]

  def pieces(self) -> list[str]:
    """The text of each token by itself, stop tokens and the like included."""
    return self._reader.batch_decode(
        [[i] for i in range(self.vocab_size)],
        clean_up_tokenization_spaces=False)

  def chat(self, question: str) -> str:
    """The question as a user's turn in the tokenizer's own chat template.

    Raises:
      ValueError: the tokenizer brings no template, or one that fails or
        leaves the question out.
    """
    if not self._reader.chat_template:
      raise ValueError('rollout.template is "chat" but the tokenizer has no '
                       'chat template; set a text with {question} in it.')
    try:
      text = self._reader.apply_chat_template(
          [{'role': 'user', 'content': question}], tokenize=False,
          add_generation_prompt=True)
    except Exception as error:  # whatever a template raises
      raise ValueError(
          f'the tokenizer\'s chat template fails ({type(error).__name__}: '
          f'{error}): mend it, or set rollout.template to a text with '
          '{question} in it.') from error
    if question.strip() not in text:
      raise ValueError('the tokenizer\'s chat template leaves the question '
                       'out: mend it, or set rollout.template to a text with '
                       '{question} in it.')
    return text


def load(folder: pathlib.Path | str) -> Tokenizer:
  """The tokenizer of a local model folder.

  Stop ids are those of generation_config.json, else of config.json, else the
  tokenizer's own.

  Raises:
    ValueError: no tokenizer.json, or no stop token is named anywhere.
  """
  folder = pathlib.Path(folder)
  if not (folder / 'tokenizer.json').is_file():
    raise ValueError(f'{folder}: got no tokenizer.json; expected the model\'s '
                     'tokenizer beside its weights.')
  # The reader warns that torch is absent, and asks the network for news.
  os.environ.setdefault('TRANSFORMERS_NO_ADVISORY_WARNINGS', '1')
  import transformers  # Seconds to import: only a run that reads text pays.
  # Not AutoTokenizer: beside a config.json it takes the model type's class,
  # which puts its own normalizer, splits and pad token in place of the file's.
  try:
    reader = transformers.PreTrainedTokenizerFast.from_pretrained(
        str(folder), local_files_only=True)
  except ValueError as error:
    raise ValueError(f'{folder}: its tokenizer.json or tokenizer_config.json '
                     f'cannot be read: {error}.') from error
  eos_ids = _stop_ids(folder) or [reader.eos_token_id]
  if None in eos_ids:
    raise ValueError(f'{folder}: got no stop token; expected eos_token_id in '
                     'generation_config.json or config.json.')
  return Tokenizer(reader, eos_ids)


def _stop_ids(folder: pathlib.Path) -> list[int]:
  for name in ('generation_config.json', 'config.json'):
    file = folder / name
    if not file.is_file():
      continue
    try:
      found = json.loads(file.read_text()).get('eos_token_id')
      ids = found if isinstance(found, list) else [found]
      # Not isinstance: true is no token.
      if not all(id_ is None or type(id_) is int for id_ in ids):
        raise ValueError(f'eos_token_id is {found!r}: expected token ids')
    except (ValueError, AttributeError) as error:
      raise ValueError(f'{file}: expected the model\'s JSON settings: '
                       f'{error}.') from error
    if found is not None:
      return ids
  return []
