# SPDX-License-Identifier: Apache-2.0
"""The policies of `runs.py` again, on many more held-out problems.

  python experiments/lapo_tiny/held_out.py --workdir=runs/lapo_tiny

What 1,000 problems cannot tell apart: each method against the control, seed by
seed, on the same problems with the same random numbers. LAPO's policies are
asked twice, as they are evaluated (no budget in the prompt) and with the
sentence that they were trained with, n being the median of M(q) over the
training problems of the level. Writes held_out.md to the folder.
"""

import argparse
import pathlib

import jax
import numpy as np
import runs as runs_lib

from configs import tiny
from lapo_jax import build, evaluate, stages, types

_NO_BUDGET, _BUDGET = 'no budget', 'budget'
_CONTROL = 'accuracy only'


class _Budgeted:
  """Held-out problems with the sentence of LAPO's second stage."""

  def __init__(self, task: types.Task, reward: types.Reward,
               targets: dict[str, float]):
    self._task, self._reward, self._targets = task, reward, targets

  def __len__(self) -> int:
    return len(self._task)

  def __getitem__(self, index: int) -> types.Example:
    example = self._task[index]
    memory = dict.fromkeys(('target', 'low', 'high'),
                           [self._targets[example.level]])
    return self._reward.instruct(example, 0, memory, np.random.default_rng(0))

  def grade(self, completion: str, example: types.Example) -> dict[str, float]:
    return self._task.grade(completion, example)


def evaluated(folder: pathlib.Path, argument: str, overrides: dict[str, str],
              num_examples: int) -> dict[str, evaluate.Found]:
  """What the last policy of a run finds, by kind of prompt."""
  config = tiny.get_config(argument)
  config.update_from_flattened_dict(overrides)
  config.eval.task = {'split': 'test', 'num_examples': num_examples, 'seed': 1}
  config.eval.num_examples = num_examples
  runs = [build.build(name, stage)
          for name, stage in build.stage_configs(config)]
  _, state, _ = stages.resume(runs, folder.absolute())
  run = runs[-1]
  end = sum(r.config.total_steps for r in runs)
  if int(state.step) != end:
    raise ValueError(f'{folder} is at step {int(state.step)}, expected {end}: '
                     'run experiments/lapo_tiny/runs.py first.')
  with run.grader:
    found = {_NO_BUDGET: stages.evaluate(run, state.params)}
    if argument != 'accuracy' and not overrides:
      memory = jax.device_get(state.reward_state['target'])
      levels = np.array([run.task[i].level for i in range(len(run.task))])
      targets = {level: float(np.median(memory[levels == level]))
                 for level in set(levels)}
      task = _Budgeted(run.eval_task, run.reward, targets)
      found[_BUDGET] = run.make_evaluate(task)(run.to_sampler(state.params))
  return found


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--workdir', type=pathlib.Path, required=True)
  parser.add_argument('--seeds', type=int, default=3)
  parser.add_argument('--num_examples', type=int, default=6000)
  flags = parser.parse_args()

  found = {}
  for method, seed, argument, overrides in runs_lib.runs(flags.seeds):
    folder = runs_lib.folder(flags.workdir, method, seed)
    for prompt, result in evaluated(folder, argument, overrides,
                                    flags.num_examples).items():
      found.setdefault((method, prompt), []).append(result)

  lines = ['| method | prompt | accuracy % | mean tokens | tokens by level | '
           'accuracy by level |', '|---|---|---|---|---|---|']
  for (method, prompt), results in found.items():
    pick = lambda key, results=results: np.array([r[key] for r in results])
    by_level = lambda key, results=results: np.mean(
        [[part[key] for _, part in sorted(r['by_level'].items())]
         for r in results], axis=0)
    lines.append(
        f'| {method} | {prompt} | {runs_lib.spread(100 * pick("accuracy"))} | '
        f'{runs_lib.spread(pick("mean_tokens"))} | '
        f'{" ".join(f"{x:.0f}" for x in by_level("mean_tokens"))} | '
        f'{" ".join(f"{100 * x:.1f}" for x in by_level("accuracy"))} |')
  accuracy = {method: np.array([r['accuracy'] for r in results])
              for (method, prompt), results in found.items()
              if prompt == _NO_BUDGET}
  lines.append('')
  for method, found_ in accuracy.items():
    if method != _CONTROL:
      gaps = 100 * (found_ - accuracy[_CONTROL])
      lines.append(f'{method} − {_CONTROL}, by seed: '
                   f'{", ".join(f"{gap:+.2f}" for gap in gaps)} points.')
  error = 100 * (0.9 * 0.1 / flags.num_examples)**0.5
  lines.append(f'{flags.num_examples} problems: an accuracy of 90 % has a '
               f'standard error of {error:.2f} points.')
  text = '\n'.join(lines)
  (flags.workdir / 'held_out.md').write_text(text + '\n')
  print(text)


if __name__ == '__main__':
  main()
