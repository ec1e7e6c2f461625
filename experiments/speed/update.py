# SPDX-License-Identifier: Apache-2.0
"""How fast do we learn, beside others on the same machine?

  python -m experiments.speed.update --trl_python=<…> --tunix_python=<…>

An update from the same completions, and a whole step from prompts to new
weights: the same weights, optimizer and loss for all, float32, on the cores
this process may use. Peers take turns as in `experiments.speed.sampler`.
Before anything is timed, the loss and the change of the weights are compared
with ours. Linux; the README says which environments it takes.
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
from experiments.speed import machine, points, serving, steps, turns
from experiments.speed.peers import update_bare, update_ours
from lapo_jax import advantages, grpo
from lapo_jax.models import qwen2

_POINTS = ('update', 'step')
_PEERS = ('ours', 'bare', 'trl', 'tunix')
_MOST_LOSS = 1e-5
# Of the change's norm. Adam divides a gradient by its own size, so that the
# smallest ones, which are rounding, move their weights as far as any other.
_MOST_CHANGE = 1e-3
# Added to a group's sd, which the advantages of a whole step are divided by.
_EPS = {'ours': 1e-4, 'trl': 1e-4, 'tunix': 1e-6}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--points', default=','.join(_POINTS))
  parser.add_argument('--peers', default=','.join(_PEERS))
  parser.add_argument('--repeats', type=int, default=5)
  parser.add_argument('--trl_python', default=sys.executable)
  parser.add_argument('--tunix_python', default=sys.executable)
  parser.add_argument('--out', help='a JSON file with every repeat')
  flags = parser.parse_args()
  jax.config.update('jax_platforms', 'cpu')
  names = turns.choice('peers', flags.peers, _PEERS)
  report = {
      'command': ' '.join(['python -m experiments.speed.update',
                           *sys.argv[1:]]),
      'date': datetime.datetime.now().isoformat(timespec='seconds'),
      'machine': machine.describe(), 'points': {}}
  for point in turns.choice('points', flags.points, _POINTS):
    found = measure(point, names, flags)
    report['points'][point] = found
    print(table(point, found), flush=True)
    if flags.out:
      pathlib.Path(flags.out).write_text(json.dumps(report, indent=1) + '\n')


def measure(point: str, names: list[str],
            flags: argparse.Namespace) -> dict[str, Any]:
  """All runs of a point, by peer; the first of each compiles.

  Raises:
    RuntimeError: a peer's loss or weights are not ours.
  """
  model = qwen2.Model(**steps.FIELDS)
  params = cases.make_params(model)
  work = steps.make_work(whole=point == 'step')
  work = work._replace(old_logprobs=_old_logprobs(model, params, work))
  peers = {}
  with tempfile.TemporaryDirectory() as folder:
    qwen2.save(params, folder, model)
    file = f'{folder}/work.npz'
    steps.save(work, file)
    try:
      for name in names:
        peers[name] = serving.Process(
            getattr(flags, f'{name}_python', sys.executable),
            f'experiments.speed.peers.update_{name}', folder, file)
      firsts, differences = {}, {}
      for name in peers:
        file = '' if name == 'bare' else f'{folder}/compared.npz'
        firsts[name] = turns.run(peers, name, 0, file)
        if file:
          differences[name] = _difference(model, params, work, file,
                                          _EPS[name])
          _check(name, differences[name])
      runs = turns.repeat(peers, flags.repeats)
    finally:
      for peer in peers.values():
        peer.close()
  return {name: {'versions': peers[name].versions,
                 'difference': differences.get(name),
                 'first': firsts[name]._asdict(),
                 'repeats': [run._asdict() for run in runs[name]]}
          for name in peers}


def table(point: str, found: dict[str, Any]) -> str:
  """Markdown: medians, and of ratios the median over repeats."""
  lines = ['| point | trainer | seconds | ours is faster by | of the rate of a '
           'square product | compiling s | losses differ by | weights\' change '
           'differs by |', '|---|---|---|---|---|---|---|---|']
  seconds, work = turns.all_seconds(found), steps.products()
  square = seconds.get('bare:square')
  rate = None if square is None else update_bare.SQUARE / square
  for name, taken in seconds.items():
    peer, _, part = name.partition(':')
    # Of the sum of its parts nothing is asked.
    if part == 'square' or name == 'bare':
      continue
    entry, ours = found[peer], name.replace(peer, 'ours')
    share = None
    if rate is not None and part in ('update', 'loop'):
      done = work['weights'] + (part == 'update') * work['attention']
      share = 100 * np.median(done / taken / rate)
    loss, change = (entry['difference'] if not part and entry['difference']
                    else (None, None))
    cells = [
        f'{np.median(taken):.2f}',
        turns.cell(np.median(taken / seconds[ours]) if ours in seconds
                   else None),
        turns.cell(share, '.0f', ' %'),
        turns.cell(None if part else
                   entry['first']['seconds'] - np.median(taken), '.1f'),
        turns.cell(loss, '.0e'), turns.cell(change, '.0e')]
    lines.append(f'| {point} | {name.replace(":", ", ")} | '
                 f'{" | ".join(cells)} |')
  if rate is not None:
    lines.append(f'\nA square product: {np.median(rate) / 1e9:.0f} GFLOP/s; '
                 'of the update, forward and back, '
                 f'{work["weights"] / 1e9:.0f} GFLOP with weights, '
                 f'{work["attention"] / 1e9:.0f} between slots.')
  lines.append('\n' + turns.others(found))
  return '\n'.join(lines)


def _old_logprobs(model: Any, params: Any, work: steps.Work) -> np.ndarray:
  """Of a policy some way from the model's, so that ratios are clipped."""
  score = grpo.make_score_fn(model, temperature=1.0,
                             microbatch_size=points.GROUP_SIZE)
  found = np.asarray(score(params, update_ours.make_batch(work).rollout))
  noise = np.random.default_rng(1).normal(scale=0.15, size=found.shape)
  return (found + noise).astype(np.float32)


