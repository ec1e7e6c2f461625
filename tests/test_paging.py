# SPDX-License-Identifier: Apache-2.0
"""Pages hold what was written, and attention finds it wherever it lies."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lapo_jax import paging

# Slots 0 and 2 decode one prompt, slot 1 another, slot 3 is idle.
W, K, R, E, H = 4, 2, 3, 8, 6
PROMPT_OF, LENGTHS, PROMPT_LENGTHS = [0, 1, 0], [9, 1, 4], [6, 4]


def draw(rng, *shape):
  return rng.normal(size=shape).astype(np.float32)


@pytest.fixture(scope='module')
def case():
  """(queries [N, H, E], per slot its keys and values, pages, step)."""
  rng = np.random.default_rng(0)
  prompts = [(draw(rng, n, K, E), draw(rng, n, K, E)) for n in PROMPT_LENGTHS]
  own = [(draw(rng, n, K, E), draw(rng, n, K, E)) for n in LENGTHS]
  # Pages of the completions: out of order, one free, one of the idle slot's.
  owner, base = [2, 0, 4, 1, 0, 0, 3], [0, 8, 0, 0, 0, 4, 0]

  def cut(parts, whose, first, which):
    found = 100 * draw(rng, len(whose), W, K, E)  # not real: must not count
    for page, row, start in zip(found, whose, first, strict=True):
      part = parts[row][which][start:start + W] if row < len(parts) else []
      if len(part):
        page[:len(part)] = part
    return found

  layers = [(cut(own, owner, base, which),
             cut(prompts, [0, 1, 0], [0, 0, 4], which)) for which in range(2)]
  valid = lambda held: np.arange(W) < np.array(held)[:, None]
  held = [(LENGTHS[s] if s < 3 else 0) - b
          for s, b in zip(owner, base, strict=True)]
  step = paging.Step(
      page=jnp.array([1, 3, 7, 7]), offset=jnp.array([0, 0, 0, 0]),
      owner=jnp.array(owner), valid=jnp.array(valid(held)),
      readers=jnp.array([[0, 2], [4, 1], [0, 2]]),
      prompt_valid=jnp.array(valid([6, 4, 2])))
  return draw(rng, 4, H, E), prompts, own, layers, step


def pages(tokens, keys, dtype=jnp.float32):
  """[Q, W, K, E] tokens as pages, written whole."""
  count = len(tokens)
  blank = paging.empty(count, W, (1, K, E), jnp.dtype(dtype))
  filled = paging.fill(blank, jnp.arange(count)[:, None],
                       ((jnp.asarray(tokens),) * 2,))
  return filled[0][not keys]


def oracle(queries, prompts, own):
  """softmax(q·kᵀ/√E)·v of each slot in float64."""
  found = []
  for slot, prompt in enumerate(PROMPT_OF):
    keys, values = (np.concatenate([prompts[prompt][i], own[slot][i]]).repeat(
        R, axis=1).astype(np.float64) for i in range(2))
    scores = np.einsum('he,che->hc', queries[slot], keys) / np.sqrt(E)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    found.append(np.einsum('hc,che->he', weights, values))
  return np.stack(found)


@pytest.mark.parametrize('dtype, atol', [
    ('float32', 1e-5), ('bfloat16', 0.03), ('int8', 0.05)])
def test_attention_over_pages_is_attention(case, dtype, atol):
  queries, prompts, own, layers, step = case
  completions, shared = zip(*((pages(c, i == 0, dtype), pages(p, i == 0, dtype))
                              for i, (c, p) in enumerate(layers)),
                            strict=True)
  found = jax.jit(paging.attend)(jnp.asarray(queries), completions, shared,
                                 step)
  assert np.isfinite(found).all()
  np.testing.assert_allclose(found[:3], oracle(queries, prompts, own),
                             atol=atol)


@pytest.mark.parametrize('keys', [True, False])
@pytest.mark.parametrize('dtype', ['float32', 'int8'])
def test_a_token_goes_to_its_place_and_nowhere_else(case, keys, dtype):
  rng = np.random.default_rng(1)
  before = pages(draw(rng, 3, W, K, E), keys, dtype)
  tokens = draw(rng, 2, K, E)
  step = case[-1].replace(page=jnp.array([2, 3]), offset=jnp.array([1, 0]))
  after = paging.write(before, step, jnp.asarray(tokens), keys)

  def read(found):
    data = np.asarray(found.data, np.float32)
    data = data.transpose(0, 3, 1, 2) if keys else data.transpose(0, 2, 1, 3)
    if found.scales is None:
      return data
    return data * np.asarray(found.scales).transpose(0, 2, 1)[..., None]

  want = read(before).copy()
  want[2, 1] = tokens[0]  # page 3 does not exist: the second is dropped
  np.testing.assert_allclose(read(after), want,
                             atol=0 if dtype == 'float32' else 0.02)


def test_bytes_of_a_token():
  # Keys and values of 28 layers, 2 heads of 128: the 1.5B model's 28 KiB.
  assert paging.token_bytes(28, 2, 128, jnp.bfloat16) == 28672
  assert paging.token_bytes(28, 2, 128, jnp.int8) == 14336 + 2 * 28 * 2 * 4
