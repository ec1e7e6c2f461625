# SPDX-License-Identifier: Apache-2.0
"""Where text is: choose problems, encode prompts, grade completions.

All of it runs on the host. Every host chooses and encodes the same prompts;
each decodes and grades the completions that its own devices hold, and the
grades are gathered: text stays where it is, numbers go everywhere.
"""

from collections.abc import Callable, Sequence
from concurrent import futures
import math
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from lapo_jax import grader as grader_lib
from lapo_jax import hosts, ops, sharding, types
from lapo_jax import tokenizer as tokenizer_lib

# Tells this stream of random numbers from others of the same seed.
_ORDER = 1


class Graded(NamedTuple):
  """What grading found.

  Attributes:
    outcomes: Outcomes of host arrays.
    rows: the completions that this host decoded, as numbers b.
    texts: their texts.
    verdicts: their verdicts, see `grader.VERDICTS`, or 'truncated'.
    results: their grades by name.
  """

  outcomes: types.Outcomes
  rows: np.ndarray
  texts: list[str]
  verdicts: list[str]
  results: list[dict[str, float]]


def choose(num_examples: int, num_prompts: int, step: int, seed: int,
           turn: int = 0, drawn: Sequence[int] | np.ndarray = ()) -> np.ndarray:
  """The problems of a step, int64 [P]; a function of its arguments alone.

  Each epoch is one permutation; its last N mod P problems are left out, so
  that no problem comes twice in a step. A later turn of a step draws from a
  permutation of its own what has not been `drawn`; none if fewer than P are
  left.
  """
  if turn:
    left = np.setdiff1d(np.arange(num_examples), drawn)
    rng = np.random.default_rng((seed, _ORDER, step, turn))
    return rng.permutation(left)[:num_prompts * (len(left) >= num_prompts)]
  steps_per_epoch = num_examples // num_prompts
  epoch, place = divmod(step, steps_per_epoch)
  order = np.random.default_rng((seed, _ORDER, epoch)).permutation(num_examples)
  return order[place * num_prompts:(place + 1) * num_prompts]


def cap(step: int, most: int, *, least: int, steps: int) -> int:
  """The cap on generation at a step, tokens; SIRI's cycle.

  L(t) = (most + least)/2 + (most − least)/2 · cos(2π t / steps)

  https://arxiv.org/abs/2509.25176

  Args:
    step: t.
    most: tokens at the start of a cycle.
    least: tokens in its middle; 0 = always the most.
    steps: of a cycle.
  """
  if not least:
    return most
  return round((most + least) / 2 + (most - least) / 2 *
               math.cos(2 * math.pi * step / steps))


def make_encode_fn(tokenizer: tokenizer_lib.Tokenizer, template: str,
                   max_prompt_length: int, shardings: Any) -> Callable:
  """`(examples, indices) -> Prompts`, left-padded to a bucketed length.

  Args:
    tokenizer: the model's.
    template: 'chat' for the tokenizer's own chat template, else a text with
      {question} in it.
    max_prompt_length: prompt slots in tokens; a longer prompt is an error,
      never cut.
    shardings: of `types.Prompts`.

  Raises:
    ValueError: a template without {question}; on a call, a prompt that does
      not fit.
  """
  if template != 'chat' and '{question}' not in template:
    raise ValueError(f'rollout.template {template!r}: expected "chat" or a '
                     'text with {question} in it.')

  def text(example: types.Example) -> str:
    # A plain replacement: a format string would read the question's braces.
    prompt = (tokenizer.chat(example.question) if template == 'chat' else
              template.replace('{question}', example.question))
    return prompt + example.prefill

  def encode(examples: Sequence[types.Example],
             indices: Sequence[int] | np.ndarray) -> types.Prompts:
    rows = tokenizer.encode([text(example) for example in examples])
    longest = max(range(len(rows)), key=lambda i: len(rows[i]))
    if len(rows[longest]) > max_prompt_length:
      raise ValueError(
          f'the prompt of problem {indices[longest]} has {len(rows[longest])} '
          f'tokens, the slots hold {max_prompt_length}: raise '
          'rollout.max_prompt_length or leave the problem out.')
    slots = ops.bucket(len(rows[longest]), max_prompt_length)
    tokens = np.full((len(rows), slots), tokenizer.pad_id, np.int32)
    mask = np.zeros(tokens.shape, bool)
    for i, row in enumerate(rows):
      tokens[i, slots - len(row):] = row
      mask[i, slots - len(row):] = True
    return sharding.to_global(types.Prompts(
        tokens=tokens, mask=mask, index=np.asarray(indices, np.int32),
        target_lengths=np.array([e.target_length for e in examples],
                                np.int32)), shardings)

  return encode


