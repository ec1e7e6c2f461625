# SPDX-License-Identifier: Apache-2.0
"""Sampling groups of completions with a KV cache.

Each prompt is prefilled once; its keys and values serve its G completions.
Decoding writes one token a step until every completion has stopped, in
stretches over which the cache is fixed. At the start of a stretch the cache
grows by what the stretch needs, and every 64 steps rows that have stopped are
left out: the cost of a step follows the live lengths and the live rows rather
than the cap and the batch.

A completion is a function of (parameters, prompt, key, its number b, …):
its randomness is fold_in(fold_in(key, b), t), so neither batch mates nor the
mesh change it.

Top-p and top-k are for evaluation. Training leaves them alone: a truncated
support biases the ratio of policies (trl#6789).
"""

from collections.abc import Callable, Sequence
import itertools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
import numpy as np

from lapo_jax import ops, types

# Steps after which stopped rows are left out, and the shortest stretch.
_STRETCH = 64
# Decoded are this share of the rows, the least that holds the live ones.
_SHARES = (1 / 8, 3 / 8, 1)


# Temperature, top_p and top_k.
_How = tuple[Array, Array, Array]


@flax.struct.dataclass
class _State:
  """What one decoding step passes to the next; B rows, t tokens written.

  Attributes:
    t: int32 [], the completion slot to be written next.
    done: bool [B], the row has written a stop token.
    logits: float32 [B, V], for slot t.
    lengths: int32 [B], tokens written through the stop token.
    tokens: int32 [B, T].
    logprobs: float32 [B, T].
    cache: KVCache of the prompt and the first t tokens.
    keys: random keys [B], one a completion.
    prompt_mask: bool [B, L].
  """

  t: jax.Array
  done: jax.Array
  logits: jax.Array
  lengths: jax.Array
  tokens: jax.Array
  logprobs: jax.Array
  cache: Any
  keys: jax.Array
  prompt_mask: jax.Array

  def take(self, rows: Array) -> '_State':
    """The state of some rows."""
    return jax.tree.map(lambda x: x[rows] if x.ndim else x, self)

  def put(self, rows: Array, part: '_State') -> '_State':
    """The state after some rows have gone on by themselves."""
    return jax.tree.map(lambda x, y: x.at[rows].set(y) if x.ndim else y,
                        self, part)