def _difference(model: Any, params: Any, work: steps.Work,
                file: str, eps: float) -> tuple[float, float]:
  """Of a peer's loss, and of its change of the weights, from ours.

  Ours are those of what the peer has learned from.
  """
  with np.load(file) as found:
    theirs = dict(found)
  tokens, loss = theirs.pop('tokens'), theirs.pop('loss')
  work = work._replace(completions=tokens.astype(np.int32))
  if work.whole:
    rewards = steps.rewards(tokens[:, 0]).reshape(-1, points.GROUP_SIZE)
    work = work._replace(advantages=np.asarray(
        advantages.group_advantages(rewards, eps=eps)).ravel())
  before = update_ours.weights(params, model)
  # In other microbatches than our peer's.
  update = update_ours.make_update(model, 4 * points.GROUP_SIZE)
  state, metrics = update(
      update_ours.make_state(jax.tree.map(jax.numpy.array, params)),
      update_ours.make_batch(work))
  after = update_ours.weights(state.params, model)
  # The peer may keep a tied output table under a name of its own.
  if missing := before.keys() - theirs.keys():
    raise RuntimeError(f'no weights {sorted(missing)} among the peer\'s.')
  off = sum(np.sum((theirs[name] - after[name])**2) for name in before)
  moved = sum(np.sum((after[name] - before[name])**2) for name in before)
  return (abs(float(loss) - float(metrics['update/loss'])),
          float(np.sqrt(off / moved)))


def _check(name: str, difference: tuple[float, float]) -> None:
  # NaN is not at most anything.
  for what, found, most in zip(
      ('loss differs from ours', 'change of the weights differs from ours'),
      difference, (_MOST_LOSS, _MOST_CHANGE), strict=True):
    if not found <= most:
      raise RuntimeError(f'{name}: its {what} by {found:.1e}, more than '
                         f'{most:.0e}; no speed is given.')


if __name__ == '__main__':
  main()
