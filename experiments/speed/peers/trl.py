# SPDX-License-Identifier: Apache-2.0
"""TRL's rollouts: what GRPOTrainer runs from prompts to scored completions.

`_generate_and_score_completions` tokenizes, generates with transformers,
decodes, rewards (here: with 0) and takes the log-probs of what it sampled in
a second forward pass. It does that last when a batch is used more than once,
hence `num_iterations=2`. The part 'generate' ends before the log-probs.
"""

import tempfile
import time
from typing import Any

import datasets
import numpy as np
import tokenizers
import torch
import transformers
import trl

from experiments.speed import points, serving
from experiments.speed.peers import transformers as plain

# Rows that are scored at once: no larger number was faster.
_SCORED = 32


class Peer:
  """GRPOTrainer on the model that `peers/transformers.py` has."""

  libraries = ('torch', 'transformers', 'trl')

  def __init__(self, folder: str, work: points.Work):
    model = plain.load_model(folder)
    self._work = work
    self._facts = plain.static_facts(model.config, work)
    self._inputs = [{'prompt': ' '.join(map(str, row))}
                    for row in work.row_prompts]
    scored = min(_SCORED, work.rows)
    self._trainer = trl.GRPOTrainer(
        model=model, reward_funcs=_reward,
        processing_class=make_tokenizer(model.config.vocab_size),
        train_dataset=datasets.Dataset.from_list(self._inputs),
        args=trl.GRPOConfig(
            output_dir=tempfile.mkdtemp(), report_to=[], use_cpu=True,
            bf16=False, gradient_checkpointing=False, beta=0.0,
            num_generations=points.GROUP_SIZE, num_iterations=2,
            per_device_train_batch_size=scored,
            steps_per_generation=work.rows // scored,
            gradient_accumulation_steps=1,
            max_completion_length=work.longest, temperature=1.0, top_p=1.0,
            top_k=0))
    self._generate, self._trainer._generate = (
        self._trainer._generate, self._timed_generate)
    self._generate_seconds = 0.0

  @torch.inference_mode()
  def run(self, seed: int) -> dict[str, Any]:
    """Prompts to completions and log-probs."""
    torch.manual_seed(seed)
    batch = self._trainer._generate_and_score_completions(self._inputs)
    return {'batch': batch, 'facts': {
        **self._facts, 'generate_seconds': self._generate_seconds}}

  def compared(self, result: dict[str, Any]) -> dict[str, np.ndarray]:
    """What it scored."""
    rows = torch.tensor(self._work.compared)
    batch = result['batch']
    return {'tokens': batch['completion_ids'][rows].numpy(),
            'logprobs': batch['old_per_token_logps'][rows].numpy()}

  def _timed_generate(self, prompts: list) -> Any:
    start = time.perf_counter()
    found = self._generate(prompts)
    self._generate_seconds = time.perf_counter() - start
    return found


def _reward(prompts: list, **columns: Any) -> list[float]:
  return [0.0] * len(prompts)


def make_tokenizer(vocab_size: int) -> Any:
  """A word of digits a token; the stop token is none that is ever sampled."""
  words = [*map(str, range(vocab_size)), '<eos>', '<pad>']
  model = tokenizers.models.WordLevel(
      {word: i for i, word in enumerate(words)}, unk_token='<pad>')
  found = tokenizers.Tokenizer(model)
  found.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
  return transformers.PreTrainedTokenizerFast(
      tokenizer_object=found, eos_token='<eos>', pad_token='<pad>')


if __name__ == '__main__':
  serving.serve(Peer)
