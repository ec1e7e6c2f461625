# SPDX-License-Identifier: Apache-2.0
"""How fast do we sample, beside others on the same machine?

  python -m experiments.speed.sampler --trl_python=<…> --tunix_python=<…>

The same weights, prompts and lengths for all, float32, on the cores this
process may use. Every peer is a process that stays warm; they run in turn,
peer after peer within each repeat. Before a point is timed, log-probs of what
each peer sampled are compared with our scorer's: beyond 1e-4 nothing is
printed. Linux; the README says which environments it takes.
"""

import argparse
import datetime
import json
import pathlib
import sys
import tempfile
from typing import Any

import jax
import numpy as np

from experiments.real_models import cases
from experiments.speed import machine, points, serving, turns
from lapo_jax import grpo, types
from lapo_jax.models import qwen2

_MOST_DIFFERENCE = 1e-4
_PEERS = ('ours', 'bare', 'reads', 'transformers', 'trl', 'tunix')
# They sample nothing: what there is to compute, and to read.
_FLOORS = ('bare', 'reads')
# Our sampler under twice the cap, the lengths as they are.
_DOUBLED = 'ours, cap doubled'
# On one device, whose operations all cores share.
_ALONE = 'ours, one device'
# The products on as many devices as our sampler.
_SHARED = 'bare, devices'


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--points', default=','.join(points.POINTS))
  parser.add_argument('--peers', default=','.join(_PEERS))
  parser.add_argument('--repeats', type=int, default=5)
  parser.add_argument('--num_slots', type=int, default=0,
                      help='that our sampler decodes at once, 0 = all rows')
  parser.add_argument('--devices', type=int, default=2,
                      help='CPU devices of our sampler, which share the cores')
  parser.add_argument('--trl_python', default=sys.executable)
  parser.add_argument('--tunix_python', default=sys.executable)
  parser.add_argument('--out', help='a JSON file with every repeat')
  flags = parser.parse_args()
  jax.config.update('jax_platforms', 'cpu')
  names = turns.choice('peers', flags.peers, _PEERS)
  report = {
      'command': ' '.join(['python -m experiments.speed.sampler',
                           *sys.argv[1:]]),
      'date': datetime.datetime.now().isoformat(timespec='seconds'),
      'machine': machine.describe(), 'points': {}}
  for name in turns.choice('points', flags.points, points.POINTS):
    found = measure(points.POINTS[name], names, flags)
    report['points'][name] = found
    print(table(name, found), flush=True)
    if flags.out:
      pathlib.Path(flags.out).write_text(json.dumps(report, indent=1) + '\n')


def measure(point: points.Point, names: list[str],
            flags: argparse.Namespace) -> dict[str, Any]:
  """All runs of a point, by peer; the first of each compiles.

  Raises:
    RuntimeError: a peer's log-probs are not ours.
  """
  model = qwen2.Model(**point.fields)
  params = cases.make_params(model)
  work = points.make_work(point, flags.num_slots)
  works = {name: work for name in names}
  shared = points.make_work(point, flags.num_slots, flags.devices)
  if 'ours' in names:
    works |= {'ours': shared, _ALONE: work}
    if point.tail:
      works[_DOUBLED] = shared._replace(cap=2 * work.cap)
  if 'bare' in names:
    works[_SHARED] = shared
  peers = {}
  with tempfile.TemporaryDirectory() as folder:
    qwen2.save(params, folder, model)
    try:
      for name, its_work in works.items():
        file = f'{folder}/{name}.npz'
        points.save(its_work, file)
        module, _, _ = name.partition(',')
        peers[name] = serving.Process(
            getattr(flags, f'{module}_python', sys.executable),
            f'experiments.speed.peers.{module}', folder, file)
      firsts, differences = {}, {}
      for name in peers:
        floor = name.partition(',')[0] in _FLOORS
        file = '' if floor else f'{folder}/compared.npz'
        firsts[name] = turns.run(peers, name, 0, file)
        if file:
          differences[name] = _difference(model, params, work, file)
          _check(name, differences[name])
      runs = turns.repeat(peers, flags.repeats)
    finally:
      for peer in peers.values():
        peer.close()
  tokens = int(work.lengths.sum())
  return {name: {'tokens': tokens, 'versions': peers[name].versions,
                 'difference': differences.get(name),
                 'first': firsts[name]._asdict(),
                 'repeats': [run._asdict() for run in runs[name]]}
          for name in peers}


def table(point: str, found: dict[str, Any]) -> str:
  """Markdown: medians, and of ratios the median over repeats."""
  lines = ['| point | sampler | tokens/s | ours is faster by | the bare '
           'products are | on its devices | compiling s | log-probs differ by '
           '| busy slots | until the queue is empty | cache MB |',
           '|---|---|---|---|---|---|---|---|---|---|---|']
  seconds = turns.all_seconds(found)
  for name, taken in seconds.items():
    entry = found[name.partition(':')[0]]
    ratio = lambda other, taken=taken: (
        np.median(taken / seconds[other]) if other in seconds else None)
    share = lambda bare: turns.cell(bare and 100 / bare, '.1f', ' %')
    facts = entry['repeats'][0]['facts']
    whole = ':' not in name
    cell = turns.cell
    cells = [
        f'{entry["tokens"] / np.median(taken):,.0f}', cell(ratio('ours')),
        share(ratio('bare')), share(ratio(_SHARED)),
        cell(entry['first']['seconds'] - np.median(taken) if whole else None,
             '.1f'),
        cell(entry['difference'] if whole else None, '.0e'),
        cell(facts.get('occupancy'), '.2f'),
        cell(facts.get('queued_occupancy'), '.2f'),
        cell(facts.get('cache_bytes') and facts['cache_bytes'] / 1e6, '.0f')]
    lines.append(f'| {point} | {name.replace(":", ", ")} | '
                 f'{" | ".join(cells)} |')
  lines.append('\n' + turns.others(found))
  return '\n'.join(lines)


def _difference(model: Any, params: Any, work: points.Work,
                file: str) -> float:
  """The largest of a peer's log-probs from our scorer's of its tokens."""
  with np.load(file) as found:
    tokens, theirs = found['tokens'], found['logprobs']
  prompts = work.row_prompts[work.compared]
  mask = np.arange(work.longest)[None] < work.lengths[work.compared][:, None]
  score = grpo.make_score_fn(model, temperature=1.0,
                             microbatch_size=points.GROUP_SIZE)
  ours = score(params, types.Rollout(
      prompt_tokens=prompts, prompt_mask=np.ones(prompts.shape, bool),
      completion_tokens=tokens.astype(np.int32), completion_mask=mask,
      action_mask=mask, sampler_logprobs=np.zeros(mask.shape, np.float32)))
  return float(np.abs(np.asarray(ours) - theirs)[mask].max())


def _check(name: str, difference: float) -> None:
  # NaN is not at most anything.
  if not difference <= _MOST_DIFFERENCE:
    raise RuntimeError(
        f'{name}: log-probs differ from our scorer\'s by {difference:.1e}, '
        f'more than {_MOST_DIFFERENCE:.0e}; no speed is given.')


if __name__ == '__main__':
  main()
