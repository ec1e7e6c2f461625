# SPDX-License-Identifier: Apache-2.0
"""Are our logits those of transformers? A table, and the stored logits.

  python -m experiments.real_models.parity

Writes tests/goldens/logits.json: what transformers says of the last slot of
each row, for machines without torch.
"""

import json
import pathlib
import tempfile

import numpy as np

from experiments.real_models import cases
from lapo_jax import plugins

_GOLDENS = (pathlib.Path(__file__).parents[2] / 'tests' / 'goldens' /
            'logits.json')
_NUM_STORED = 8


def main() -> None:
  print('| model | parameters | largest logit | largest difference |')
  print('|---|---|---|---|')
  stored = {}
  for name, case in cases.CASES.items():
    model, texts = case.model(), case.texts()
    params = cases.make_params(model)
    with tempfile.TemporaryDirectory() as folder:
      plugins.module('models', case.family).save(params, folder, model)
      theirs = cases.transformers_logits(folder, texts)
    ours = cases.logits(model, params, texts)
    mask = texts[1]
    stored[name] = np.round(theirs[:, -1, :_NUM_STORED].astype(float),
                            6).tolist()
    size = sum(x.size for x in _leaves(params))
    print(f'| {name} | {size:,} | {np.abs(theirs[mask]).max():.1f} | '
          f'{np.abs(ours - theirs)[mask].max():.1e} |')
  lines = [f'{json.dumps(name)}: {json.dumps(rows)}'
           for name, rows in stored.items()]
  _GOLDENS.write_text('{\n' + ',\n'.join(lines) + '\n}\n')


def _leaves(tree):
  for value in tree.values():
    yield from _leaves(value) if isinstance(value, dict) else (value,)


if __name__ == '__main__':
  main()
