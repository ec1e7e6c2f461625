# SPDX-License-Identifier: Apache-2.0
"""Group Relative Policy Optimization: scoring and the sharded update.

  L = Σ_bt w_bt · ( −min(ρA, clip(ρ, 1−ε₋, 1+ε₊)A) + β · k3 ),
  ρ = exp(logπ − logπ_old),   Σ w = 1                      (arXiv:2402.03300)

The weights w exist before the batch is cut, so the gradients of microbatches
simply add: neither their size nor the number of devices changes the sum. What
they weigh may be another loss of the field, see `objective`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float
import numpy as np
import optax

from lapo_jax import forward as forward_lib
from lapo_jax import losses, objective, ops, types

# A token counts as outside where π_old / π_sampler leaves these bounds.
_RATIO_BOUNDS = (0.8, 1.25)
# Averages over tokens, each counting the same, whatever the loss weighs.
_PER_TOKEN = ('policy/entropy', 'policy/clip_fraction', 'policy/kl',
              'policy/sampler_kl', 'policy/sampler_ratio_mean',
              'policy/sampler_ratio_outside')


def make_batch_fn(aggregate: str, shardings: Any = None) -> Callable:
  """A jitted `(rollout, advantages [P, G], slots, trained, dropped) -> Batch`.

  Args:
    aggregate: how tokens are weighed, see `losses.token_weights`.
    shardings: of the batch; None on one device.

  Returns:
    The function. The batch is not scored yet. It cuts the completions to
    `slots` slots, a Python int; what is cut must be padding. Tokens where
    `trained`, bool [B, T], is false have advantage 0, and weigh what they
    would; None = all are trained on. Completions where `dropped`, bool [P, G],
    is true are left out of the loss, numerator and denominator; None = none.
    In their group's advantages they count.
  """

  def make_batch(rollout, advantages, slots, trained=None, dropped=None):
    # Before the cut: 'constant' divides by the cap.
    keep = None if dropped is None else ~ops.to_batch(dropped)
    weights = losses.token_weights(rollout.action_mask, aggregate, keep)
    advantages = ops.to_batch(advantages)
    if trained is not None:
      advantages = jnp.where(trained, advantages[:, None], 0.0)
    return _crop(types.Batch(
        rollout=rollout, advantages=advantages,
        old_logprobs=None, ref_logprobs=None, weights=weights), slots)

  return jax.jit(make_batch, static_argnums=2, out_shardings=shardings)


def make_split_fn(shardings: Any = None) -> Callable:
  """A jitted `(batch, num_short, slots) -> (short, long)`: rows by length.

  The `num_short` shortest completions (a Python int) are cut to `slots`
  slots, which must hold them; the others stay as they are. The update then
  pays for two lengths instead of the longest alone, and its sums are the same.
  """

  def split(batch, num_short, slots):
    lengths = jnp.sum(batch.rollout.completion_mask, axis=1)
    order = jnp.argsort(lengths, stable=True)
    short, long = (jax.tree.map(lambda x, rows=rows: x[rows], batch)
                   for rows in (order[:num_short], order[num_short:]))
    return _crop(short, slots), long

  return jax.jit(split, static_argnums=(1, 2), out_shardings=shardings)


def make_score_fn(model: Any, *, temperature: float, microbatch_size: int,
                  shardings: tuple[Any, Any] | None = None) -> Callable:
  """A jitted `(params, rollout) -> log-probs float32 [B, T]`.

  Args:
    model: a model family's module.
    temperature: of sampling: the policy is softmax(logits / temperature).
    microbatch_size: rows that are scored at once.
    shardings: of params and of the batch; None on one device.
  """
  forward = forward_lib.make(model, shardings, temperature=temperature)

  def score(params: Any, rollout: types.Rollout) -> Array:
    ready = forward.ready(params)

    def of(part):
      run = lambda: _logprobs(forward, ready, part)[0]
      nothing = lambda: jnp.zeros(part.completion_tokens.shape, jnp.float32)
      return _if_filled(part, run, nothing)

    return _uncut(jax.lax.map(of, _cut(rollout, microbatch_size)))

  if shardings is None:
    return jax.jit(score)
  params, batch = shardings
  return jax.jit(score, in_shardings=shardings, out_shardings=batch)


def make_update_fn(
    model: Any, optimizer: optax.GradientTransformation, *,
    temperature: float, microbatch_size: int,
    shardings: tuple[Any, Any] | None = None, **loss: Any) -> Callable:
  """A jitted `(TrainState, batch) -> (TrainState, metrics)`; donates the state.

  The batch is a Batch, or a tuple of those that `make_split_fn` makes of one.

  A non-finite loss or gradient leaves parameters and optimizer as they were,
  bit for bit, and adds one to `state.nonfinite`; a good one sets it to 0.

  Args:
    model: a model family's module.
    optimizer: any optax transformation.
    temperature: of sampling.
    microbatch_size: rows whose gradient is taken at once.
    shardings: of the state and of the batch; None on one device.
    **loss: settings of `objective.make_objective_fn`.

  Returns:
    The update. Its metrics are float32 []: update/{loss, grad_norm}; and over
    the tokens that the policy chose, whose number is update/tokens, int32 [],
    each counting the same whatever the loss weighs: policy/{entropy,
    clip_fraction, kl, sampler_kl}, in nats a token but the second, and
    policy/sampler_ratio_{mean, max, outside} of π_old / π_sampler, the last
    the share of tokens outside [0.8, 1.25]. `merge` joins several updates'.
  """
  per_token_fn = objective.make_objective_fn(**loss)
  places = shardings and (shardings[0].params, shardings[1])
  forward = forward_lib.make(model, places, temperature=temperature)

  def loss_fn(ready, part, covarying):
    mask = part.rollout.action_mask
    logprobs, entropies = _logprobs(forward, ready, part.rollout)
    old_logprobs = part.old_logprobs
    if old_logprobs is None:
      old_logprobs = jax.lax.stop_gradient(logprobs)
    per_token, found = per_token_fn(logprobs, part, covarying)
    value = jnp.sum(part.weights * per_token)
    summed = lambda x: jnp.sum(jnp.where(mask, x, 0.0))
    sampler_logprobs = part.rollout.sampler_logprobs
    sampler_kl = losses.k3_kl(sampler_logprobs, old_logprobs, mask)
    ratio_sums, ratio_max = _ratios(old_logprobs, sampler_logprobs, mask)
    return value, ({
        'update/loss': value,
        'policy/entropy': summed(entropies),
        **jax.tree.map(summed, found),
        'policy/sampler_kl': summed(sampler_kl),
        **ratio_sums,
    }, ratio_max)

  def update(state: types.TrainState,
             batch: types.Batch | tuple[types.Batch, ...]):
    gradient = jax.grad(loss_fn, has_aux=True)
    parts = batch if isinstance(batch, tuple) else (batch,)
    # Once for all microbatches.
    ready, covarying = forward.ready(state.params), None
    share = loss.get('kl_cov_share', 0.0)
    if share and parts[0].old_logprobs is not None:
      covarying = objective.most_covarying(parts, share)

    def add(total, part):

      def run():
        grads, (sums, ratio_max) = gradient(ready, part, covarying)
        return (forward.add(total[0], grads),
                jax.tree.map(jnp.add, total[1], sums)), ratio_max

      return _if_filled(part.rollout, run, lambda: (total, jnp.float32(0)))

    cuts = [_cut(part, microbatch_size) for part in parts]
    first = jax.tree.map(lambda x: x[0], cuts[0])
    sums = jax.eval_shape(loss_fn, ready, first, covarying)[1][0]
    total = (forward.zeros(ready),
             jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), sums))
    ratio_max = []
    for cut in cuts:
      total, found = jax.lax.scan(add, total, cut)
      ratio_max.append(jnp.max(found))
    grads, metrics = forward.restore(total[0], state.params), total[1]
    tokens = jnp.maximum(metrics['update/tokens'], 1)
    metrics |= {name: metrics[name] / tokens for name in _PER_TOKEN}
    metrics['policy/sampler_ratio_max'] = jnp.max(jnp.stack(ratio_max))

    grad_norm = optax.global_norm(grads)
    finite = jnp.isfinite(grad_norm) & jnp.isfinite(metrics['update/loss'])
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    keep = lambda new, old: jnp.where(finite, new, old)
    return state.replace(
        params=jax.tree.map(keep, params, state.params),
        opt_state=jax.tree.map(keep, opt_state, state.opt_state),
        nonfinite=jnp.where(finite, 0, state.nonfinite + 1),
    ), {**metrics, 'update/grad_norm': grad_norm}

  if shardings is None:
    return jax.jit(update, donate_argnums=0)
  state, batch = shardings
  return jax.jit(update, in_shardings=shardings, out_shardings=(state, None),
                 donate_argnums=0)


def merge(updates: Sequence[Mapping[str, Any]]) -> dict[str, float]:
  """The metrics of a step from those of its updates, without update/tokens.

  Means over the updates; of policy/* the maximum, or what the tokens of all
  updates have together, however many each update has.
  """
  updates = jax.device_get(list(updates))
  columns = {name: np.array([found[name] for found in updates], np.float64)
             for name in updates[0]}
  tokens = columns.pop('update/tokens')
  shares = tokens / max(tokens.sum(), 1)
  merged = {name: values.mean() for name, values in columns.items()}
  merged |= {name: np.sum(shares * columns[name]) for name in _PER_TOKEN}
  merged['policy/sampler_ratio_max'] = columns['policy/sampler_ratio_max'].max()
  return {name: float(value) for name, value in merged.items()}


def minibatches(batch: types.Batch, num_epochs: int, num_minibatches: int,
                aggregate: str) -> Iterator[tuple[types.Batch, slice]]:
  """(part, its rows) of the batch in turn, as often as there are epochs.

  Part j holds rows j, j + n, …: every device keeps its own rows. Its token
  weights are what `aggregate` would give it alone: they sum to 1 again, and
  for 'constant' they divide by the part's own slots.
  """
  if num_minibatches == 1:
    for _ in range(num_epochs):
      yield batch, slice(None)
    return
  for _ in range(num_epochs):
    for j in range(num_minibatches):
      # Not x[j::n]: XLA would gather the strided rows on every device.
      part = jax.tree.map(
          lambda x, j=j: x.reshape(-1, num_minibatches, *x.shape[1:])[:, j],
          batch)
      rows = slice(j, None, num_minibatches)
      share = 1 / num_minibatches
      if aggregate != 'constant':
        share = jnp.sum(part.weights) / jnp.sum(batch.weights)
        share = jnp.where(share > 0, share, 1)
      yield part.replace(weights=part.weights / share), rows


def _logprobs(
    forward: forward_lib.Forward, ready: Any, rollout: types.Rollout,
) -> tuple[Float[Array, 'B T'], Float[Array, 'B T']]:
  """Log-probs of the completions and the entropies of their slots."""
  tokens = jnp.concatenate(
      [rollout.prompt_tokens, rollout.completion_tokens], axis=1)
  keep, segments = rollout.completion_mask, rollout.segments
  if segments is None:
    mask = jnp.concatenate([rollout.prompt_mask, keep], axis=1)
    segments = mask.astype(jnp.int32)
  found = forward(ready, tokens, segments, rollout.prompt_tokens.shape[1])
  logprobs, entropies = (jnp.where(keep, x, 0.0) for x in found)
  return logprobs, entropies


def _if_filled(rollout: types.Rollout, run: Callable, nothing: Callable) -> Any:
  """What `run` gives, and `nothing` where packing left all rows empty."""
  if rollout.segments is None:
    return run()
  return jax.lax.cond(jnp.any(rollout.segments), run, nothing)


def _ratios(
    old_logprobs: Float[Array, 'B T'], sampler_logprobs: Float[Array, 'B T'],
    mask: Bool[Array, 'B T'],
) -> tuple[dict[str, Array], Float[Array, '']]:
  """What π_old / π_sampler is, summed over the tokens, and its maximum.

  Sums, since those of microbatches add; without any token all are 0.
  """
  ratio = losses.importance_weights(old_logprobs, sampler_logprobs, mask)
  low, high = _RATIO_BOUNDS
  outside = mask & ((ratio < low) | (ratio > high))
  return {
      'policy/sampler_ratio_mean': jnp.sum(ratio),
      'policy/sampler_ratio_outside': jnp.sum(outside, dtype=jnp.int32),
      'update/tokens': jnp.sum(mask, dtype=jnp.int32),
  }, jnp.max(ratio)


def _crop(batch: types.Batch, slots: int) -> types.Batch:
  """The batch with `slots` completion slots."""
  cut = lambda x: None if x is None else x[:, :slots]
  rollout, advantages = batch.rollout, batch.advantages
  return batch.replace(
      advantages=cut(advantages) if advantages.ndim == 2 else advantages,
      old_logprobs=cut(batch.old_logprobs),
      ref_logprobs=cut(batch.ref_logprobs), weights=cut(batch.weights),
      rollout=rollout.replace(
          completion_tokens=cut(rollout.completion_tokens),
          completion_mask=cut(rollout.completion_mask),
          action_mask=cut(rollout.action_mask),
          sampler_logprobs=cut(rollout.sampler_logprobs)))


def _cut(tree: Any, size: int) -> Any:
  """[B, …] -> [B/size, size, …]; microbatch j holds rows j, j + B/size, …"""

  def cut(x):
    parts = x.shape[0] // size
    return x.reshape(size, parts, *x.shape[1:]).swapaxes(0, 1)

  return jax.tree.map(cut, tree)


def _uncut(x: Array) -> Array:
  """What `_cut` did, undone."""
  return x.swapaxes(0, 1).reshape(-1, *x.shape[2:])
