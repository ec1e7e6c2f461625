# SPDX-License-Identifier: Apache-2.0
"""Peers take turns: one runs, the others wait, all else is watched."""

from typing import Any, NamedTuple

import numpy as np

from experiments.speed import machine, serving

# How often a run is tried until nothing else ran meanwhile: beside one other
# busy process torch's threads wait for one another, twenty times as long.
_ATTEMPTS = 10


class Run(NamedTuple):
  """One call of a peer."""

  seconds: float
  facts: dict[str, float]
  # CPU seconds per second: the peer's, of those that wait, of all else on
  # the machine.
  cores: float
  waiting_cores: float
  other_cores: float


def run(peers: dict[str, serving.Process], name: str, seed: int,
        compared: str = '') -> Run:
  """A peer's run while the others wait, undisturbed if it can be had."""
  watch = machine.Watch(peers[name], [
      peer for other, peer in peers.items() if other != name])
  for _ in range(_ATTEMPTS):
    watch.wait()
    found = peers[name].run(seed, compared)
    taken = Run(found['seconds'], found['facts'], *watch.cores())
    # What compiles cannot be had again. /proc counts hundredths of a second:
    # of a short run their share says little.
    most = machine.QUIET * max(1, 0.5 / taken.seconds)
    if compared or taken.other_cores < most:
      break
  return taken


def repeat(peers: dict[str, serving.Process], count: int) -> dict[str, list]:
  """`count` runs of each, peer after peer."""
  runs = {name: [] for name in peers}
  for i in range(count):
    for name in peers:
      runs[name].append(run(peers, name, 1 + i))
  return runs


def all_seconds(found: dict[str, Any]) -> dict[str, np.ndarray]:
  """Seconds of each repeat, by peer and by a peer's part, 'peer:part'."""
  seconds = {}
  for name, entry in found.items():
    repeats = entry['repeats']
    seconds[name] = np.array([taken['seconds'] for taken in repeats])
    for fact in repeats[0]['facts']:
      part, _, unit = fact.rpartition('_')
      if unit == 'seconds':
        seconds[f'{name}:{part}'] = np.array(
            [taken['facts'][fact] for taken in repeats])
  return seconds


def others(found: dict[str, Any]) -> str:
  """What else ran, in a sentence."""
  most = max(taken['other_cores'] for entry in found.values()
             for taken in entry['repeats'])
  return f'Other processes used at most {most:.2f} cores meanwhile.'


def cell(value: float | None, form: str = '.2f', unit: str = '') -> str:
  """Of a table; nothing known is a dash."""
  return '–' if value is None else f'{value:{form}}{unit}'


def choice(flag: str, given: str, legal: Any) -> list[str]:
  """The names in a flag, separated by commas.

  Raises:
    SystemExit: one that is not legal.
  """
  chosen = given.split(',')
  if unknown := set(chosen) - set(legal):
    raise SystemExit(f'--{flag}: got {sorted(unknown)}, expected some of '
                     f'{",".join(legal)}.')
  return chosen
