# SPDX-License-Identifier: Apache-2.0
"""How do the update's time and memory grow with the completion's length?

  python -m experiments.speed.linear [--model=r1]

Two rows of T slots, one at a time, through model a, or through two layers as
wide as those of DeepSeek-R1-Distill-Qwen-1.5B. Beside them the exponents p of
T^p, fitted to the logarithms; attention's products grow with T², the rest
with T.
"""

import argparse
import datetime
import time
from typing import Any

import jax
import numpy as np

from experiments.real_models import cases
from experiments.speed import steps
from experiments.speed.peers import update_ours
from lapo_jax import types
from lapo_jax.models import qwen2

_ROWS = 2
_MODELS = {
    'a': steps.FIELDS,
    'r1': dict(vocab_size=512, width=1536, num_layers=2, num_heads=12,
               num_kv_heads=2, mlp_width=8960),
}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--lengths', default='1024,2048,4096,8192')
  parser.add_argument('--repeats', type=int, default=3)
  parser.add_argument('--model', choices=_MODELS, default='a')
  flags = parser.parse_args()
  jax.config.update('jax_platforms', 'cpu')
  lengths = [int(length) for length in flags.lengths.split(',')]
  fields = _MODELS[flags.model]
  print(f'{datetime.date.today()}, jax {jax.__version__}\n')
  print('| T | seconds | temporary MB | GFLOP with weights | between slots |\n'
        '|---|---|---|---|---|')
  rows = []
  for length in lengths:
    seconds, temporary = measure(fields, length, flags.repeats)
    work = steps.products(completion=length, rows=_ROWS, fields=fields)
    rows.append((seconds, temporary, *work.values()))
    print(f'| {length:,} | {seconds:.2f} | {temporary / 1e6:.0f} | ' +
          ' | '.join(f'{x / 1e9:.0f}' for x in work.values()) + ' |',
          flush=True)
  print('| exponent | ' + ' | '.join(
      f'{exponent(lengths, column):.2f}'
      for column in zip(*rows, strict=True)) + ' |')


def exponent(lengths: Any, numbers: Any) -> float:
  """p of the line log number = p·log length + c, by least squares."""
  return float(np.polyfit(np.log(lengths), np.log(numbers), 1)[0])


def measure(fields: dict[str, Any], length: int,
            repeats: int) -> tuple[float, int]:
  """Median seconds of an update, and bytes beside arguments and results."""
  model = qwen2.Model(**fields)
  state = update_ours.make_state(jax.device_put(cases.make_params(model)))
  update = update_ours.make_update(model, 1)
  batch = _batch(fields['vocab_size'], length)
  temporary = update.lower(state, batch).compile().memory_analysis(
      ).temp_size_in_bytes
  seconds = []
  for _ in range(1 + repeats):
    start = time.perf_counter()
    state, _ = jax.block_until_ready(update(state, batch))
    seconds.append(time.perf_counter() - start)
  return float(np.median(seconds[1:])), temporary


def _batch(vocab_size: int, length: int) -> types.Batch:
  """Random tokens, all trained on, from a policy as it stands."""
  rng = np.random.default_rng(0)
  draw = lambda slots: rng.integers(
      0, vocab_size, (_ROWS, slots)).astype(np.int32)
  real = lambda slots: np.ones((_ROWS, slots), bool)
  return jax.device_put(types.Batch(
      rollout=types.Rollout(
          prompt_tokens=draw(steps.PROMPT), prompt_mask=real(steps.PROMPT),
          completion_tokens=draw(length), completion_mask=real(length),
          action_mask=real(length),
          sampler_logprobs=np.zeros((_ROWS, length), np.float32)),
      advantages=np.array([1.0, -1.0], np.float32), old_logprobs=None,
      ref_logprobs=None,
      weights=np.full((_ROWS, length), 1 / (_ROWS * length), np.float32)))


if __name__ == '__main__':
  main()
