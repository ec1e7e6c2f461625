# SPDX-License-Identifier: Apache-2.0
"""A model folder small enough for a test: random weights, a byte each token."""

import json

import jax
import tokenizers
from tokenizers import decoders, models, pre_tokenizers
import transformers

from lapo_jax.models import qwen2

EOS, PAD = '<|endoftext|>', '<|pad|>'
# Random weights stop after some ten tokens when many tokens stop them.
_STOPS = 24
TEMPLATE = ('{% for m in messages %}{{ m.content }}{% endfor %}'
            '{% if add_generation_prompt %} <think>{% endif %}')


def write(path, seed=0):
  """Writes the folder; returns its path as text."""
  path.mkdir(parents=True, exist_ok=True)
  alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
  tokenizer = tokenizers.Tokenizer(models.BPE(
      vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(
      add_prefix_space=False, use_regex=False)
  tokenizer.decoder = decoders.ByteLevel()
  tokenizer.add_special_tokens([EOS, PAD])
  tokenizer.add_tokens(['<think>', '</think>'])
  transformers.PreTrainedTokenizerFast(
      tokenizer_object=tokenizer, eos_token=EOS, pad_token=PAD,
      chat_template=TEMPLATE,
      clean_up_tokenization_spaces=False).save_pretrained(path)
  eos = tokenizer.token_to_id(EOS)
  (path / 'generation_config.json').write_text(json.dumps(
      {'eos_token_id': [eos, *range(_STOPS)]}))
  model = qwen2.Model(
      vocab_size=tokenizer.get_vocab_size(), width=32, num_layers=1,
      num_heads=2, num_kv_heads=1, mlp_width=64, rope_theta=10000.0,
      max_positions=512)
  params = qwen2.init_params(model, jax.random.key(seed))
  # Logits of a random model are near 0; these tell one prompt from another.
  params['embedding'] = 3 * params['embedding']
  qwen2.save(params, str(path), model, eos_token_id=eos,
             pad_token_id=tokenizer.token_to_id(PAD))
  return str(path)
