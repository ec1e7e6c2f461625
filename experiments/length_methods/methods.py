# SPDX-License-Identifier: Apache-2.0
"""The arms: what each method is on the embedded bench, by one rule.

  python experiments/length_methods/methods.py      # the README's table

A paper's numbers belong to the cap on generation, C tokens, that it trained
under; the bench's cap is 256 tokens. The rule, the same for all:

  * a length of n tokens becomes n·256/C, rounded where the setting is whole;
  * a coefficient per token is multiplied by C/256;
  * a number without tokens stays as the paper has it;
  * a group has 8 completions. Of K that are sampled the paper's share is
    kept: 8 of 16 become 4 of 8. A number of standard deviations is the same
    share of the largest that a group of its size allows, (G − 1)/√G;
  * batch, learning rate, steps, clip, token weights and the absent KL term are
    the bench's for all, unless they are what the method is.

A value of 0 for C says that no number of the method counts tokens.
"""

import dataclasses
from typing import Any

CAP = 256  # tokens, of generation on the bench
GROUP_SIZE = 8
STEPS = 60  # of an arm, over all its stages
# Every stage of every arm has a whole number of steps.
_STEPS_DIVIDE_BY = 6


@dataclasses.dataclass(frozen=True)
class Method:
  """An arm.

  Attributes:
    family: what acts: arms of one family share a colour.
    argument: of configs/tiny.py.
    paper: arXiv number or address.
    cap: C, tokens.
    overrides: of the config, by dotted key.
    stages: overrides of each stage, () = one stage.
    note: what else is to be known.
  """

  family: str
  argument: str
  paper: str = ''
  cap: int = 0
  overrides: dict[str, Any] = dataclasses.field(default_factory=dict)
  stages: tuple[dict[str, Any], ...] = ()
  note: str = ''


def length(tokens: float, cap: int) -> float:
  """A length of the paper's on the bench: n·256/C, tokens."""
  return tokens * CAP / cap


def per_token(coefficient: float, cap: int) -> float:
  """A coefficient per token on the bench, times C/256."""
  return coefficient * cap / CAP


def deviations(number: float, group_size: int) -> float:
  """Standard deviations: the same share of the largest that a group allows."""
  most = lambda size: (size - 1) / size**0.5
  return number * most(GROUP_SIZE) / most(group_size)


_LAPO = {'reward.slope': length(100, 4096), 'reward.sigma': length(120, 4096)}
_LAPO_STAGES = ({'name': 'discovery', 'reward.stage': 'discovery'},
                {'name': 'internalisation', 'reward.stage': 'internalisation'})
# Rounds beyond the first, in which groups without variance are drawn anew.
_DLER = {'advantage.scale': 'batch', 'loss.clip_high': 0.28,
         'rollout.refill_rounds': 4}
_SPENT = 'more completions a step than the others'