def make_sample_fn(
    model: Any, *, group_size: int, max_completion_length: int,
    eos_ids: Sequence[int], pad_id: int,
    shardings: tuple[Any, Any, Any] | None = None) -> Callable:
  """`(params, prompts, key, temperature, top_p=1.0, top_k=0) -> Rollout`.

  Args:
    model: a model family's module.
    group_size: completions of each prompt, G.
    max_completion_length: the cap T in tokens; a row that reaches it without
      a stop token is truncated.
    eos_ids: the stop tokens; the one that is sampled belongs to the row.
    pad_id: fills what follows it.
    shardings: of params, of `types.Prompts` and of the batch; None on one
      device.

  Returns:
    The sampler, one compiled program for each shape of prompts: the three
    numbers are traced. `temperature` 0 is greedy. Of each step's tokens the
    `top_k` likeliest stay, 0 = all; of these the fewest whose mass reaches
    the share `top_p`, 1 = all. `key` is one for all completions, or an array
    of B keys. The log-probs are those of softmax(logits / temperature), of
    softmax(logits) when greedy, never of the truncated distribution.
  """
  eos = jnp.asarray(eos_ids, jnp.int32)
  # To leave out rows is to move rows: between devices that costs too much.
  parts = 1 if shardings is None else shardings[2].num_devices

  def step(params: Any, state: _State, how: _How) -> _State:
    """Samples a token for every row and runs the model on it."""
    tokens, logprobs = _sample_token(state.logits, state.keys, state.t, *how)
    tokens = jnp.where(state.done, pad_id, tokens)
    logprobs = jnp.where(state.done, 0.0, logprobs)
    live = ~state.done
    stopped = live & jnp.any(tokens[:, None] == eos[None], axis=1)
    write = lambda into, column: jax.lax.dynamic_update_slice(
        into, column[:, None].astype(into.dtype), (0, state.t))

    prompt_slots = state.prompt_mask.shape[1]
    slots = state.cache.keys[0].shape[2]
    # A finished row sees no new keys; its outputs are never read.
    lengths = state.lengths + live
    key_mask = _key_mask(state.prompt_mask, lengths, slots)
    positions = (jnp.sum(state.prompt_mask, axis=1, dtype=jnp.int32) +
                 state.t)
    hidden, cache = model.apply(
        {'params': params}, tokens[:, None], positions[:, None], key_mask,
        state.cache.replace(index=prompt_slots + state.t))
    logits = model.apply({'params': params}, hidden[:, 0], method='unembed')
    return state.replace(
        t=state.t + 1, done=state.done | stopped, logits=logits,
        lengths=lengths, tokens=write(state.tokens, tokens),
        logprobs=write(state.logprobs, logprobs), cache=cache)

  def decode(params: Any, state: _State, how: _How,
             end: int | Array) -> _State:
    """Steps until every row has stopped or slot `end` is reached."""
    return jax.lax.while_loop(
        lambda s: ~jnp.all(s.done) & (s.t < end),
        lambda s: step(params, s, how), state)

  def decode_live(params: Any, state: _State, how: _How,
                  end: int | Array) -> _State:
    """`decode` of no more rows than it takes to hold the live ones."""
    rows = state.done.shape[0]
    sizes = sorted({max(1, int(share * rows)) for share in _SHARES})

    def decode_some(size):
      if size == rows:
        return lambda: decode(params, state, how, end)
      live = jnp.argsort(state.done, stable=True)[:size]
      return lambda: state.put(
          live, decode(params, state.take(live), how, end))

    needed = jnp.searchsorted(jnp.array(sizes), jnp.sum(~state.done))
    return jax.lax.switch(needed, [decode_some(size) for size in sizes])

  def decode_stretch(params: Any, state: _State, how: _How, start: int,
                     end: int) -> _State:
    """Decodes a stretch; the cache has its slots."""
    if not start or parts > 1:
      return decode(params, state, how, end)
    if end - start <= _STRETCH:
      return decode_live(params, state, how, end)
    return jax.lax.while_loop(
        lambda s: ~jnp.all(s.done) & (s.t < end),
        lambda s: decode_live(params, s, how,
                              jnp.minimum(s.t + _STRETCH, end)), state)

  def sample(params: Any, prompts: types.Prompts, key: Array,
             *how: Array) -> types.Rollout:
    num_prompts, prompt_slots = prompts.tokens.shape
    rows = num_prompts * group_size
    cap = max_completion_length
    keys = key if key.ndim else jax.vmap(
        lambda b: jax.random.fold_in(key, b))(jnp.arange(rows))
    logits, cache = _prefill(model, params, prompts)
    widen = lambda x: jnp.repeat(x, group_size, axis=0)
    prompts = jax.tree.map(widen, prompts)
    state = _State(
        t=jnp.int32(0), done=jnp.zeros(rows, bool), logits=widen(logits),
        lengths=jnp.zeros(rows, jnp.int32),
        tokens=jnp.full((rows, cap), pad_id, jnp.int32),
        logprobs=jnp.zeros((rows, cap), jnp.float32),
        cache=cache.repeat(group_size), keys=keys, prompt_mask=prompts.mask)
    for start, end in itertools.pairwise(_stretches(cap)):
      state = state.replace(cache=state.cache.grow(prompt_slots + end))
      state = decode_stretch(params, state, how, start, end)
    mask = jnp.arange(cap)[None] < state.lengths[:, None]
    return types.Rollout(
        prompt_tokens=prompts.tokens, prompt_mask=prompts.mask,
        completion_tokens=state.tokens, completion_mask=mask,
        action_mask=mask, sampler_logprobs=state.logprobs)

  if shardings is None:
    program = jax.jit(sample)
  else:
    params, prompts, batch = shardings
    program = jax.jit(sample, in_shardings=(params, prompts, *4 * [None]),
                      out_shardings=batch)

  def sampler(params: Any, prompts: types.Prompts, key: Array,
              temperature: Any, top_p: Any = 1.0,
              top_k: Any = 0) -> types.Rollout:
    # jit admits no defaults beside in_shardings.
    return program(params, prompts, key, temperature, np.float32(top_p),
                   np.int32(top_k))

  return sampler


