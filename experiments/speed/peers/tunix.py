# SPDX-License-Identifier: Apache-2.0
"""Tunix's sampler: a static batch, run until the longest is done."""

import json
import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np
from tunix.generate import sampler
from tunix.models.qwen2 import model as model_lib
from tunix.models.qwen2 import params as params_lib

from experiments.speed import points, serving


def load_model(folder: str) -> tuple[Any, model_lib.ModelConfig]:
  """The folder's model, float32, and its shape."""
  config = json.loads((pathlib.Path(folder) / 'config.json').read_text())
  shape = model_lib.ModelConfig(
      num_layers=config['num_hidden_layers'],
      vocab_size=config['vocab_size'],
      embed_dim=config['hidden_size'],
      hidden_dim=config['intermediate_size'],
      num_heads=config['num_attention_heads'],
      head_dim=config['head_dim'],
      num_kv_heads=config['num_key_value_heads'],
      rope_theta=config['rope_theta'],
      norm_eps=config['rms_norm_eps'],
      use_tied_embedding=config['tie_word_embeddings'])
  model = params_lib.create_model_from_safe_tensors(
      folder, shape, dtype=jnp.float32)
  return model, shape


class Peer:
  """`Sampler` with a cache of just the slots that it needs."""

  libraries = ('google-tunix', 'jax', 'jaxlib', 'flax')

  def __init__(self, folder: str, work: points.Work):
    model, shape = load_model(folder)
    self._work = work
    self._prompt_slots = work.prompts.shape[1]
    slots = self._prompt_slots + work.longest
    self._sampler = sampler.Sampler(
        model, Tokenizer(work.row_prompts, shape.vocab_size),
        sampler.CacheConfig(slots, shape.num_layers, shape.num_kv_heads,
                            shape.head_dim))
    numbers = 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim
    self._facts = {
        'occupancy': float(work.lengths.sum() / (work.rows * work.longest)),
        'cache_bytes': 4 * work.rows * slots * numbers}

  def run(self, seed: int) -> dict[str, Any]:
    """Samples from the whole distribution, with log-probs."""
    output = self._sampler(
        list(map(str, range(self._work.rows))),
        max_generation_steps=self._work.longest,
        max_prompt_length=self._prompt_slots, temperature=1.0, top_p=1.0,
        seed=seed, return_logprobs=True)
    return {'output': output, 'facts': self._facts}

  def compared(self, result: dict[str, Any]) -> dict[str, np.ndarray]:
    """What it sampled."""
    output, rows = result['output'], self._work.compared
    return {'tokens': np.array([output.tokens[row] for row in rows]),
            'logprobs': np.array([output.logprobs[row] for row in rows])}


class Tokenizer:
  """Row numbers for prompts; it costs the sampler next to nothing.

  Pad and stop token are beyond the vocabulary: neither is ever sampled.
  """

  def __init__(self, prompts: np.ndarray, vocab_size: int):
    self._prompts = prompts
    self._vocab_size = vocab_size

  def encode(self, text: str) -> list[int]:
    return self._prompts[int(text)].tolist()

  def decode(self, ids: list[int]) -> str:
    return ''

  def bos_id(self) -> None:
    return None

  def eos_id(self) -> int:
    return self._vocab_size

  def pad_id(self) -> int:
    return self._vocab_size + 1


if __name__ == '__main__':
  serving.serve(Peer)
