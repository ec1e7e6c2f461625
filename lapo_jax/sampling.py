# SPDX-License-Identifier: Apache-2.0
"""Sampling groups of completions with a KV cache.

Each prompt is prefilled once; its keys and values serve its G completions.
Decoding writes one token a step until every completion has stopped, in
stretches over which the cache and the number of decoded rows are fixed. At the
start of a stretch the cache grows by what the stretch needs, and rows that
have stopped are left out: the cost of a step follows the live lengths and the
live rows rather than the cap and the batch.

A completion is a function of (parameters, prompt, key, its number b, …):
its randomness is fold_in(fold_in(key, b), t), so neither batch mates nor the
mesh change it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lapo_jax import ops, types

# Steps of a stretch, and slots by which the cache grows for it.
_STRETCH = 64
# A stretch decodes this share of the rows, the least that holds the live ones.
_SHARES = (1 / 8, 3 / 8, 1)


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
  """A jitted `(params, prompts, key, temperature) -> Rollout`.

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
    The sampler. `temperature` is a traced float32 []; 0 is greedy. The
    log-probs are those of softmax(logits / temperature), of softmax(logits)
    when greedy.
  """
  eos = jnp.asarray(eos_ids, jnp.int32)
  # To leave out rows is to move rows: between devices that costs too much.
  parts = 1 if shardings is None else shardings[2].num_devices

  def step(params: Any, state: _State, temperature: Array) -> _State:
    """Samples a token for every row and runs the model on it."""
    tokens, logprobs = _sample_token(state.logits, state.keys, state.t,
                                     temperature)
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

  def decode(params: Any, state: _State, temperature: Array,
             end: int) -> _State:
    """Steps until every row has stopped or slot `end` is reached."""
    return jax.lax.while_loop(
        lambda s: ~jnp.all(s.done) & (s.t < end),
        lambda s: step(params, s, temperature), state)

  def decode_live(params: Any, state: _State, temperature: Array,
                  end: int) -> _State:
    """`decode` of no more rows than it takes to hold the live ones."""
    rows = state.done.shape[0]
    sizes = sorted({max(1, int(share * rows)) for share in _SHARES})

    def decode_some(size):
      if size == rows:
        return lambda: decode(params, state, temperature, end)
      live = jnp.argsort(state.done, stable=True)[:size]
      return lambda: state.put(
          live, decode(params, state.take(live), temperature, end))

    needed = jnp.searchsorted(jnp.array(sizes), jnp.sum(~state.done))
    return jax.lax.switch(needed, [decode_some(size) for size in sizes])

  def sample(params: Any, prompts: types.Prompts, key: Array,
             temperature: Array) -> types.Rollout:
    num_prompts, prompt_slots = prompts.tokens.shape
    rows = num_prompts * group_size
    cap = max_completion_length
    keys = jax.vmap(lambda b: jax.random.fold_in(key, b))(jnp.arange(rows))
    logits, cache = _prefill(model, params, prompts)
    widen = lambda x: jnp.repeat(x, group_size, axis=0)
    prompts = jax.tree.map(widen, prompts)
    state = _State(
        t=jnp.int32(0), done=jnp.zeros(rows, bool), logits=widen(logits),
        lengths=jnp.zeros(rows, jnp.int32),
        tokens=jnp.full((rows, cap), pad_id, jnp.int32),
        logprobs=jnp.zeros((rows, cap), jnp.float32),
        cache=cache.repeat(group_size), keys=keys, prompt_mask=prompts.mask)
    for start in range(0, cap, _STRETCH):
      end = min(start + _STRETCH, cap)
      state = state.replace(cache=state.cache.grow(prompt_slots + end))
      run = decode_live if start and parts == 1 else decode
      state = run(params, state, temperature, end)
    mask = jnp.arange(cap)[None] < state.lengths[:, None]
    return types.Rollout(
        prompt_tokens=prompts.tokens, prompt_mask=prompts.mask,
        completion_tokens=state.tokens, completion_mask=mask,
        action_mask=mask, sampler_logprobs=state.logprobs)

  if shardings is None:
    return jax.jit(sample)
  params, prompts, batch = shardings
  return jax.jit(sample, in_shardings=(params, prompts, None, None),
                 out_shardings=batch)


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
    temperature: Float[Array, ''],
) -> tuple[Int[Array, 'B'], Float[Array, 'B']]:
  """Tokens and their log-probs at this temperature.

  One uniform number a row against the cumulated probabilities: Gumbel noise
  for a large vocabulary costs more than the rest of the step on a CPU.
  """
  greedy = temperature == 0
  logprobs = jax.nn.log_softmax(
      logits / jnp.where(greedy, 1.0, temperature), axis=-1)
  cumulated = jnp.cumsum(jnp.exp(logprobs), axis=-1)
  draw = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, t)))
  # Against the total, which float32 leaves a little beside 1.
  thresholds = draw(keys) * cumulated[:, -1]
  tokens = jnp.sum(cumulated <= thresholds[:, None], axis=-1, dtype=jnp.int32)
  tokens = jnp.minimum(tokens, logits.shape[1] - 1)
  tokens = jnp.where(greedy, jnp.argmax(logits, axis=-1), tokens)
  tokens = tokens.astype(jnp.int32)
  return tokens, jnp.take_along_axis(logprobs, tokens[:, None], axis=1)[:, 0]
