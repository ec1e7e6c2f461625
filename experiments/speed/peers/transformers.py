# SPDX-License-Identifier: Apache-2.0
"""transformers' `generate`: a static batch, run until the longest is done.

It returns tokens alone; log-probs are taken of them afterwards, not timed.
"""

import os
from typing import Any

import numpy as np
import torch
import transformers

from experiments.speed import points, serving


def load_model(folder: str) -> Any:
  """The folder's model, as fast as we found it to run on a CPU."""
  torch.set_num_threads(len(os.sched_getaffinity(0)))
  transformers.utils.logging.set_verbosity_error()
  transformers.utils.logging.disable_progress_bar()
  return transformers.AutoModelForCausalLM.from_pretrained(
      folder, dtype=torch.float32, attn_implementation='sdpa').eval()


def static_facts(config: Any, work: points.Work) -> dict[str, float]:
  """Of a batch that is decoded until its longest row is done."""
  slots = work.prompts.shape[1] + work.longest
  numbers = 2 * config.num_hidden_layers * (
      config.num_key_value_heads * config.head_dim)
  return {'occupancy': float(work.lengths.sum() / (work.rows * work.longest)),
          'cache_bytes': 4 * work.rows * slots * numbers}


class Peer:
  """`generate` with its growing cache."""

  libraries = ('torch', 'transformers')

  def __init__(self, folder: str, work: points.Work):
    self._model = load_model(folder)
    self._work = work
    self._prompts = torch.tensor(work.row_prompts, dtype=torch.long)
    self._facts = static_facts(self._model.config, work)

  @torch.inference_mode()
  def run(self, seed: int) -> dict[str, Any]:
    """Samples from the whole distribution; nothing is a stop token."""
    torch.manual_seed(seed)
    tokens = self._model.generate(
        input_ids=self._prompts,
        attention_mask=torch.ones_like(self._prompts),
        max_new_tokens=self._work.longest, do_sample=True, temperature=1.0,
        top_k=0, top_p=1.0, eos_token_id=None, pad_token_id=0)
    return {'tokens': tokens, 'facts': self._facts}

  @torch.inference_mode()
  def compared(self, result: dict[str, Any]) -> dict[str, np.ndarray]:
    """Its forward pass, a row at a time."""
    tokens = result['tokens'][self._work.compared]
    count = self._work.longest
    found = []
    for row in tokens[:, None]:
      logits = self._model(row).logits[:, -count - 1:-1]
      found.append(logits.log_softmax(-1).gather(2, row[:, -count:, None]))
    return {'tokens': tokens[:, -count:].numpy(),
            'logprobs': torch.cat(found)[..., 0].numpy()}


if __name__ == '__main__':
  serving.serve(Peer)