def _stretches(cap: int) -> list[int]:
  """Where stretches meet: 0, 64, 128, 192, 256, 384, 512, 768, … and the cap.

  Two an octave: a cap of 32,768 takes 18 stretches, each a program of its own,
  and no step attends to more than half as many slots again as it needs.
  """
  found = [0]
  while found[-1] < cap:
    size = max(_STRETCH, 1 << max(found[-1].bit_length() - 2, 0))
    found.append(min(found[-1] + size, cap))
  return found


def _prefill(model: Any, params: Any, prompts: types.Prompts) -> tuple:
  """Logits after each prompt [P, V] and the cache that holds the prompts."""
  rows, slots = prompts.tokens.shape
  cache = model.init_cache(rows, slots)
  hidden, cache = model.apply(
      {'params': params}, prompts.tokens,
      ops.positions_from_mask(prompts.mask), prompts.mask, cache)
  # Left padding: the last prompt slot is every row's last real token.
  logits = model.apply({'params': params}, hidden[:, -1], method='unembed')
  return logits, cache


def _key_mask(prompt_mask: Bool[Array, 'B L'], lengths: Int[Array, 'B'],
              slots: int) -> Bool[Array, 'B C']:
  """Real slots: the prompt's, and each row's tokens so far."""
  completion_slots = slots - prompt_mask.shape[1]
  written = jnp.arange(completion_slots)[None] < lengths[:, None]
  return jnp.concatenate([prompt_mask, written], axis=1)


def _sample_token(
    logits: Float[Array, 'B V'], keys: Array, t: Int[Array, ''],
    temperature: Float[Array, ''], top_p: Float[Array, ''],
    top_k: Int[Array, ''],
) -> tuple[Int[Array, 'B'], Float[Array, 'B']]:
  """Tokens and their log-probs at this temperature.

  One uniform number a row against the cumulated probabilities: Gumbel noise
  for a large vocabulary costs more than the rest of the step on a CPU.
  """
  greedy = temperature == 0
  logprobs = jax.nn.log_softmax(
      logits / jnp.where(greedy, 1.0, temperature), axis=-1)
  draws = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, t)))(
      keys)
  # A branch, not a mask of all ones: sorting would cost more than the draw.
  tokens = jax.lax.cond(
      ~greedy & ((top_p < 1) | (top_k > 0)),
      lambda: _draw_likeliest(logprobs, draws, top_p, top_k),
      lambda: _draw(jnp.cumsum(jnp.exp(logprobs), axis=-1), draws))
  tokens = jnp.where(greedy, jnp.argmax(logits, axis=-1), tokens)
  tokens = tokens.astype(jnp.int32)
  return tokens, jnp.take_along_axis(logprobs, tokens[:, None], axis=1)[:, 0]


def _draw(cumulated: Float[Array, 'B V'],
          draws: Float[Array, 'B']) -> Int[Array, 'B']:
  """The entry of each row in whose share of the mass the draw falls."""
  # Against the total, which float32 leaves a little beside 1.
  thresholds = draws * cumulated[:, -1]
  found = jnp.sum(cumulated <= thresholds[:, None], axis=-1, dtype=jnp.int32)
  return jnp.minimum(found, cumulated.shape[1] - 1)


def _draw_likeliest(
    logprobs: Float[Array, 'B V'], draws: Float[Array, 'B'],
    top_p: Float[Array, ''], top_k: Int[Array, ''],
) -> Int[Array, 'B']:
  """Draws from the top k, and of these from the nucleus of mass top_p.

  The nucleus is the smallest set of likeliest tokens whose share of the mass
  reaches top_p, the token that crosses it included (arXiv:1904.09751). Equal
  tokens stay in the order of their ids.
  """
  order = jnp.argsort(-logprobs, axis=-1, stable=True)
  masses = jnp.exp(jnp.take_along_axis(logprobs, order, axis=1))
  rank = jnp.arange(masses.shape[1])[None]
  masses = jnp.where((top_k <= 0) | (rank < top_k), masses, 0.0)
  cumulated = jnp.cumsum(masses, axis=-1)
  # Against the mass before a token: a token crosses where it starts below.
  below = cumulated - masses < top_p * cumulated[:, -1:]
  kept = (rank == 0) | (top_p >= 1) | below
  places = _draw(jnp.cumsum(jnp.where(kept, masses, 0.0), axis=-1), draws)
  return jnp.take_along_axis(order, places[:, None], axis=1)[:, 0]
