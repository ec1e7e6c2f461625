# SPDX-License-Identifier: Apache-2.0
"""Measures what makes the bench fair: waste, and the price of brevity.

  python experiments/tiny_reasoner/measure.py

Samples held-out problems: as the model likes, and with the style forced by
the first token. Prints a table by level; two CPU cores, about a minute.
"""

import argparse

import jax
import make

from lapo_jax import evaluate, rollout, sampling, sharding, types
from lapo_jax import tokenizer as tokenizer_lib
from lapo_jax.models import _folders, qwen2
from lapo_jax.tasks import arithmetic

# What the prompt ends with decides the style.
_STYLES = {'free': '', 'terse': '</think>', 'worked': ' '}
_CAP = 256


class _Forced(evaluate.Part):
  """A task whose completions begin with a given text."""

  def __init__(self, task: types.Task, prefill: str):
    super().__init__(task, range(len(task)))
    self._prefill = prefill

  def __getitem__(self, index: int) -> types.Example:
    return super().__getitem__(index).replace(prefill=self._prefill)

  def grade(self, completion: str, example: types.Example) -> dict[str, float]:
    return super().grade(self._prefill + completion, example)


class _Direct:
  """The grader's interface without its processes: this model is harmless."""

  def __init__(self, task: types.Task):
    self._task = task

  def grade(self, completions, examples, whole=True):
    del whole
    return [{'verdict': '', **self._task.grade(text, example)}
            for text, example in zip(completions, examples, strict=True)]


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--model', default='tiny_reasoner')
  parser.add_argument('--num_examples', type=int, default=3000)
  parser.add_argument('--temperature', type=float, default=1.0)
  flags = parser.parse_args()

  model = qwen2.make(flags.model)
  params = jax.device_put(qwen2.load(flags.model, model))
  tokenizer = tokenizer_lib.load(_folders.resolve(flags.model))
  sample = sampling.make_sample_fn(
      model, group_size=1, max_completion_length=_CAP,
      eos_ids=tokenizer.eos_ids, pad_id=tokenizer.pad_id)
  encode = rollout.make_encode_fn(
      tokenizer, make.TEMPLATE, 64,
      sharding.replicated(sharding.make_mesh(devices=jax.devices()[:1])))
  task = arithmetic.make(split='test', num_examples=flags.num_examples, seed=1)
  found = {}
  for style, prefill in _STYLES.items():
    forced = _Forced(task, prefill)
    found[style] = evaluate.make_evaluate_fn(
        sample, encode, forced, _Direct(forced), tokenizer, batch_size=500,
        temperature=flags.temperature, key=jax.random.key(0))(params)
  print(f'{flags.num_examples} held-out problems, temperature '
        f'{flags.temperature}')
  print('level      ' + ''.join(f'{style:>18}' for style in found))
  rows = [('all', lambda x: x)] + [
      (level, lambda x, level=level: x['by_level'][level])
      for level in found['free']['by_level']]
  for name, pick in rows:
    cells = [pick(x) for x in found.values()]
    print(f'{name:<11}' + ''.join(
        f'{100 * x["accuracy"]:9.1f} % {x["mean_tokens"]:6.1f}'
        for x in cells) + f'   tokens free/terse '
        f'{cells[0]["mean_tokens"] / cells[1]["mean_tokens"]:.1f}')
  print(f'truncated {100 * found["free"]["truncated"]:.2f} %')


if __name__ == '__main__':
  main()
