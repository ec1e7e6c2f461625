# SPDX-License-Identifier: Apache-2.0
"""What TRL's own trainers make of random tensors, for tests/test_trl.py.

    python -m experiments.trl_oracle.make tests/goldens/trl.npz

TRL's methods run as they are, in float64, on a stand-in for the trainer that
holds the settings and whose "model" answers with given log-probabilities:
`_generate_and_score_completions` turns rewards into advantages and the
sampler's log-probs into weights, `_compute_loss` both into a loss. Needs
torch and trl 1.16.0; no accelerator, no network.
"""

import collections
import sys
import types

import numpy as np

P, G, T = 3, 4, 9
EOS, PAD, WORD = 1, 0, 7

_KL = {'beta': 0.1, 'use_bias_correction_kl': False}
_TIS = {'use_vllm': True, 'vllm_importance_sampling_mode': 'token_truncate',
        'vllm_importance_sampling_clip_max': 1.5}

# name -> what differs from `_DEFAULTS`. GRPOTrainer's settings.
LOSSES = {
    'grpo': {},
    'grpo_on_policy': {'on_policy': True},
    'grpo_clip_higher': {'epsilon_high': 0.28},
    'grpo_two_sided': {'delta': 1.5},
    'grpo_kl': _KL,
    'grpo_kl_corrected': {**_KL, 'use_bias_correction_kl': True},
    'grpo_kl_corrected_on_policy': {**_KL, 'use_bias_correction_kl': True,
                                    'on_policy': True},
    'bnpo': {'loss_type': 'bnpo'},
    'dapo': {'loss_type': 'dapo', 'epsilon_high': 0.28},
    'dapo_truncated': {'loss_type': 'dapo', 'epsilon_high': 0.28,
                       'mask_truncated_completions': True},
    'grpo_truncated': {'mask_truncated_completions': True},
    'dr_grpo': {'loss_type': 'dr_grpo', 'scale_rewards': 'none'},
    'dr_grpo_kl_truncated': {**_KL, 'loss_type': 'dr_grpo',
                             'mask_truncated_completions': True},
    'gspo': {'importance_sampling_level': 'sequence', 'epsilon': 3e-2,
             'epsilon_high': 4e-2},
    'gspo_two_sided': {'importance_sampling_level': 'sequence',
                       'epsilon': 3e-2, 'epsilon_high': 4e-2, 'delta': 1.05},
    'gspo_kl_corrected': {**_KL, 'importance_sampling_level': 'sequence',
                          'use_bias_correction_kl': True},
    'cispo': {'loss_type': 'cispo', 'epsilon_high': 1.5},
    'cispo_kl': {**_KL, 'loss_type': 'cispo', 'epsilon_high': 5.0},
    'grpo_tis': _TIS,
    'dapo_tis_kl': {**_TIS, **_KL, 'loss_type': 'dapo'},
    'gspo_tis': {**_TIS, 'importance_sampling_level': 'sequence',
                 'epsilon': 3e-2},
    'cispo_tis': {**_TIS, 'loss_type': 'cispo', 'epsilon_high': 5.0},
    'grpo_tis_floor': {**_TIS, 'vllm_importance_sampling_clip_min': 0.8},
    'grpo_mis': {**_TIS, 'vllm_importance_sampling_mode': 'token_mask',
                 'vllm_importance_sampling_clip_min': 0.8},
    'grpo_sequence_tis': {
        **_TIS, 'vllm_importance_sampling_mode': 'sequence_truncate'},
    'grpo_sequence_mis': {
        **_TIS, 'vllm_importance_sampling_mode': 'sequence_mask'},
}

# Of rewards [P, G] in two terms, weighted 0.7 and 0.3; 'rloo*' RLOOTrainer's.
ADVANTAGES = {
    'group': {},
    'batch': {'scale_rewards': 'batch'},
    'none': {'scale_rewards': 'none'},
    'gdpo': {'multi_objective_aggregation': 'normalize_then_sum'},
    'rloo': {'normalize_advantages': False},
    'rloo_whitened': {'normalize_advantages': True},
}

_DEFAULTS = {
    'on_policy': False, 'loss_type': 'grpo', 'epsilon': 0.2,
    'epsilon_high': None, 'delta': None, 'beta': 0.0,
    'use_bias_correction_kl': True, 'importance_sampling_level': 'token',
    'scale_rewards': 'group', 'normalize_advantages': False,
    'multi_objective_aggregation': 'sum_then_normalize',
    'mask_truncated_completions': False, 'use_vllm': False,
    'vllm_importance_sampling_mode': 'token_truncate',
    'vllm_importance_sampling_clip_max': None,
    'vllm_importance_sampling_clip_min': None,
}


def inputs() -> dict[str, np.ndarray]:
  """Random tensors, float32 but for the masks; rows 3 and 6 are truncated."""
  rng = np.random.default_rng(0)
  rows = (P * G, T)
  lengths = rng.integers(1, T, P * G)
  truncated = np.isin(np.arange(P * G), (3, 6))
  lengths[truncated] = (T, 5)
  old = -rng.exponential(1.0, rows)
  return {
      'old': old.astype(np.float32),
      # Also a shift of the whole row, for the sequence's ratio to differ.
      'logprobs': (old + rng.normal(0, 0.3, rows) +
                   rng.normal(0, 0.2, (P * G, 1))).astype(np.float32),
      'ref': (old + rng.normal(0, 0.5, rows)).astype(np.float32),
      'sampler': (old + rng.normal(0, 0.2, rows)).astype(np.float32),
      'mask': np.arange(T) < lengths[:, None],
      'truncated': truncated,
      'correct': (rng.random((P, G)) > 0.5).astype(np.float32),
      'length': rng.random((P, G)).astype(np.float32),
      'weights': np.array([0.7, 0.3], np.float32),
  }


