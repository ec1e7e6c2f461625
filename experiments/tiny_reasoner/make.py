# SPDX-License-Identifier: Apache-2.0
"""Makes the embedded model: a tokenizer, random weights, a warm start.

  python experiments/tiny_reasoner/make.py --out=lapo_jax/assets/tiny_reasoner

Two CPU cores, about 20 minutes; the README beside this file says what came
out. Everything is a function of --seed.
"""

import argparse
from collections.abc import Iterator
import itertools
import json
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers
import traces
import transformers

from lapo_jax import supervised
from lapo_jax import tokenizer as tokenizer_lib
from lapo_jax.models import qwen2
from lapo_jax.tasks import arithmetic

TEMPLATE = 'User: {question} Assistant: <think>'
_VOCAB_SIZE = 320
_EOS, _PAD = '<|endoftext|>', '<|pad|>'
# Traces of each level: more of the skills that take longer to learn.
_LEVEL_WEIGHTS = np.array([0.7, 1.5, 2.0, 2.0, 2.5, 3.0])
# The skills come first, in traces without re-checks or budgets, which teach
# the same with fewer tokens; then the habits of the mixture.
_SKILLS = traces.Mixture(styles=(0.3, 0.7, 0.0), budgets=0.0)
_HABITS = traces.Mixture()
# Cycles of (peak learning rate, ((steps, traces), …)): the rate warms up and
# falls to 0 once a cycle.
_CYCLES = ((2e-3, ((5000, _SKILLS), (1800, _HABITS))),
           (1.5e-3, ((2400, _HABITS),)))
_BUCKETS = (32, 40, 48, 64, 80, 96, 128, 192, 288)
_BATCH_TOKENS = 4096
# Learned tokens of a typical batch: the loss is then about nats a token.
_LEARNED_TOKENS = 2400
# Traces that are sorted by length together.
_POOL = 4096


