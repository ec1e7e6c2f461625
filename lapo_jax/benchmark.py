# SPDX-License-Identifier: Apache-2.0
"""Evaluates a model folder on benchmarks: samples, grades, scores.

`prepare` checks everything and claims the folder, `run` does the work. Work
is cut into chunks, one batch of problems and one round of samples; a graded
chunk is a line of chunks.jsonl. A completion is a function of (parameters,
seed, benchmark, problem, sample number), so an evaluation that was killed
goes on and ends with the same scores.
"""

from collections.abc import Callable
import json
import math
import pathlib
import time
from typing import Any, NamedTuple
import zlib

from absl import logging
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from lapo_jax import (
    build,
    checks,
    eval_folder,
    hosts,
    keywords,
    metrics,
    plugins,
    programs,
    protocol,
    rollout,
    sampling,
    scores,
    sharding,
    types,
    wording,
)
from lapo_jax import tokenizer as tokenizer_lib
from lapo_jax import workdir as workdir_lib
from lapo_jax.models import _folders

# Prompts are padded to this many slots times a power of two, at most to
# `max_prompt_length`: few programs are compiled.
_PROMPT_SLOTS = 256
# Keys in which a resumed evaluation may differ: they decide no completion,
# `data` because the problems themselves are compared.
_FREE_KEYS = ('mesh', 'grader', 'batch_size', 'group_size', 'num_slots',
              'cache_share', 'base_run', 'data')
# Of the scores, those that a stated budget may move.
_MOVED = ('problems', 'completions', 'pass_at_1', 'standard_error',
          'mean_tokens', 'truncated')


class Evaluation(NamedTuple):
  """All that `run` needs, checked."""

  config: ml_collections.ConfigDict
  workdir: pathlib.Path
  passes: list[protocol.Pass]
  chunks: list[protocol.Chunk]
  group_size: int
  tokenizer: tokenizer_lib.Tokenizer
  encode: Callable
  sample: Callable
  load_params: Callable
  problems: dict[str, str]
  base: dict[str, Any] | None
  log: eval_folder.Log | None


def benchmark(config: ml_collections.ConfigDict,
              workdir: str) -> dict[str, Any]:
  """Evaluates, or does what is left: eval.json, eval.png and a table.

  Args:
    config: see configs/benchmarks.py.
    workdir: the evaluation's folder.

  Returns:
    What eval.json holds; on processes other than 0 nothing, {}.

  Raises:
    ValueError: a setting that does not fit, or a folder of another
      evaluation; nothing has been computed or written.
    hosts.Stopped: one of several hosts was sent SIGTERM.
  """
  return run(prepare(config, workdir))


def prepare(config: ml_collections.ConfigDict, workdir: str) -> Evaluation:
  """Checks, builds, and makes the folder this evaluation's own.

  Raises:
    ValueError: as `benchmark`.
  """
  hosts.compare_start(config.to_json(sort_keys=True))
  mesh = sharding.make_mesh(**config.mesh)
  _check(config, sharding.batch_devices(mesh))
  # Model and text.
  rows, everywhere = sharding.batch(mesh), sharding.replicated(mesh)
  places = types.Prompts(tokens=rows, mask=rows, index=everywhere,
                         target_lengths=everywhere)
  settings = config.model.to_dict()
  family = plugins.module('models', settings.pop('name'))
  model = plugins.make('models', config.model.name, **settings)
  param_places = sharding.for_sampling(sharding.partition(
      family.PARTITION_RULES, family.init_shapes(model), mesh))
  tokenizer = tokenizer_lib.load(_folders.resolve(config.model.path))
  checks.tokens(tokenizer, model.vocab_size)
  encode = _few_shapes(
      rollout.make_encode_fn(tokenizer, config.template,
                             config.max_prompt_length, places),
      config.max_prompt_length, tokenizer.pad_id, places)

  # What is asked, in chunks.
  passes = protocol.passes(
      config.benchmarks.to_dict(), conflict=dict(config.conflict),
      grader=dict(config.grader), **{key: config[key] for key in (
          'data', 'num_samples', 'num_problems', 'seed')})
  group_size = math.gcd(config.group_size, *(p.num_samples for p in passes))
  evaluation = Evaluation(
      config=config, workdir=pathlib.Path(workdir).absolute(), passes=passes,
      chunks=[chunk for work in passes for chunk in protocol.chunks(
          work, config.batch_size, group_size)],
      group_size=group_size, tokenizer=tokenizer, encode=encode,
      sample=sampling.make_sample_fn(
          model, group_size=group_size, eos_ids=tokenizer.eos_ids,
          max_completion_length=config.max_completion_length,
          num_slots=programs.num_slots(
              config, model, mesh, cap=config.max_completion_length,
              asked=config.batch_size * group_size),
          cache_dtype=config.cache_dtype, pad_id=tokenizer.pad_id,
          shardings=(param_places, places, rows)),
      load_params=lambda: family.load(config.model.path, model, param_places),
      problems={p.name: p.fingerprint() for p in passes if not p.budget},
      base=None, log=None)
  for chunk in evaluation.chunks:  # a prompt that does not fit is found now
    if not chunk.first:
      _prompts(evaluation, chunk)
  base = eval_folder.read_base(config.base_run, evaluation.problems,
                               config.max_completion_length)
  workdir_lib.claim(
      evaluation.workdir,
      {'config.json': json.loads(config.to_json()),
       'data.json': evaluation.problems,
       'model.json': {'fingerprint': _folders.fingerprint(config.model.path)}},
      _FREE_KEYS)
  return evaluation._replace(base=base,
                             log=eval_folder.Log(evaluation.workdir))


