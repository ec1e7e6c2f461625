# SPDX-License-Identifier: Apache-2.0
"""Generated reasoning: what the embedded model imitates before any RL.

A trace has one of three styles, drawn alike for every level:

  terse      the answer at once
  worked     the steps, then the answer
  rechecked  the steps, then the same steps again and again: a first re-check,
             and after each another one with probability 3/4

Every trace is right, so a re-check is waste; the steps are not: on long
operands a model of this size gets the terse answer wrong. The number of
re-checks is heavy-tailed, as the lengths of real reasoning models are.
"""

from collections.abc import Callable
import dataclasses

import numpy as np

from lapo_jax.tasks import arithmetic

_STYLES = ('terse', 'worked', 'rechecked')
# Share of traces whose thinking opens with a budget.
_BUDGET_SHARE = 0.4
# A stated budget is off by a factor exp(N(0, this)).
_BUDGET_NOISE = 0.15


@dataclasses.dataclass(frozen=True)
class Mixture:
  """How traces are drawn."""

  styles: tuple[float, float, float] = (0.25, 0.45, 0.30)
  another: float = 0.75
  max_tokens: int = 232


def trace(problem: arithmetic.Problem, rng: np.random.Generator,
          count: Callable[[str], int], mixture: Mixture) -> tuple[str, str]:
  """Draws (prefill, completion); the prefill is '' or states a budget.

  Args:
    problem: what is asked.
    rng: the draw.
    count: number of tokens of a text, the stop token left out.
    mixture: how styles and re-checks are drawn.
  """
  style = rng.choice(len(_STYLES), p=mixture.styles)
  work = steps(problem)
  text = '' if style == 0 else ' ' + work
  end = f'</think> \\boxed{{{problem.answer}}}'
  if style == 2:
    again = ' Wait, check: ' + work
    per_check, length = count(again), count(text + end)
    checks = int(rng.geometric(1 - mixture.another))
    room = max(1, (mixture.max_tokens - length) // per_check)
    text += again * min(checks, room)
  completion = text + end
  if rng.random() >= _BUDGET_SHARE:
    return '', completion
  noise = np.exp(_BUDGET_NOISE * rng.standard_normal())
  budget = max(1, round((count(completion) + 1) * noise))
  return f' I will answer the question with {budget} tokens.', completion


def steps(problem: arithmetic.Problem) -> str:
  """The working that a level needs, one line."""
  return (_carry, _difference, _running, _split, _columns,
          _split)[problem.level - 1](*problem.operands)


def _carry(a: int, b: int) -> str:
  return f'{a}+{b}={a + b}.'


def _difference(a: int, b: int) -> str:
  tens = b // 10 * 10
  return f'{a}-{tens}={a - tens};{a - tens}-{b - tens}={a - b}.'


def _running(a: int, b: int, c: int) -> str:
  return f'{a}+{b}={a + b};{a + b}+{c}={a + b + c}.'


def _split(a: int, b: int) -> str:
  """a times the tens, a times the ones, and their sum."""
  tens = b // 10 * 10
  first, second = a * tens, a * (b - tens)
  return f'{a}*{tens}={first};{a}*{b - tens}={second};{first}+{second}={a * b}.'


def _columns(a: int, b: int) -> str:
  """Digit by digit from the right, the carry written out."""
  carry, columns = 0, []
  for x, y in zip(reversed(str(a)), reversed(str(b)), strict=True):
    total = int(x) + int(y) + carry
    columns.append(f'{x}+{y}+{carry}={total}')
    carry = total // 10
  return ';'.join(columns) + f';{a + b}.'
