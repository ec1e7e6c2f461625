# SPDX-License-Identifier: Apache-2.0
"""LAPO's evaluation: MATH-500, AIME24, AMC23 and OlympiadBench.

  python -m lapo_jax.main --mode=eval --config=configs/benchmarks.py \
    --config.model.path=<folder> --config.data=<folder> --workdir=runs/eval

Problems are sampled `batch_size` at a time, in as many decode slots as memory
holds at the cap: a slot whose completion ends takes the next. The whole
protocol is 6,932 completions; its time has not been measured by us.

The argument picks benchmarks, `configs/benchmarks.py:aime24,amc23`, and the
model's family, `:model=qwen3`. `--config.base_run=runs/base` compares with
another evaluation of the same problems.
"""

import ml_collections

from configs import default
from lapo_jax import plugins

# Samples as in the paper (arXiv 2507.15758, section 4); the files are the
# publishers', in the folder `data`.
_BENCHMARKS = {
    'math500': ('math500.json', 4),
    'aime24': ('aime24.json', 32),
    'amc23': ('amc23.jsonl', 32),
    'olympiad_bench': ('olympiad_bench.json', 4),
}


def get_config(argument=''):
  """The evaluation's config.

  Args:
    argument: comma-separated names of benchmarks, all if none is named, and
      `model=family`.
  """
  family, names = 'qwen2', []
  for part in filter(None, argument.split(',')):
    section, _, name = part.rpartition('=')
    if section == 'model':
      family = name
    elif not section and name in _BENCHMARKS:
      names.append(name)
    else:
      raise ValueError(f'config argument {part!r}: expected model=family or '
                       f'one of {sorted(_BENCHMARKS)}.')

  config = ml_collections.ConfigDict()
  config.seed = 0
  config.model = {'name': family, **plugins.defaults('models', family)}
  # The folder of the model, to be set: in the Hugging Face layout.
  config.model.update(path='', dtype='bfloat16', param_dtype='bfloat16')
  config.data = 'data'  # folder of the benchmarks' files
  config.base_run = ''  # folder of the evaluation to compare with, '' = none
  config.benchmarks = ml_collections.ConfigDict({
      # `thinking`: the prompt opens <think>, as this template does.
      name: {'task': 'math', 'settings': {'path': file, 'thinking': True},
             'num_samples': samples}
      for name, (file, samples) in _BENCHMARKS.items()
      if not names or name in names})
  config.num_samples = 0  # completions a problem, 0 = each benchmark's own
  config.num_problems = 0  # of each benchmark, chosen by the seed; 0 = all
  # 'chat' for the tokenizer's own template, else a text with {question}.
  config.template = default.LAPO_TEMPLATE
  config.max_prompt_length = 2048  # tokens; a longer prompt is an error
  config.max_completion_length = 32768  # tokens; what reaches it is truncated
  config.temperature = 0.6  # 0 is greedy
  config.top_p = 0.95  # 1 = all tokens
  config.top_k = 0  # 0 = all tokens
  config.batch_size = 64  # problems sampled together
  config.group_size = 4  # of each of them, completions together, at most
  # Completions that are decoded at once, on all devices together; 0 = as many
  # as `cache_share` of each device's memory holds at full length.
  config.num_slots = 0
  config.cache_share = 0.5
  # Of keys and values: '' = the model's | 'int8', see configs/default.py.
  config.cache_dtype = ''
  config.grader = ml_collections.ConfigDict({
      'num_workers': 1,
      'deadline': 5.0,  # seconds a completion
  })
  config.mesh = ml_collections.ConfigDict({'data': -1, 'fsdp': 1, 'tensor': 1})
  # The same problems told a budget that does not fit them, e.g. (500, 3500):
  # a model that has internalised its length hardly moves. () = not asked.
  config.conflict = ml_collections.ConfigDict({
      'budgets': (),
      'benchmark': 'math500',
      'num_problems': 100,
      'num_samples': 4,  # at most those of the benchmark
  })
  return config