def run(evaluation: Evaluation) -> dict[str, Any]:
  """Samples and grades what is left, then scores; see `benchmark`."""
  log, chunks = evaluation.log, evaluation.chunks
  done = log.done([(chunk.work.key, chunk.problems, range(
      chunk.first, chunk.first + evaluation.group_size)) for chunk in chunks])
  bar = wording.progress(len(chunks), int(done.sum()), 'eval')
  params, left = None, int((~done).sum())
  for work in evaluation.passes:
    with work.grader:
      for chunk, old in zip(chunks, done, strict=True):
        if chunk.work.key != work.key or old:
          continue
        if params is None:
          work.grader.start()
          params = evaluation.load_params()
        log.append(work.key, *_sample_and_grade(evaluation, params, chunk))
        bar.update()
        left -= 1
        if hosts.asked_to_stop(len(chunks) - left) and left:
          raise hosts.Stopped(
              f'asked to end with {left} of {len(chunks)} chunks left: the '
              'same command, on all hosts again, goes on from there.')
    if jax.process_index() == 0:
      rows = log.rows(work.key, work.problems, work.num_samples)
      logging.info('%s', scores.line(work.label, scores.of_rows(rows)))
  bar.close()
  if jax.process_index() != 0:
    return {}
  found = _found(evaluation, log)
  scores.draw(found, evaluation.workdir / 'eval.png')
  text = metrics.to_json(found, indent=2)
  metrics.replace_text(evaluation.workdir / 'eval.json', text)
  print(scores.table(found))
  print(f'Written: {evaluation.workdir / "eval.json"} and eval.png')
  return json.loads(text)


def _sample_and_grade(
    evaluation: Evaluation, params: Any, chunk: protocol.Chunk,
) -> tuple[list[scores.Row], tuple[float, float]]:
  """The rows of a chunk, and the seconds of sampling and grading."""
  config, size = evaluation.config, evaluation.group_size
  started = time.monotonic()
  examples, prompts = _prompts(evaluation, chunk)
  problems = np.repeat(np.asarray(prompts.index), size)
  numbers = np.tile(chunk.first + np.arange(size), len(examples))
  root = jax.random.fold_in(build.key(config.seed, 'eval', 0),
                            zlib.crc32(chunk.work.name.encode()))
  keys = jax.vmap(lambda problem, number: jax.random.fold_in(
      jax.random.fold_in(root, problem), number))(problems, numbers)
  samples = jax.block_until_ready(evaluation.sample(
      params, prompts, keys, np.float32(config.temperature), config.top_p,
      config.top_k))
  sampled = time.monotonic()
  graded = rollout.grade(samples, prompts, examples, chunk.work.grader,
                         evaluation.tokenizer)
  # Text stays on its host, numbers go everywhere.
  local = np.array([[scores.VERDICTS.index(verdict),
                     *keywords.count(text).values()] for verdict, text in
                    zip(graded.verdicts, graded.texts, strict=True)], np.int32)
  read = sharding.from_hosts(graded.rows, local, len(problems))
  correct, tokens = (np.ravel(x).tolist() for x in (graded.outcomes.correct,
                                                    graded.outcomes.lengths))
  real = len(chunk.problems) * size  # without what filled the batch
  rows = [scores.Row(int(problems[b]), int(numbers[b]), correct[b], tokens[b],
                     scores.VERDICTS[read[b, 0]], tuple(read[b, 1:].tolist()))
          for b in range(real)]
  return rows, (sampled - started, time.monotonic() - sampled)


