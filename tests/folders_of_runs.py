# SPDX-License-Identifier: Apache-2.0
"""Folders as runs leave them, made up: for what reads them."""

import json

import numpy as np

LEVELS = tuple('123456')
HOSTILE = '</pre><script>alert(1)</script> $\\bad{$ \u202e\x00 & "quoted"'


def stage(name, steps, accuracy, tokens, levels=LEVELS, truncated=0.0):
  """A stage's record; a level is a little longer than the one before."""
  return {'name': name, 'steps': steps, 'accuracy': accuracy,
          'mean_tokens': tokens, 'truncated': truncated,
          'by_level': {level: {'accuracy': accuracy,
                               'mean_tokens': tokens * (0.8 + 0.1 * i)}
                       for i, level in enumerate(levels)}}


def write(folder, *, seed=0, accuracy=0.9, tokens=40.0, base=(0.8, 70.0),
          steps=6, method='lapo', stages=('lapo',), finished=True,
          config=None, levels=LEVELS):
  """A run's folder: its curves go from the base to what it reached."""
  folder.mkdir(parents=True)
  rng = np.random.default_rng(seed)
  settings = {'seed': seed, 'model': {'name': 'qwen2'},
              'task': {'name': 'arithmetic'}, 'eval': {'task': {}},
              'reward': {'name': method}, **(config or {})}
  (folder / 'config.json').write_text(json.dumps(settings))
  records = [stage('base', 0, *base, levels=levels)]
  for i, name in enumerate(stages, start=1):
    records.append(stage(name, steps * i // len(stages), accuracy, tokens,
                         levels=levels))
  if finished:
    (folder / 'summary.json').write_text(
        json.dumps({'stages': records, 'seconds': 12.5}))
  (folder / 'stages').mkdir()
  for i, record in enumerate(records):
    (folder / 'stages' / f'{i}.json').write_text(json.dumps(record))
  lines = []
  for step in range(steps):
    share = 1 - np.exp(-5 * step / steps)
    mix = lambda start, end: start + share * (end - start)  # noqa: B023
    noise = 1 + 0.05 * rng.standard_normal()
    lines.append({
        'step': step, 'stage': stages[step * len(stages) // steps],
        'reward/total': mix(0.5, 1.2) * noise,
        'length/mean': mix(base[1], tokens) * noise,
        'length/p90': 1.7 * mix(base[1], tokens) * noise,
        'outcome/correct': min(mix(base[0], accuracy) * noise, 1.0),
        'outcome/truncated': 0.01 * (1 - share), 'advantage/zero_groups': 0.5,
        'policy/entropy': mix(0.4, 0.1) * noise, 'policy/kl': None,
        'update/grad_norm': noise, 'time/sample': 2.0, 'time/update': 3.0,
        'time/tokens_per_second': 1000.0})
  lines.append({'step': steps, 'stage': stages[-1],
                'eval/arithmetic/accuracy': accuracy,
                'eval/arithmetic/length': tokens})
  text = '\n'.join(map(json.dumps, lines)) + '\n{"step": 7, "half'
  (folder / 'metrics.jsonl').write_text(text)
  (folder / 'samples.jsonl').write_text(''.join(json.dumps({
      'step': step, 'stage': stages[0], 'prompt': f'prompt {step} {HOSTILE}',
      'completion': HOSTILE, 'gold': '7', 'verdict': 'parsed', 'length': 12,
      'reward': 1.0}) + '\n' for step in range(0, steps)))
  return folder
