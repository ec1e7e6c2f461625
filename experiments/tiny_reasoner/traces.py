# SPDX-License-Identifier: Apache-2.0
"""Generated reasoning: what the embedded model imitates before any RL.

A trace has one of three styles, drawn alike for every level:

  terse      the answer at once
  worked     the steps, then the answer
  rechecked  the steps, then the same steps again and again: a first re-check,
             and after each another one with probability 0.85

Every trace is right, so a re-check is waste; the steps are not: on long
operands a model of this size gets the terse answer wrong. The number of
re-checks is heavy-tailed, as the lengths of real reasoning models are.
"""

from collections.abc import Callable
import dataclasses

import numpy as np

from lapo_jax.tasks import arithmetic

_STYLES = ('terse', 'worked', 'rechecked')
# A stated budget is off by a factor exp(N(0, this)).
_BUDGET_NOISE = 0.15


@dataclasses.dataclass(frozen=True)
class Mixture:
  """How traces are drawn.

  Attributes:
    styles: shares of terse, worked and rechecked traces.
    another: probability of another re-check after each.
    budgets: share of traces whose thinking opens with a budget.
    max_tokens: no re-check is added that would make the trace longer.
  """

  styles: tuple[float, float, float] = (0.2, 0.5, 0.3)
  another: float = 0.85
  budgets: float = 0.4
  max_tokens: int = 240


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
  if rng.random() >= mixture.budgets:
    return '', completion
  noise = np.exp(_BUDGET_NOISE * rng.standard_normal())
  budget = max(1, round((count(completion) + 1) * noise))
  return f' I will answer the question with {budget} tokens.', completion


def steps(problem: arithmetic.Problem) -> str:
  """The working that a level needs, one line."""
  work = (_running, _columns, _borrows, _products, _columns, _products)
  return work[problem.level - 1](*problem.operands)


def _running(a: int, b: int, c: int) -> str:
  return f'{a}+{b}={a + b};{a + b}+{c}={a + b + c}.'


def _columns(a: int, b: int) -> str:
  """Digit by digit from the right, the carry written out."""
  carry, columns = 0, []
  for x, y in zip(reversed(str(a)), reversed(str(b)), strict=True):
    total = int(x) + int(y) + carry
    columns.append(f'{x}+{y}+{carry}={total}')
    carry = total // 10
  return ';'.join(columns) + f';{a + b}.'


def _borrows(a: int, b: int) -> str:
  """Digit by digit from the right, ten lent where it is needed."""
  borrow, columns = 0, []
  for x, y in zip(reversed(str(a)), reversed(str(b)), strict=True):
    lent = 10 if int(x) < int(y) + borrow else 0
    top = int(x) + lent
    columns.append(f'{top}-{y}-{borrow}={top - int(y) - borrow}')
    borrow = lent // 10
  return ';'.join(columns) + f';{a - b}.'


def _products(a: int, b: int) -> str:
  """a times each digit's worth of b, then the products one by one."""
  places = reversed(range(len(str(b))))
  parts = [int(digit) * 10**place
           for digit, place in zip(str(b), places, strict=True)]
  lines = [f'{a}*{part}={a * part}' for part in parts]
  total = a * parts[0]
  for part in parts[1:]:
    lines.append(f'{total}+{a * part}={total + a * part}')
    total += a * part
  return ';'.join(lines) + '.'
