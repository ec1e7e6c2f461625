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
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.real_models import cases
from experiments.speed import machine, points, serving
from lapo_jax import grpo, types
from lapo_jax.models import qwen2

_MOST_DIFFERENCE = 1e-4
_PEERS = ('ours', 'bare', 'transformers', 'trl', 'tunix')
# How often a run is tried until nothing else ran meanwhile: beside one other
# busy process torch's threads wait for one another, twenty times as long.
_ATTEMPTS = 10
# Our sampler under twice the cap, the lengths as they are.
_DOUBLED = 'ours, cap doubled'


class _Run(NamedTuple):
  """One call of a peer."""

  seconds: float
  facts: dict[str, float]
  # CPU seconds per second: the peer's, of those that wait, of all else on
  # the machine.
  cores: float
  waiting_cores: float
  other_cores: float


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--points', default=','.join(points.POINTS))
  parser.add_argument('--peers', default=','.join(_PEERS))
  parser.add_argument('--repeats', type=int, default=5)
  parser.add_argument('--num_slots', type=int, default=0,
                      help='that our sampler decodes at once, 0 = all rows')
  parser.add_argument('--trl_python', default=sys.executable)
  parser.add_argument('--tunix_python', default=sys.executable)
  parser.add_argument('--out', help='a JSON file with every repeat')
  flags = parser.parse_args()
  jax.config.update('jax_platforms', 'cpu')
  names = _choice('peers', flags.peers, _PEERS)
  report = {
      'command': ' '.join(['python -m experiments.speed.sampler',
                           *sys.argv[1:]]),
      'date': datetime.datetime.now().isoformat(timespec='seconds'),
      'machine': machine.describe(), 'points': {}}
  for name in _choice('points', flags.points, points.POINTS):
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
  if point.tail and 'ours' in names:
    works[_DOUBLED] = work._replace(cap=2 * work.cap)
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
        file = '' if name == 'bare' else f'{folder}/compared.npz'
        firsts[name] = _run(peers, name, 0, file)
        if file:
          differences[name] = _difference(model, params, work, file)
          _check(name, differences[name])
      runs = {name: [] for name in peers}
      for repeat in range(flags.repeats):
        for name in peers:
          runs[name].append(_run(peers, name, 1 + repeat))
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
           'products are | compiling s | log-probs differ by | busy slots | '
           'cache MB |', '|---|---|---|---|---|---|---|---|---|']
  seconds = _all_seconds(found)
  for name, taken in seconds.items():
    entry = found[name.partition(':')[0]]
    ratio = lambda other, taken=taken: (
        np.median(taken / seconds[other]) if other in seconds else None)
    bare = ratio('bare')
    facts = entry['repeats'][0]['facts']
    whole = ':' not in name
    cells = [
        f'{entry["tokens"] / np.median(taken):,.0f}', _cell(ratio('ours')),
        _cell(bare and 100 / bare, '.1f', ' %'),
        _cell(entry['first']['seconds'] - np.median(taken) if whole else None,
              '.1f'),
        _cell(entry['difference'] if whole else None, '.0e'),
        _cell(facts.get('occupancy'), '.2f'),
        _cell(facts.get('cache_bytes') and facts['cache_bytes'] / 1e6, '.0f')]
    lines.append(f'| {point} | {name.replace(":", ", ")} | '
                 f'{" | ".join(cells)} |')
  most = max(run['other_cores'] for entry in found.values()
             for run in entry['repeats'])
  lines.append(f'\nOther processes used at most {most:.2f} cores meanwhile.')
  return '\n'.join(lines)


def _all_seconds(found: dict[str, Any]) -> dict[str, np.ndarray]:
  """Seconds of each repeat, by peer and by a peer's part."""
  seconds = {}
  for name, entry in found.items():
    repeats = entry['repeats']
    seconds[name] = np.array([run['seconds'] for run in repeats])
    for fact in repeats[0]['facts']:
      part, _, unit = fact.rpartition('_')
      if unit == 'seconds':
        seconds[f'{name}:{part}'] = np.array(
            [run['facts'][fact] for run in repeats])
  return seconds


def _cell(value: float | None, form: str = '.2f', unit: str = '') -> str:
  return '–' if value is None else f'{value:{form}}{unit}'


def _run(peers: dict[str, serving.Process], name: str, seed: int,
         compared: str = '') -> _Run:
  """A peer's run while the others wait, undisturbed if it can be had."""
  watch = machine.Watch(peers[name], [
      peer for other, peer in peers.items() if other != name])
  for _ in range(_ATTEMPTS):
    watch.wait()
    found = peers[name].run(seed, compared)
    run = _Run(found['seconds'], found['facts'], *watch.cores())
    # What compiles cannot be had again. /proc counts hundredths of a second:
    # of a short run their share says little.
    most = machine.QUIET * max(1, 0.5 / run.seconds)
    if compared or run.other_cores < most:
      break
  return run


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


def _choice(flag: str, given: str, legal: Any) -> list[str]:
  chosen = given.split(',')
  if unknown := set(chosen) - set(legal):
    raise SystemExit(f'--{flag}: got {sorted(unknown)}, expected some of '
                     f'{",".join(legal)}.')
  return chosen


if __name__ == '__main__':
  main()