def run(data: dict[str, np.ndarray], settings: dict, rloo: bool = False,
        ) -> dict[str, np.ndarray]:
  """advantages, loss and its gradient to `logprobs`, float64, by TRL."""
  import torch
  from trl.trainer import grpo_trainer, rloo_trainer

  kind = rloo_trainer.RLOOTrainer if rloo else grpo_trainer.GRPOTrainer
  double = lambda name: torch.tensor(data[name], dtype=torch.float64)
  trainer = _trainer(data, {**_DEFAULTS, **settings}, kind)
  trainer._get_per_token_logps_and_entropies = lambda model, *a, **k: (
      double(model.answers), None, None)
  batch = kind._generate_and_score_completions(
      trainer, [{'prompt': 'x'}] * (P * G))
  # RLOOTrainer knows no other policy than the one that sampled.
  logprobs = double('old' if rloo else 'logprobs').requires_grad_()
  trainer._get_per_token_logps_and_entropies = lambda *a, **k: (
      logprobs, torch.zeros_like(logprobs), None)
  loss = kind._compute_loss(trainer, trainer.model, batch)
  loss.backward()
  return {'advantages': batch['advantages'].numpy().reshape(P, G),
          'loss': loss.detach().numpy(), 'gradient': logprobs.grad.numpy()}


def _trainer(data, settings, kind):
  """A `kind` without its constructor: the settings, and one process."""
  import torch

  trainer = object.__new__(kind)
  args = types.SimpleNamespace(
      per_device_train_batch_size=P * G, per_device_eval_batch_size=P * G,
      gradient_checkpointing_kwargs=None, gradient_accumulation_steps=1,
      # Whether old log-probs are asked for at all.
      steps_per_generation=1 if settings['on_policy'] else 2, **settings)
  same = lambda x, **kwargs: x
  accelerator = types.SimpleNamespace(
      device=torch.device('cpu'), num_processes=1, process_index=0,
      sync_gradients=True, gather=same, reduce=same, gather_for_metrics=same)
  model = lambda answers: types.SimpleNamespace(
      training=False, is_gradient_checkpointing=False, answers=answers)
  ids = [[WORD] * (n - 1) + [WORD if cut else EOS] for n, cut in
         zip(data['mask'].sum(1), data['truncated'], strict=True)]
  sampled = [row[:len(i)].astype(np.float64).tolist() for row, i in
             zip(data['sampler'], ids, strict=True)]
  rewards = np.stack([data['correct'], data['length']], -1).reshape(-1, 2)
  prompts, texts = [[WORD]] * len(ids), ['y'] * len(ids)
  generated = (prompts, ids, None, texts, sampled if settings['use_vllm']
               else None, {}, None, None)
  if kind.__name__ == 'RLOOTrainer':
    generated = (prompts, ids, texts)
  values = dict(
      settings, args=args, accelerator=accelerator, model=model('old'),
      ref_model=model('ref'), epsilon_low=settings['epsilon'],
      num_iterations=1, num_generations=G, num_generations_eval=G,
      current_gradient_accumulation_steps=1, max_completion_length=T,
      vllm_importance_sampling_correction=settings['use_vllm'],
      reward_weights=torch.tensor(data['weights'], dtype=torch.float64),
      reward_funcs=[None, None], reward_func_names=['correct', 'length'],
      reward_clip_range=None, off_policy_mask_threshold=None,
      top_entropy_quantile=1.0, use_adaptive_entropy=False, entropy_coef=0.0,
      _entropy_bonus_enabled=False, aux_loss_enabled=False, tools=None,
      environments=None, environment_factories=None, pad_to_multiple_of=None,
      log_multimodal=False, eos_token_ids=[EOS],
      _tokenizer=types.SimpleNamespace(pad_token_id=PAD),
      processing_class=None, _pending_extra_logs={}, _pending_metrics={},
      _metrics=collections.defaultdict(lambda: collections.defaultdict(list)),
      _logs=collections.defaultdict(list, rewards=collections.defaultdict(list),
                                    extra=collections.defaultdict(list)),
      _generate=lambda prompts: generated,
      _calculate_rewards=lambda *a: torch.tensor(rewards,
                                                 dtype=torch.float64))
  if settings['epsilon_high'] is None:
    values['epsilon_high'] = settings['epsilon']
  for name, value in values.items():
    object.__setattr__(trainer, name, value)
  return trainer


def make() -> dict[str, np.ndarray]:
  """Inputs and every case's outcome, by name."""
  data = inputs()
  found = dict(data)
  for group, cases in (('loss', LOSSES), ('advantage', ADVANTAGES)):
    for name, settings in cases.items():
      outcome = run(data, settings, rloo=name.startswith('rloo'))
      found |= {f'{group}/{name}/{key}': x for key, x in outcome.items()}
  return found


if __name__ == '__main__':
  np.savez_compressed(sys.argv[1], **make())
