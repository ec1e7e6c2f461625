# SPDX-License-Identifier: Apache-2.0
"""TRL's update: GRPOTrainer.training_step, and the rest of Trainer's loop.

`training_step` prepares its inputs (in a whole step it samples, rewards and
compares them), takes the loss and its gradient; what Trainer does after the
last microbatch, clipping and the optimizer's step, is called here in its
order. Logging, callbacks and checkpoints are left out.
"""

import tempfile
import time
from typing import Any

import datasets
import numpy as np
import torch
import trl

from experiments.speed import points, serving, steps
from experiments.speed.peers import transformers as plain
from experiments.speed.peers import trl as sampler

# Rows of a microbatch; see the README.
_MICROBATCH = 32


class Peer:
  """GRPOTrainer on the model that `peers/transformers.py` has."""

  libraries = ('torch', 'transformers', 'trl')

  def __init__(self, folder: str, work: steps.Work):
    model = plain.load_model(folder)
    rows = len(work.completions)
    self._work = work
    self._inputs = [{'prompt': ' '.join(map(str, row))}
                    for row in work.row_prompts]
    self._parts = rows // _MICROBATCH
    self._trainer = trl.GRPOTrainer(
        model=model, reward_funcs=_reward,
        processing_class=sampler.make_tokenizer(model.config.vocab_size),
        train_dataset=datasets.Dataset.from_list(self._inputs),
        args=trl.GRPOConfig(
            output_dir=tempfile.mkdtemp(), report_to=[], use_cpu=True,
            bf16=False, gradient_checkpointing=False, beta=0.0,
            loss_type='grpo', epsilon=steps.CLIP,
            num_generations=points.GROUP_SIZE,
            per_device_train_batch_size=_MICROBATCH,
            gradient_accumulation_steps=self._parts,
            max_completion_length=steps.COMPLETION, temperature=1.0,
            top_p=1.0, top_k=0, learning_rate=steps.LEARNING_RATE,
            lr_scheduler_type='constant', weight_decay=0.0,
            adam_beta1=steps.BETAS[0], adam_beta2=steps.BETAS[1],
            adam_epsilon=steps.EPS, max_grad_norm=steps.CLIP_NORM))
    self._trainer.create_optimizer_and_scheduler(num_training_steps=10**6)
    self._trainer.current_gradient_accumulation_steps = self._parts
    self._seconds, self._tokens = 0.0, None
    if work.whole:
      self._score = self._trainer._generate_and_score_completions
      self._generate = self._trainer._generate
      self._trainer._generate_and_score_completions = self._kept
      self._trainer._generate = self._timed
    else:
      self._trainer._generate_and_score_completions = (
          lambda inputs: self._given())

  def run(self, seed: int) -> dict[str, Any]:
    """One update; a whole step samples first, in its first microbatch."""
    torch.manual_seed(seed)
    trainer = self._trainer
    start = time.perf_counter()
    losses = [trainer.training_step(trainer.model, self._inputs, None)
              for _ in range(self._parts)]
    trainer._clip_grad_norm(trainer.model)
    trainer.optimizer.step()
    trainer.lr_scheduler.step()
    trainer.model.zero_grad()
    loss = float(sum(losses))
    facts = {}
    if self._work.whole:
      facts['sample_seconds'] = self._seconds
    facts['update_seconds'] = time.perf_counter() - start - self._seconds
    return {'facts': facts, 'loss': loss}

  def compared(self, result: dict[str, Any]) -> dict[str, np.ndarray]:
    """What it learned from, its loss, and the weights now."""
    return {'tokens': self._tokens, 'loss': np.array(result['loss']),
            **{name: value.detach().numpy() for name, value in
               self._trainer.model.state_dict().items()}}

  def _given(self) -> dict[str, torch.Tensor]:
    """The batch that the trainer would have sampled."""
    work, real = self._work, lambda tokens: torch.ones(
        tokens.shape, dtype=torch.long)
    self._tokens = work.completions
    return {'prompt_ids': torch.tensor(work.row_prompts, dtype=torch.long),
            'prompt_mask': real(work.row_prompts),
            'completion_ids': torch.tensor(work.completions,
                                           dtype=torch.long),
            'completion_mask': real(work.completions),
            'advantages': torch.tensor(work.advantages),
            'old_per_token_logps': torch.tensor(work.old_logprobs),
            'num_items_in_batch': torch.tensor(work.completions.size)}

  def _kept(self, inputs: list) -> Any:
    found = self._score(inputs)
    self._tokens = found['completion_ids'].numpy()
    return found

  def _timed(self, prompts: list) -> Any:
    start = time.perf_counter()
    found = self._generate(prompts)
    self._seconds = time.perf_counter() - start
    return found


def _reward(completion_ids: list, **columns: Any) -> list[float]:
  return steps.rewards([ids[0] for ids in completion_ids]).tolist()


if __name__ == '__main__':
  serving.serve(Peer, steps.load)
