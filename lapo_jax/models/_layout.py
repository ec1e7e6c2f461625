# SPDX-License-Identifier: Apache-2.0
"""The Hugging Face layout: what files, tensors and numbers are called there."""

from collections.abc import Sequence
import re

import jax.numpy as jnp

INDEX = 'model.safetensors.index.json'
DTYPES = {'F32': jnp.float32, 'BF16': jnp.bfloat16, 'F16': jnp.float16}

# (regex on the Hugging Face name, our path, whether to transpose); the path
# may use the regex's groups. The reverse direction is `to_foreign`.
NameTable = Sequence[tuple[str, str, bool]]

_LAYER = r'model\.layers\.(\d+)\.'
_ATTENTION = (('q', 'query'), ('k', 'key'), ('v', 'value'), ('o', 'out'))
NAMES: NameTable = (
    (r'model\.embed_tokens\.weight', 'embedding', False),
    (r'lm_head\.weight', 'unembedding', True),
    (r'model\.norm\.weight', 'final_norm/scale', False),
    (_LAYER + r'input_layernorm\.weight',
     r'layers_\1/attention_norm/scale', False),
    (_LAYER + r'post_attention_layernorm\.weight',
     r'layers_\1/mlp_norm/scale', False),
    *((_LAYER + rf'self_attn\.{theirs}_proj\.{kind}',
       rf'layers_\1/attention/{ours}/{our_kind}', kind == 'weight')
      for theirs, ours in _ATTENTION
      for kind, our_kind in (('weight', 'kernel'), ('bias', 'bias'))),
    *((_LAYER + rf'self_attn\.{theirs}_norm\.weight',
       rf'layers_\1/attention/{ours}_norm/scale', False)
      for theirs, ours in _ATTENTION[:2]),
    *((_LAYER + rf'mlp\.{name}_proj\.{kind}',
       rf'layers_\1/mlp/{name}/{our_kind}', kind == 'weight')
      for name in ('gate', 'up', 'down')
      for kind, our_kind in (('weight', 'kernel'), ('bias', 'bias'))),
)


def to_ours(name: str, table: NameTable) -> tuple[str | None, bool]:
  """Our path of a Hugging Face name, None = it has none."""
  for pattern, path, transpose in table:
    match = re.fullmatch(pattern, name)
    if match:
      return match.expand(path), transpose
  return None, False


def to_foreign(path: str, table: NameTable) -> tuple[str, bool]:
  """The Hugging Face name of our path: the table read from right to left."""
  for pattern, ours, transpose in table:
    match = re.fullmatch(ours.replace(r'\1', r'(\d+)'), path)
    if match:
      name = pattern.replace(r'(\d+)', r'\1').replace(r'\.', '.')
      return match.expand(name), transpose
  raise ValueError(f'parameter {path} has no name in the family\'s table.')
