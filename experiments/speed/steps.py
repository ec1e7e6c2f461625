# SPDX-License-Identifier: Apache-2.0
"""What is learned from: model a, a batch of completions, one optimizer.

Peers live in environments of their own: nothing here but numpy is imported.
"""

from typing import Any, NamedTuple

import numpy as np

from experiments.speed import points

FIELDS, PROMPT = points.MODELS['a']
NUM_PROMPTS = 32
COMPLETION = 128
# AdamW, constant rate, no decay; a step changes float32 weights by far more
# than their rounding.
LEARNING_RATE = 1e-4
BETAS = (0.9, 0.999)
EPS = 1e-8
CLIP_NORM = 1.0
# Of the ratio, either way.
CLIP = 0.2


class Work(NamedTuple):
  """A batch to be learned from.

  Attributes:
    prompts: int32 [P, L], full: no padding.
    completions: int32 [B, T], full likewise.
    advantages: float32 [B].
    old_logprobs: float32 [B, T], of another policy: ratios are clipped on both
      sides.
    whole: whether a run is a whole step, which samples completions of its own
      and is on-policy; the last three then give shapes alone.
  """

  prompts: np.ndarray
  completions: np.ndarray
  advantages: np.ndarray
  old_logprobs: np.ndarray
  whole: bool

  @property
  def row_prompts(self) -> np.ndarray:
    """int32 [B, L]."""
    return np.repeat(self.prompts, points.GROUP_SIZE, axis=0)


def make_work(whole: bool) -> Work:
  """The batch, with old log-probs yet to be found."""
  rng = np.random.default_rng(0)
  rows, vocabulary = NUM_PROMPTS * points.GROUP_SIZE, FIELDS['vocab_size']
  draw = lambda *shape: rng.integers(0, vocabulary, shape).astype(np.int32)
  return Work(draw(NUM_PROMPTS, PROMPT), draw(rows, COMPLETION),
              rng.normal(size=rows).astype(np.float32),
              np.zeros((rows, COMPLETION), np.float32), whole)


def save(work: Work, path: str) -> None:
  """Writes it for another process."""
  np.savez(path, **work._asdict())


def load(path: str) -> Work:
  """What `save` wrote."""
  with np.load(path) as file:
    found = Work(**{name: file[name] for name in Work._fields})
  return found._replace(whole=bool(found.whole))


def rewards(first_tokens: Any) -> np.ndarray:
  """1 for a completion that begins with an odd token, else 0; float32."""
  return (np.asarray(first_tokens) % 2).astype(np.float32)


def products(prompt: int = PROMPT, completion: int = COMPLETION,
             rows: int = NUM_PROMPTS * points.GROUP_SIZE,
             fields: dict[str, Any] = FIELDS) -> dict[str, float]:
  """Operations of the update's matrix products, forward and back.

  'weights' are those with the weights, logits of completions alone;
  'attention' those between slots as `attention.causal` computes them on a CPU:
  in bands of queries, of all pairs a little more than the mask needs.
  """
  width, layers = fields['width'], fields['num_layers']
  kv_width = width * fields['num_kv_heads'] // fields['num_heads']
  layer = 2 * width * (width + kv_width) + 3 * width * fields['mlp_width']
  slots = prompt + completion
  weights = slots * layers * layer + completion * width * fields['vocab_size']
  bands = min(max(slots // 64, 1), 4)
  ends = [slots * (i + 1) // bands for i in range(bands)]
  pairs = sum((end - start) * end
              for start, end in zip([0, *ends], ends, strict=False))
  return {'weights': 6.0 * rows * weights,
          'attention': 12.0 * rows * layers * pairs * width}
