# SPDX-License-Identifier: Apache-2.0
"""Every key of a run, with its default; the other configs start from here.

The config's argument names plug-ins, which bring their own keys:
`configs/tiny.py:accuracy` or `configs/tiny.py:reward=lapo,task=gsm8k`. The
command line does the same: `--config.task.name=gsm8k --config.task.path=…`.
"""

import ml_collections

from lapo_jax import plugins

_KINDS = {'model': 'models', 'task': 'tasks', 'reward': 'rewards'}

# LAPO's prompt, a plain string without a chat template (arXiv 2507.15758).
LAPO_TEMPLATE = (
    'You are a helpful assistant. A conversation between User and Assistant. '
    'The user asks a question, and the Assistant solves it. The Assistant '
    'first thinks about the reasoning process in the mind and then provides '
    'the user with the answer. The reasoning process is enclosed within '
    '<think> and </think> tags, respectively, i.e., <think> reasoning process '
    'here </think> answer here. User: {question} Please think step by step and '
    'output the final answer within \\boxed{}. Assistant: <think>')


def get_config(argument: str = '') -> ml_collections.ConfigDict:
  """The default config.

  Args:
    argument: comma-separated `section=name`, for the sections model, task and
      reward; a bare name is a reward.
  """
  names = {'model': 'qwen2', 'task': 'arithmetic', 'reward': 'lapo'}
  for part in filter(None, argument.split(',')):
    section, _, name = part.rpartition('=')
    section = section or 'reward'
    if section not in names:
      raise ValueError(f'config argument {part!r}: expected section=name with '
                       f'a section among {sorted(names)}.')
    names[section] = name

  config = ml_collections.ConfigDict()
  config.seed = 0
  # Steps of each stage.
  config.total_steps = 300
  # A plug-in each: `name` is the file, the other keys are its own.
  for section, name in names.items():
    config[section] = {'name': name, **plugins.defaults(_KINDS[section], name)}

  config.rollout = ml_collections.ConfigDict({
      'num_prompts': 64,  # P, prompts a step
      'group_size': 8,  # G, completions a prompt
      'max_prompt_length': 512,  # tokens; a longer prompt is an error
      'max_completion_length': 2048,  # tokens; what reaches it is truncated
      'temperature': 1.0,
      # Completions that are decoded at once, on all devices together; 0 = as
      # many as `cache_share` of each device's memory holds at full length.
      'num_slots': 0,
      'cache_share': 0.3,
      'dtype': '',  # of the sampler's weights and arithmetic; '' = the model's
      # Of keys and values: '' = the sampler's | 'int8', half of bfloat16's
      # bytes, but a TPU has no kernel for it and copies the pages each step.
      'cache_dtype': '',
      # Grade what has ended while the rest is sampled; the same grades, and
      # sooner where grading has cores of its own.
      'grade_ahead': False,
      # How often a step draws other prompts in place of groups that are all
      # right or all wrong; DAPO's dynamic sampling. 0 = never.
      'refill_rounds': 0,
      # SIRI: the cap swings between max_completion_length and `least` tokens
      # once in so many steps of the run; 0 = it does not.
      'cap_cycle': {'least': 0, 'steps': 0},
      # Tokens that are written, not drawn: the first of a share of each group
      # (AdaptThink's '</think>'; in training alone), and s1's budget forcing,
      # tokens of thinking at least and at most; '' and 0 = none.
      'forced': {'first': '', 'first_share': 0.5, 'end': '</think>',
                 'wait': 'Wait', 'least': 0, 'most': 0},
      # 'chat' for the tokenizer's own template, else a text with {question}.
      'template': 'chat',
  })
  if 'cap' in config.reward:
    # A method's cap is the sampler's.
    config.reward.cap = config.rollout.get_ref('max_completion_length')
  config.grader = ml_collections.ConfigDict({
      'num_workers': 1,
      'deadline': 5.0,  # seconds a completion
  })
  config.advantage = ml_collections.ConfigDict({
      'baseline': 'mean',  # 'mean' | 'leave_one_out' | 'none'
      'scale': 'group',  # 'group' | 'batch' | 'none'
      'decoupled': False,  # each reward term normalised by itself
      'whiten': 'none',  # 'none' | 'completions' | 'tokens'
      'eps': 1e-4,  # added to the standard deviation
  })
  config.loss = ml_collections.ConfigDict({
      'kind': 'ppo',  # 'ppo' | 'gspo' | 'cispo', with bounds of their own
      'clip_low': 0.2,  # the ratio is clipped at 1 − clip_low
      'clip_high': 0.2,  # and at 1 + clip_high; DAPO's is 0.28
      # Bounds the ratio where the advantage is negative; 3 is usual, 0 = off.
      'dual_clip': 0.0,
      'kl_coef': 0.0,  # weight of kl against the policy at the stage's start
      'kl': 'k3',  # 'k1' | 'k2' | 'k3'
      'kl_ratio': False,  # times π / π_old, with its gradient
      'aggregate': 'sequence',  # 'sequence' | 'token' | 'constant'
      # Completions that reach the cap leave the loss, not their group.
      'drop_truncated': False,
      # A token's loss times min(π / π_sampler, cap): the sampler's numerics
      # are its own, see policy/sampler_ratio_*. 2 is usual; 0 = off.
      'importance_cap': 0.0,
      'importance_floor': 0.0,  # the bound below
      'importance_level': 'token',  # 'token' | 'sequence'
      'importance_outside': 'truncate',  # 'truncate' | 'mask'
      # KL-Cov: this share of tokens, whose log-prob and advantage covary most,
      # pay coef·|log π / π_old|; 0.0002 is the paper's, 0 = off. It acts where
      # a batch has several updates.
      'kl_cov_share': 0.0,
      'kl_cov_coef': 1.0,
  })
  config.optimizer = ml_collections.ConfigDict({
      'learning_rate': 1e-6,
      'warmup_share': 0.03,  # of the stage's updates
      'final_share': 0.1,  # of the learning rate, reached by a cosine
      'b1': 0.9,
      'b2': 0.95,
      'weight_decay': 0.0,
      'clip_norm': 1.0,
  })
  config.updates = ml_collections.ConfigDict({
      'num_epochs': 1,
      'num_minibatches': 1,
      'microbatch_size': 16,  # completions whose gradient is taken at once
      # This share of shortest completions is cut to a length of its own: the
      # same sums for less work. 0 = every completion as long as the longest.
      'short_share': 0.75,
      # Instead of that: a row holds several completions, each behind its
      # prompt, as many as fit beside the longest. Spares most of the padding
      # of heavy tails, prompts' too; attention still spans whole rows.
      'pack': False,
      # What the backward pass computes again, layer by layer, to hold less:
      # 'none' | 'dots' (all but products with weights) | 'full'.
      'remat': 'none',
      # One loop over the layers, whose parameters the state holds stacked:
      # programs do not grow with their number, and fsdp gathers the model's
      # dtype.
      'scan_layers': False,
      # The reference policy waits in the hosts' memory; brought for scoring.
      'offload_reference': False,
  })
  # One axis may be -1, what is left of the devices.
  config.mesh = ml_collections.ConfigDict({
      'data': 1,  # copies of the model; a multiple of the TPU slices
      'fsdp': -1,  # cuts the batch and the parameters
      'sequence': 1,  # cuts the slots of a row, for long completions
      'tensor': 1,  # cuts each layer
  })
  config.eval = ml_collections.ConfigDict({
      'num_samples': 1,  # completions a problem
      'batch_size': 64,  # problems sampled together
      'temperature': 1.0,  # 0 is greedy
      'max_completion_length': 0,  # tokens; 0 = the rollout's
      'num_examples': 256,  # problems at most
      # Overrides of `task` that give the held-out problems; {} = the task's
      # last `num_examples`, which are then not trained on.
      'task': {},
  })
  # Overrides, one set a stage: {'name': …, 'reward.stage': …}; () = one stage.
  config.stages = ()
  # In steps; the last step of a stage always counts.
  config.log_every = 1
  config.samples_every = 10
  config.eval_every = 20
  config.checkpoint_every = 50
  # A mistyped key is an error, in files that start from this one too.
  return config.lock()