class Ahead:
  """Grades completions that have ended while others are still sampled.

    with Ahead(grader, tokenizer, examples, group_size) as ahead:
      samples = sample(…, watch=ahead.watch)
      graded = grade(samples, …, ahead=ahead)
  """

  def __init__(self, grader: grader_lib.Grader,
               tokenizer: tokenizer_lib.Tokenizer,
               examples: Sequence[types.Example], group_size: int):
    self._grader, self._tokenizer = grader, tokenizer
    self._examples, self._group_size = examples, group_size
    # One thread: a grader takes one call at a time.
    self._thread = futures.ThreadPoolExecutor(1)
    self._parts = []

  def __enter__(self) -> 'Ahead':
    return self

  def __exit__(self, *error: Any) -> None:
    self._thread.shutdown(cancel_futures=True)

  def watch(self, progress: Any) -> None:
    """For the sampler: hands what has ended to the grader, waits for none."""
    if len(progress.finished):
      rows, tokens, lengths = progress.read()
      self._parts.append(self._thread.submit(self._grade, rows, tokens,
                                             lengths))

  def results(self) -> dict[int, dict[str, Any]]:
    """What was found, by row; waits for what is under way."""
    return {row: result for part in self._parts
            for row, result in part.result()}

  def _grade(self, rows, tokens, lengths):
    texts = _texts(self._tokenizer, tokens, lengths)
    examples = [self._examples[b // self._group_size] for b in rows]
    found = self._grader.grade(texts, examples, whole=False)
    return list(zip(rows.tolist(), found, strict=True))


def grade(samples: types.Rollout, prompts: types.Prompts,
          examples: Sequence[types.Example], grader: grader_lib.Grader,
          tokenizer: tokenizer_lib.Tokenizer,
          ahead: Ahead | None = None) -> Graded:
  """Grades a rollout against its examples, one example per group.

  A truncated completion is wrong, whatever its text says. What was graded
  `ahead` is not graded again.
  """
  num_rows = samples.completion_tokens.shape[0]
  group_size = num_rows // len(examples)
  rows, tokens = sharding.local_rows(samples.completion_tokens)
  _, masks = sharding.local_rows(samples.completion_mask)
  lengths = masks.sum(axis=1)
  last = tokens[np.arange(len(rows)), np.maximum(lengths - 1, 0)]
  truncated = ~np.isin(last, tokenizer.eos_ids)

  texts = _texts(tokenizer, tokens, lengths)
  known = ahead.results() if ahead else {}
  left = [i for i, b in enumerate(rows) if b not in known]
  found = grader.grade([texts[i] for i in left],
                       [examples[rows[i] // group_size] for i in left],
                       whole=not known)
  in_parts = bool(known)
  known |= zip(rows[left].tolist(), found, strict=True)
  if in_parts:
    grader.check([result['verdict'] for result in known.values()])
  zeros = dict.fromkeys((name for r in known.values() for name in r), 0.0)
  results = [zeros | known[b] for b in rows]
  for result, cut in zip(results, truncated.tolist(), strict=True):
    _settle(result, cut)
  return _gathered(prompts, rows, texts, results, lengths, truncated, num_rows)


def regrade(graded: Graded, samples: types.Rollout, prompts: types.Prompts,
            examples: Sequence[types.Example], grader: grader_lib.Grader,
            tokenizer: tokenizer_lib.Tokenizer) -> Graded:
  """Grades again the completions that have been cut since.

  Whether a completion was truncated is about how it was sampled: it stays.
  """
  outcomes, num_rows = graded.outcomes, samples.completion_tokens.shape[0]
  group_size = num_rows // len(examples)
  rows, tokens = sharding.local_rows(samples.completion_tokens)
  _, masks = sharding.local_rows(samples.completion_mask)
  lengths = masks.sum(axis=1)
  local = lambda x: np.asarray(x).reshape(-1)[rows]
  cut = np.flatnonzero(lengths < local(outcomes.lengths))
  texts, results = list(graded.texts), list(graded.results)
  # This host may hold none of them.
  parts = _texts(tokenizer, tokens[cut], lengths[cut]) if len(cut) else []
  found = grader.grade(parts, [examples[rows[i] // group_size] for i in cut])
  for i, text, result in zip(cut, parts, found, strict=True):
    texts[i], results[i] = text, {**dict.fromkeys(results[i], 0.0), **result}
    _settle(results[i], False)
  return _gathered(prompts, rows, texts, results, lengths,
                   local(outcomes.truncated), num_rows)


def _settle(result: dict[str, Any], truncated: bool) -> None:
  """A grade as numbers, but for its verdict; what is truncated is wrong."""
  result['correct'] *= not truncated
  result['timeout'] = float(result['verdict'] == 'timeout')
  result['crash'] = float(result['verdict'] == 'crash')
  if truncated:
    result['verdict'] = 'truncated'


def _gathered(prompts: types.Prompts, rows: np.ndarray, texts: list[str],
              results: list[dict[str, Any]], lengths: np.ndarray,
              truncated: np.ndarray, num_rows: int) -> Graded:
  """The grades of all hosts, from those of this host's rows."""
  # A host all of whose completions crashed has not seen every name.
  names = sorted({name for found in hosts.gather(sorted(results[0]))
                  for name in found} - {'verdict'})
  found = np.array([[r.get(name, 0.0) for name in names] for r in results],
                   np.float32)
  columns = np.concatenate(
      [found, lengths[:, None], truncated[:, None]], axis=1, dtype=np.float32)
  columns = sharding.from_hosts(rows, columns, num_rows)
  group_size = num_rows // prompts.index.shape[0]
  grouped = {name: jnp.asarray(column.reshape(-1, group_size))
             for name, column in zip([*names, 'lengths', 'truncated'],
                                     columns.T, strict=True)}
  outcomes = types.Outcomes(
      correct=grouped.pop('correct'),
      lengths=grouped.pop('lengths').astype(jnp.int32),
      truncated=grouped.pop('truncated') > 0,
      prompt_index=prompts.index, target_lengths=prompts.target_lengths,
      extras=grouped)
  verdicts = [result['verdict'] for result in results]
  return Graded(outcomes, rows, texts, verdicts, results)


def _texts(tokenizer: tokenizer_lib.Tokenizer, tokens: np.ndarray,
           lengths: np.ndarray) -> list[str]:
  return tokenizer.decode([t[:n] for t, n in zip(tokens, lengths,
                                                 strict=True)])