def make_tokenizer(folder: pathlib.Path) -> tokenizer_lib.Tokenizer:
  """Byte-level pairs learned from traces; each digit stands alone."""
  tokenizer = tokenizers.Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
      pre_tokenizers.Split(tokenizers.Regex(r'\p{N}'), 'isolated'),
      pre_tokenizers.ByteLevel(add_prefix_space=False),
  ])
  tokenizer.decoder = decoders.ByteLevel()
  task = arithmetic.make(num_examples=3000)
  rng = np.random.default_rng(0)
  corpus = []
  for i in range(len(task)):
    prefill, completion = traces.trace(task.problem(i), rng, len,
                                       traces.Mixture())
    prompt = TEMPLATE.replace('{question}', task[i].question)
    corpus.append(prompt + prefill + completion)
  think = [tokenizers.AddedToken(t, normalized=False, special=False)
           for t in ('<think>', '</think>')]
  tokenizer.train_from_iterator(corpus, trainers.BpeTrainer(
      vocab_size=_VOCAB_SIZE - len(think), show_progress=False,
      special_tokens=[_EOS, _PAD],
      initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
  tokenizer.add_tokens(think)
  transformers.PreTrainedTokenizerFast(
      tokenizer_object=tokenizer, eos_token=_EOS, pad_token=_PAD,
      clean_up_tokenization_spaces=False).save_pretrained(folder)
  (folder / 'generation_config.json').write_text(json.dumps({
      'eos_token_id': tokenizer.token_to_id(_EOS),
      'pad_token_id': tokenizer.token_to_id(_PAD),
      'do_sample': True, 'temperature': 1.0}, indent=2) + '\n')
  return tokenizer_lib.load(folder)


def draw(tokenizer: tokenizer_lib.Tokenizer, size: int,
         rng: np.random.Generator,
         mixture: traces.Mixture) -> list[tuple[list[int], int]]:
  """`size` traces as (tokens, number of tokens that are given)."""
  task = arithmetic.make(num_examples=2**40, seed=int(rng.integers(2**31)))
  levels = rng.choice(len(_LEVEL_WEIGHTS), size,
                      p=_LEVEL_WEIGHTS / _LEVEL_WEIGHTS.sum())
  count = lambda text: len(tokenizer.encode([text])[0])
  prompts, completions = [], []
  for row, level in enumerate(levels):
    problem = task.problem(row * len(_LEVEL_WEIGHTS) + int(level))
    prefill, completion = traces.trace(problem, rng, count, mixture)
    prompts.append(TEMPLATE.replace('{question}', problem.question) + prefill)
    completions.append(completion)
  return [(given + learned + [tokenizer.eos_ids[0]], len(given))
          for given, learned in zip(tokenizer.encode(prompts),
                                    tokenizer.encode(completions),
                                    strict=True)]


def batches(tokenizer: tokenizer_lib.Tokenizer, rng: np.random.Generator,
            mixture: traces.Mixture) -> Iterator[dict[str, np.ndarray]]:
  """Batches of about equal tokens, rows of about equal length; no end."""
  while True:
    rows = sorted(draw(tokenizer, _POOL, rng, mixture), key=lambda r: len(r[0]))
    cut = []
    while rows:
      bucket = min(b for b in _BUCKETS if b >= len(rows[-1][0]))
      cut.append((rows[-(_BATCH_TOKENS // bucket):], bucket))
      rows = rows[:-(_BATCH_TOKENS // bucket)]
    for i in rng.permutation(len(cut)):
      yield _pad(*cut[i], tokenizer.pad_id, mixture)


def _pad(rows, bucket: int, pad_id: int,
         mixture: traces.Mixture) -> dict[str, np.ndarray]:
  shape = (_BATCH_TOKENS // bucket, bucket)
  tokens = np.full(shape, pad_id, np.int32)
  mask, learned = np.zeros(shape, bool), np.zeros(shape, bool)
  for i, (row, given) in enumerate(rows):
    tokens[i, :len(row)] = row
    mask[i, :len(row)] = True
    learned[i, given:len(row)] = True
  # Habits are shares of styles: no token may weigh more for the length of its
  # batch's rows. Skills have no shares to keep, and there it helps.
  count = learned.sum() if mixture is _SKILLS else _LEARNED_TOKENS
  return {'tokens': tokens, 'mask': mask,
          'weights': (learned / count).astype(np.float32)}


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--out', type=pathlib.Path, required=True)
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--first_cycle', type=int, default=0,
                      help='goes on from the folder after this many cycles')
  flags = parser.parse_args()

  flags.out.mkdir(parents=True, exist_ok=True)
  tokenizer = make_tokenizer(flags.out)
  model = qwen2.Model(vocab_size=_VOCAB_SIZE, width=128, num_layers=4,
                      num_heads=4, num_kv_heads=2, mlp_width=384,
                      rope_theta=10000.0, max_positions=4096)
  params = qwen2.init_params(model, jax.random.key(flags.seed))
  size = sum(x.size for x in jax.tree.leaves(params))
  print(f'{size / 1e6:.2f} M parameters, {tokenizer.vocab_size} tokens')
  if flags.first_cycle:
    params = jax.device_put(qwen2.load(str(flags.out), model))
  for cycle, (learning_rate, phases) in enumerate(_CYCLES):
    if cycle < flags.first_cycle:
      continue
    streams = [
        itertools.islice(batches(tokenizer, np.random.default_rng(
            (flags.seed, 10 * cycle + phase)), mixture), steps)
        for phase, (steps, mixture) in enumerate(phases)]
    params = train(model, params, itertools.chain(*streams),
                   sum(steps for steps, _ in phases), learning_rate)
    qwen2.save(params, flags.out, model, eos_token_id=tokenizer.eos_ids[0],
               pad_token_id=tokenizer.pad_id,
               bos_token_id=tokenizer.eos_ids[0])


def train(model: qwen2.Model, params: Any,
          stream: Iterator[dict[str, np.ndarray]], steps: int,
          learning_rate: float) -> Any:
  """The parameters after `steps` batches."""
  schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, 200, steps,
                                                0.0)
  optimizer = optax.chain(optax.clip_by_global_norm(1.0),
                          optax.adamw(schedule, b2=0.98, weight_decay=0.01))
  opt_state = optimizer.init(params)
  step_fn = supervised.make_supervised_fn(model, optimizer)
  start, seen, losses = time.time(), 0, []
  for step, batch in enumerate(stream, 1):
    seen += int(batch['mask'].sum())
    params, opt_state, loss = step_fn(params, opt_state,
                                      jax.tree.map(jnp.asarray, batch))
    losses.append(loss / batch['weights'].sum())
    if step % 200 == 0:
      loss = float(np.mean([float(x) for x in losses[-200:]]))
      print(f'step {step} loss {loss:.4f} tokens {seen / 1e6:.1f} M '
            f'{time.time() - start:.0f} s', flush=True)
  return params


if __name__ == '__main__':
  main()
