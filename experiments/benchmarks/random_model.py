# SPDX-License-Identifier: Apache-2.0
"""Writes a model folder with random weights: an architecture cut to size.

  python experiments/benchmarks/random_model.py --like=r1_1p5b --layers=2 \
    --width=96 --out=runs/random

Heads, biases, untied embeddings, rotary base and norm are those of the model
named; layers and width are smaller, the mlp in proportion. The tokenizer is
that of the embedded model, about a byte a token.
"""

import argparse
import pathlib
import shutil

import jax

from lapo_jax import tokenizer as tokenizer_lib
from lapo_jax.models import _folders, qwen2

# The config.json of DeepSeek-R1-Distill-Qwen-1.5B; DeepScaleR-1.5B-Preview is
# that model trained further.
_R1 = {'num_heads': 12, 'num_kv_heads': 2, 'tied': False, 'qkv_bias': True,
       'rope_theta': 10000.0, 'norm_eps': 1e-6, 'max_positions': 131072}
_R1_SIZES = {'width': 1536, 'mlp_width': 8960, 'num_layers': 28}
LIKE = {'r1_1p5b': (_R1, _R1_SIZES), 'deepscaler_1p5b': (_R1, _R1_SIZES)}


def write(out: pathlib.Path, like: str, layers: int, width: int,
          seed: int) -> int:
  """Writes the folder; returns the number of parameters."""
  settings, sizes = LIKE[like]
  source = _folders.resolve('tiny_reasoner')
  tokenizer = tokenizer_lib.load(source)
  model = qwen2.Model(
      vocab_size=tokenizer.vocab_size, width=width, num_layers=layers,
      mlp_width=round(width * sizes['mlp_width'] / sizes['width'] / 8) * 8,
      **settings)
  params = qwen2.init_params(model, jax.random.key(seed))
  qwen2.save(params, out, model, eos_token_id=tokenizer.eos_ids[0],
             pad_token_id=tokenizer.pad_id, bos_token_id=tokenizer.eos_ids[0])
  for name in ('tokenizer.json', 'tokenizer_config.json',
               'generation_config.json'):
    shutil.copy(source / name, out / name)
  return sum(x.size for x in jax.tree.leaves(params))


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--like', choices=sorted(LIKE), default='r1_1p5b')
  parser.add_argument('--layers', type=int, default=2)
  parser.add_argument('--width', type=int, default=96,
                      help='a multiple of twice the heads')
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--out', type=pathlib.Path, required=True)
  flags = parser.parse_args()
  heads = LIKE[flags.like][0]['num_heads']
  if flags.width % (2 * heads):
    parser.error(f'--width {flags.width}: expected a multiple of {2 * heads}')
  size = write(flags.out, flags.like, flags.layers, flags.width, flags.seed)
  print(f'{flags.out}: {size / 1e3:.0f} thousand parameters')


if __name__ == '__main__':
  main()