CONTROL = 'accuracy only'
METHODS = {
    CONTROL: Method('control', 'accuracy', '2402.03300'),
    'LAPO-D': Method('LAPO', 'lapo', '2507.15758', 4096, _LAPO,
                     note='discovery for all steps'),
    'LAPO': Method('LAPO', 'lapo', '2507.15758', 4096, _LAPO, _LAPO_STAGES),
    'LAPO with DLER': Method(
        'LAPO', 'lapo', '', 4096, _LAPO | _DLER, _LAPO_STAGES,
        f'DLER\'s optimiser; unpublished; {_SPENT}'),
    'LEAD': Method('several rewards', 'lead', '2605.09806', 8000, {
        'reward.low': round(length(1000, 8000)), 'advantage.decoupled': True,
        'advantage.whiten': 'tokens', 'advantage.eps': 1e-6}),
    'SAR': Method('several rewards', 'sar', '2509.05489', 0, {
        'advantage.scale': 'none'}),
    'GDPO': Method('several rewards', 'gdpo', '2601.05242', 8000, {
        'reward.limit': round(length(4000, 8000)), 'advantage.decoupled': True,
        'advantage.whiten': 'completions'}),
    'ShorterBetter': Method('group statistics', 'shorter_better', '2504.21370',
                            6000, {'reward.beta': per_token(1e-3, 6000)}),
    'LASER-D': Method('group statistics', 'laser', '2505.15612', 16384, {
        'reward.variant': 'difficulty',
        'reward.target': round(length(4096, 16384))}),
    'Arora and Zanette': Method(
        'group statistics', 'efficient_reasoning', '2502.04463', 0, {
            'advantage.baseline': 'leave_one_out', 'advantage.scale': 'none'}),
    'Kimi k1.5': Method('group statistics', 'kimi', '2501.12599',
                        note='weight 1 is ours'),
    'SmartThinker': Method('group statistics', 'smart_thinker',
                           'https://github.com/SJTU-RTEAS/SmartThinker'),
    'L1-Max': Method('budgets and limits', 'l1', '2503.04697', 4000, {
        'reward.mode': 'mixed', 'reward.alpha': per_token(3e-4, 4000),
        'reward.low': round(length(100, 4000)),
        'reward.high': round(length(4000, 4000))},
        note='half of the prompts exact; evaluated without a budget'),
    'ThinkPrune': Method(
        'budgets and limits', 'think_prune', '2504.01296', 4000,
        stages=tuple({'name': f'{limit} tokens',
                      'rollout.max_completion_length': limit}
                     for limit in (round(length(tokens, 4000))
                                   for tokens in (4000, 3000, 2000))),
        note='evaluated without the sentence, and under the common cap'),
    'HBPO': Method('budgets and limits', 'hbpo', '2507.15844', 4096, {
        'reward.budgets': tuple(round(length(tokens, 4096))
                                for tokens in (512, 1024, 2048, 2560)),
        'reward.alpha': per_token(1 / 4096, 4096),
        'advantage.baseline': 'none', 'advantage.scale': 'none'},
        note='one budget a group; evaluated without a budget'),
    'DLER': Method('budgets and limits', 'dler', '2510.15110', 4000, _DLER,
                   note=_SPENT),
    'GFPO': Method('selection', 'gfpo', '2508.09726', 0, {'reward.k': 4}),
    'DOT': Method('selection', 'dot', '2601.03969', 4096, {
        'reward.alpha': deviations(3.0, 32),
        'reward.slack': round(length(32, 4096))}),
    'SAS': Method('selection', 'sas', '2604.24003', 0, {
        'reward.delimiter': ';'},
        note='the bench writes no blank lines: its steps end at semicolons'),
    'QLPO': Method('selection', 'qlpo', '2607.21793', 0, {'reward.m': 4}),
}


def settings(method: Method, steps: int = STEPS) -> dict[str, Any]:
  """Everything that configs/tiny.py is overridden with, by dotted key.

  Args:
    method: the arm.
    steps: over all its stages.

  Raises:
    ValueError: steps that two or three stages cannot share.
  """
  if steps < 1 or steps % _STEPS_DIVIDE_BY:
    raise ValueError(f'{steps} steps: expected a multiple of '
                     f'{_STEPS_DIVIDE_BY}, such as {STEPS}, so that arms of '
                     'two and of three stages have as many as the others.')
  return {'total_steps': steps // max(len(method.stages), 1),
          'stages': method.stages, 'eval_every': 0,
          **method.overrides}


def table() -> str:
  """The arms as Markdown."""
  lines = ['| arm | family | paper | C | on the bench | |',
           '|---|---|---|---|---|---|']
  for name, method in METHODS.items():
    said = [f'{key.removeprefix("reward.")}={_value(value)}'
            for key, value in method.overrides.items()]
    said += [' → '.join(stage['name'] for stage in method.stages)]
    address = method.paper
    if address and not address.startswith('https:'):
      address = f'https://arxiv.org/abs/{address}'
    paper = f'[{address.rpartition("/")[2]}]({address})' if address else ''
    lines.append(f'| {name} | {method.family} | {paper} | {method.cap or ""} | '
                 f'{", ".join(filter(None, said))} | {method.note} |')
  return '\n'.join(lines)


def _value(value: Any) -> str:
  return f'{value:.6g}' if isinstance(value, float) else str(value)


if __name__ == '__main__':
  print(table())