def _prompts(evaluation: Evaluation, chunk: protocol.Chunk
             ) -> tuple[list[types.Example], types.Prompts]:
  """A chunk's problems, filled up to a whole batch, and their prompts."""
  indices = np.resize(chunk.problems, evaluation.config.batch_size)
  examples = [chunk.work.example(int(index)) for index in indices]
  try:
    return examples, evaluation.encode(examples, indices)
  except ValueError as error:
    raise ValueError(f'benchmark {chunk.work.name!r}: {error}') from error


def _few_shapes(encode: Callable, most: int, pad_id: int,
                places: Any) -> Callable:
  """The same encoding, padded on to one of few numbers of slots."""
  def pad(prompts, more):
    widen = lambda x, value: jnp.pad(x, ((0, 0), (more, 0)),
                                     constant_values=value)
    return prompts.replace(tokens=widen(prompts.tokens, pad_id),
                           mask=widen(prompts.mask, False))

  pad = jax.jit(pad, static_argnums=1, out_shardings=places)

  def encode_wide(examples, indices):
    prompts = encode(examples, indices)
    slots, wanted = prompts.tokens.shape[1], _PROMPT_SLOTS
    while wanted < slots:
      wanted *= 2
    wanted = min(wanted, most)
    return pad(prompts, wanted - slots) if wanted > slots else prompts

  return encode_wide


def _found(evaluation: Evaluation, log: eval_folder.Log) -> dict[str, Any]:
  """What eval.json holds."""
  config = evaluation.config
  found = {'model': config.model.path, **{key: config[key] for key in (
      'max_completion_length', 'temperature', 'top_p', 'top_k', 'seed')},
           'benchmarks': {}, 'conflict': {}}
  for work in evaluation.passes:
    rows = log.rows(work.key, work.problems, work.num_samples)
    if not work.budget:
      # Whole levels: AIME's are means of votes, such as 5.125.
      levels = {int(i): work.task[int(i)].level.partition('.')[0]
                for i in work.problems}
      found['benchmarks'][work.name] = {
          'data': evaluation.problems[work.name],
          **scores.of_rows(rows, levels)}
      continue
    if not found['conflict']:  # the same samples, nothing stated
      plain = log.rows((work.name, 0), work.problems, work.num_samples)
      found['conflict'] = {'benchmark': work.name, 'budgets': {
          'none': _moved(plain)}}
    found['conflict']['budgets'][str(work.budget)] = _moved(rows)
  found['average'] = scores.average(found['benchmarks'])
  found['base'] = (scores.against(found, evaluation.base)
                   if evaluation.base else None)
  found['seconds'] = {work.label: log.seconds(work.key)
                      for work in evaluation.passes}
  return found


def _moved(rows: list[scores.Row]) -> dict[str, Any]:
  found = scores.of_rows(rows)
  return {name: found[name] for name in _MOVED}


def _check(config: ml_collections.ConfigDict, parts: int) -> None:
  """Checks numbers before a file is read."""
  for key, least in (('batch_size', 1), ('group_size', 1),
                     ('max_prompt_length', 1), ('max_completion_length', 1),
                     ('num_samples', 0), ('num_problems', 0), ('top_k', 0),
                     ('temperature', 0), ('num_slots', 0), ('seed', 0),
                     ('conflict.num_problems', 0),
                     ('conflict.num_samples', 1)):
    if not config[key] >= least:
      raise ValueError(f'{key} {config[key]}: expected at least {least}.')
  if config.seed >= 2**32:
    raise ValueError(f'seed {config.seed}: expected less than 2**32.')
  if not 0 < config.top_p <= 1:
    raise ValueError(f'top_p {config.top_p}: expected more than 0 and at most '
                     '1, which is all tokens.')
  if not 0 < config.cache_share < 1:
    raise ValueError(f'cache_share {config.cache_share}: expected a share of '
                     'the memory, such as 0.5.')
  if config.cache_dtype not in checks.CACHE_DTYPES:
    raise ValueError(f'cache_dtype {config.cache_dtype!r}: expected one of '
                     f'{checks.CACHE_DTYPES}.')
  if config.batch_size % parts:
    near = max(parts, config.batch_size // parts * parts)
    raise ValueError(f'batch_size {config.batch_size} does not divide by the '
                     f'{parts} devices that share a batch: expected a '
                     f'multiple of {parts}, such as {near}.')
