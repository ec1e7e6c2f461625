# SPDX-License-Identifier: Apache-2.0
"""The update against plain policy gradients, torch, and its own cuts."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lapo_jax import grpo, losses, ops, sharding, stacking, types
from lapo_jax.models import qwen2

P, G, B, L, T = 8, 2, 16, 5, 8
VOCAB = 64
LENGTHS = np.array([8, 1, 5, 3, 8, 2, 7, 4, 6, 1, 8, 3, 5, 2, 7, 6])
ADVANTAGES = np.random.default_rng(7).normal(size=(P, G)).astype(np.float32)

# An optimizer that moves nothing and keeps the gradient as its state.
CAPTURE = optax.GradientTransformation(
    lambda params: jax.tree.map(jnp.zeros_like, params),
    lambda grads, state, params=None: (jax.tree.map(jnp.zeros_like, grads),
                                       grads))


def make_rollout(lengths=LENGTHS, slots=T):
  """Random prompts and completions; what pads them is random too."""
  rng = np.random.default_rng(0)
  prompt_lengths = rng.integers(1, L + 1, len(lengths))
  prompts = rng.integers(0, VOCAB, (len(lengths), L)).astype(np.int32)
  completions = rng.integers(0, VOCAB, (len(lengths), T)).astype(np.int32)
  completions = np.pad(completions, ((0, 0), (0, slots - T)),
                       constant_values=VOCAB - 1)
  # About what the tiny model gives: some are nearer to it than others.
  sampler_logprobs = np.pad(rng.normal(-4.2, 0.3, (len(lengths), T)),
                            ((0, 0), (0, slots - T)))
  mask = np.arange(slots) < np.asarray(lengths)[:, None]
  return types.Rollout(
      prompt_tokens=prompts,
      prompt_mask=np.arange(L) >= L - prompt_lengths[:, None],
      completion_tokens=completions, completion_mask=mask, action_mask=mask,
      sampler_logprobs=np.where(mask, sampler_logprobs, 0.0).astype(np.float32))


def make_batch(rollout=None, aggregate='sequence', advantages=ADVANTAGES):
  rollout = make_rollout() if rollout is None else rollout
  slots = rollout.completion_tokens.shape[1]
  return grpo.make_batch_fn(aggregate)(rollout, jnp.asarray(advantages), slots)


def make_state(params, optimizer=CAPTURE):
  """A state of its own copies, since the update donates it."""
  params = jax.tree.map(jnp.array, params)
  # Each scalar is a buffer of its own: none may be donated twice.
  return types.TrainState(
      step=jnp.int32(0), stage=jnp.int32(0), nonfinite=jnp.int32(0),
      params=params, opt_state=optimizer.init(params), reward_state=())


def host(tree):
  return jax.tree.map(np.asarray, tree)


def distance(a, b):
  """‖a − b‖ / ‖b‖ over whole trees."""
  norm = lambda tree: np.sqrt(sum(np.sum(np.square(x, dtype=np.float64))
                                  for x in jax.tree.leaves(host(tree))))
  return norm(jax.tree.map(lambda x, y: np.asarray(x, np.float64) - y,
                           host(a), host(b))) / norm(b)


def assert_near(metrics, expected):
  assert metrics.keys() == expected.keys()
  for name, value in expected.items():
    assert float(metrics[name]) == pytest.approx(
        float(value), rel=1e-5, abs=1e-6), name


def assert_same_bits(a, b):
  jax.tree.map(np.testing.assert_array_equal, host(a), host(b))


@pytest.fixture(scope='module')
def model(tiny_model):
  # One layer has every kind of parameter, and half the compile time of two.
  return tiny_model.clone(num_layers=1)


@pytest.fixture(scope='module')
def params(model, make_params):
  return jax.tree.map(jnp.asarray, make_params(model))


@pytest.fixture(scope='module')
def gradient_of(model, params):
  """(batch, …) -> (gradient, metrics); each shape is compiled once."""
  updates = {}

  def gradient(batch, microbatch_size=B, **settings):
    name = (microbatch_size, *sorted(settings.items()))
    if name not in updates:
      updates[name] = grpo.make_update_fn(
          model, CAPTURE, temperature=1.0,
          microbatch_size=microbatch_size, **settings)
    state, metrics = updates[name](make_state(params), batch)
    return host(state.opt_state), host(metrics)

  return gradient


@pytest.fixture(scope='module')
def score(model):
  """The scorer, four rows at once."""
  return grpo.make_score_fn(model, temperature=1.0, microbatch_size=4)


@pytest.fixture(scope='module')
def descend(model, params):
  """batch -> (state, metrics) after a step of plain descent."""
  sgd = optax.sgd(1e-2)
  update = grpo.make_update_fn(model, sgd, temperature=1.0, microbatch_size=8)
  return lambda batch: update(make_state(params, sgd), batch)


@pytest.fixture(scope='module')
def whole(gradient_of):
  """Gradient and metrics of the batch in one piece, on one device."""
  return gradient_of(make_batch())


@pytest.fixture(scope='module')
def oracle(model, params):
  """The gradient of −Σ w·A·log π, written anew: slot by slot, no ratio."""

  def loss(params, rollout, weights):
    tokens = jnp.concatenate([rollout.prompt_tokens, rollout.completion_tokens],
                             axis=1)
    mask = jnp.concatenate([rollout.prompt_mask, rollout.completion_mask], 1)
    hidden, _ = model.apply({'params': params}, tokens,
                                 ops.positions_from_mask(mask), mask)
    logits = model.apply({'params': params}, hidden, method='unembed')
    logprobs = jax.nn.log_softmax(logits)
    total = 0.0
    for t in range(T):
      chosen = logprobs[jnp.arange(B), L + t - 1,
                        rollout.completion_tokens[:, t]]
      total -= jnp.sum(weights[:, t] * ADVANTAGES.ravel() * chosen)
    return total

  weights = np.zeros((B, T), np.float32)
  for row, length in enumerate(LENGTHS):
    weights[row, :length] = 1 / (length * B)
  return host(jax.jit(jax.grad(loss))(params, make_rollout(), weights))


# ---- The gradient.


def test_on_policy_it_is_the_plain_policy_gradient(whole, oracle):
  gradient, metrics = whole
  assert distance(gradient, oracle) < 1e-5
  assert metrics['policy/clip_fraction'] == 0
  assert metrics['policy/kl'] == 0
  # Each ratio is 1: the loss is −Σ w·A, whatever the policy.
  assert metrics['update/loss'] == pytest.approx(-ADVANTAGES.mean(), abs=1e-6)
  norm = np.sqrt(sum(np.sum(x**2) for x in jax.tree.leaves(gradient)))
  assert metrics['update/grad_norm'] == pytest.approx(norm, rel=1e-5)


def test_rescored_old_log_probs_are_as_good_as_none(score, params, gradient_of,
                                                    whole):
  batch = make_batch()
  old = score(params, batch.rollout)
  gradient, metrics = gradient_of(batch.replace(old_logprobs=old))
  assert distance(gradient, whole[0]) < 1e-5
  assert metrics['policy/clip_fraction'] == 0
  # A sampler that agrees with the scorer is at no distance from it.
  same = batch.rollout.replace(sampler_logprobs=old)
  _, metrics = gradient_of(batch.replace(old_logprobs=old, rollout=same))
  assert abs(metrics['policy/sampler_kl']) < 1e-6


def test_microbatches_add_up_to_the_whole(gradient_of, score, params):
  batch = make_batch()
  # Off-policy and against a reference: no metric is 0.
  old = score(params, batch.rollout)
  off = np.random.default_rng(0).normal(size=old.shape)
  batch = batch.replace(old_logprobs=old + 0.3 * off, ref_logprobs=old - off)
  gradient, metrics = gradient_of(batch, microbatch_size=1, kl_coef=0.1)
  expected = gradient_of(batch, kl_coef=0.1)
  assert distance(gradient, expected[0]) < 1e-6
  assert_near(metrics, expected[1])
  assert metrics['policy/kl'] > 0.1 and metrics['policy/clip_fraction'] > 0.1


def test_scores_do_not_depend_on_the_microbatch(score, model, params):
  rollout = make_rollout()
  by_four = np.asarray(score(params, rollout))
  at_once = grpo.make_score_fn(model, temperature=1.0, microbatch_size=B)
  np.testing.assert_allclose(by_four, at_once(params, rollout), atol=1e-5)
  assert (by_four[~rollout.completion_mask] == 0).all()


def shardings_of(model, mesh, optimizer=CAPTURE, stacked=False):
  """As `build` lays them out: of the state and of the batch."""
  shapes = qwen2.init_shapes(model)
  params = sharding.partition(qwen2.PARTITION_RULES, shapes, mesh)
  if stacked:
    shapes = stacking.shapes(model, shapes)
    params = stacking.places(model, params)
  once = sharding.replicated(mesh)
  return types.TrainState(
      step=once, stage=once, nonfinite=once, params=params,
      opt_state=sharding.partition_like(
          params, jax.eval_shape(optimizer.init, shapes), mesh),
      reward_state=()), sharding.batch(mesh)


def put(state, places):
  return jax.tree.map(jax.device_put, state, places)


@pytest.mark.parametrize('axes,size', [
    (dict(data=8), 8), (dict(fsdp=8), 16), (dict(data=2, fsdp=2, tensor=2), 4),
    (dict(data=2, sequence=2, tensor=2), 4),
], ids=str)
def test_eight_devices_are_one(model, params, whole, axes, size):
  mesh = sharding.make_mesh(**{'data': 1, **axes})
  places = shardings_of(model, mesh)
  update = grpo.make_update_fn(model, CAPTURE, temperature=1.0,
                               microbatch_size=size, shardings=places)
  rollout = sharding.to_global(make_rollout(), places[1])
  advantages = sharding.to_global(ADVANTAGES, sharding.replicated(mesh))
  batch = grpo.make_batch_fn('sequence', shardings=places[1])(
      rollout, advantages, T)
  state, metrics = update(put(make_state(params), places[0]), batch)
  assert distance(state.opt_state, whole[0]) < 1e-6
  assert_near(metrics, whole[1])
  for x, place in zip(jax.tree.leaves(state), jax.tree.leaves(places[0]),
                      strict=True):
    assert x.sharding.is_equivalent_to(place, x.ndim)


@pytest.fixture(scope='module')
def two_layers(tiny_model, make_params):
  """A model of two layers, its parameters, and the whole's gradient."""
  params = jax.tree.map(jnp.asarray, make_params(tiny_model))
  update = grpo.make_update_fn(tiny_model, CAPTURE, temperature=1.0,
                               microbatch_size=B)
  state, metrics = update(make_state(params), make_batch())
  return tiny_model, params, host(state.opt_state), host(metrics)


def stacked_state(model, params, optimizer=CAPTURE):
  return make_state(stacking.stack(model, jax.tree.map(jnp.array, params)),
                    optimizer)


@pytest.mark.parametrize('axes', [None, dict(data=2, fsdp=2, tensor=2)],
                         ids=str)
def test_one_loop_over_the_layers_gives_the_same_step(two_layers, axes):
  model, params, wanted, metrics = two_layers
  mesh = None if axes is None else sharding.make_mesh(**axes)
  places = mesh and shardings_of(model, mesh, stacked=True)
  update = grpo.make_update_fn(
      model.clone(remat='full'), CAPTURE, temperature=1.0, microbatch_size=4,
      shardings=places)
  batch, state = make_batch(), stacked_state(model, params)
  if mesh:
    batch, state = jax.device_put(host(batch), places[1]), put(state, places[0])
  state, found = update(state, batch)
  assert distance(model.unstack(host(state.opt_state)), wanted) < 2e-6
  assert_near(found, metrics)
  if mesh:
    for x, place in zip(jax.tree.leaves(state), jax.tree.leaves(places[0]),
                        strict=True):
      assert x.sharding.is_equivalent_to(place, x.ndim)


def test_programs_of_stacked_layers_do_not_grow_with_their_number(
    two_layers):
  model, batch = two_layers[0].clone(remat='full'), make_batch()
  optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
  sizes = set()
  for num_layers in (2, 5):
    model = model.clone(num_layers=num_layers)
    state = jax.eval_shape(lambda params: make_state(params, optimizer),
                           stacking.shapes(model, qwen2.init_shapes(model)))
    settings = dict(temperature=1.0, microbatch_size=4)
    programs = (
        grpo.make_score_fn(model, **settings).lower(state.params,
                                                    batch.rollout),
        grpo.make_update_fn(model, optimizer, **settings).lower(state, batch))
    sizes.add(tuple(len(program.as_text().splitlines())
                    for program in programs))
  assert len(sizes) == 1


def test_bfloat16_gradients_are_summed_in_float32(two_layers):
  model, params, wanted, _ = two_layers
  half = model.clone(dtype=jnp.bfloat16)
  update = lambda model: grpo.make_update_fn(
      model, CAPTURE, temperature=1.0, microbatch_size=1)
  found = model.unstack(host(update(half)(
      stacked_state(model, params), make_batch())[0].opt_state))
  assert {x.dtype for x in jax.tree.leaves(found)} == {np.dtype('float32')}
  assert distance(found, wanted) < 0.05
  # A sum of sixteen in bfloat16 would have no bits beyond the first eight.
  kernel = found['layers_1']['mlp']['up']['kernel']
  assert np.mean(kernel == kernel.astype(jnp.bfloat16)) < 0.1
  # Parameters in bfloat16 keep their dtype, as the optimizer's state does.
  low = stacked_state(model, jax.tree.map(lambda x: x.astype(jnp.bfloat16),
                                          host(params)))
  after, _ = jax.eval_shape(update(half.clone(param_dtype=jnp.bfloat16)), low,
                            make_batch())
  assert jax.tree.map(lambda x: x.dtype, after) == jax.tree.map(
      lambda x: x.dtype, low)


def test_rows_split_by_length_add_up_to_the_whole(gradient_of, whole):
  batch = make_batch().replace(old_logprobs=jnp.zeros((B, T)))
  short, long = grpo.make_split_fn()(batch, 8, 5)
  assert short.weights.shape == (8, 5) and long.weights.shape == (8, T)
  assert short.old_logprobs.shape == (8, 5)
  # Nothing but padding is cut.
  lengths = [np.asarray(part.rollout.completion_mask).sum(-1)
             for part in (short, long)]
  np.testing.assert_array_equal(np.concatenate(lengths), np.sort(LENGTHS))
  on_policy = tuple(part.replace(old_logprobs=None) for part in (short, long))
  gradient, metrics = gradient_of(on_policy, microbatch_size=8)
  assert distance(gradient, whole[0]) < 1e-6
  assert_near(metrics, whole[1])


def test_padding_up_to_t_equal_to_b_changes_nothing(gradient_of, whole):
  # Square arrays: [B] along the wrong axis would go unnoticed.
  gradient, metrics = gradient_of(make_batch(make_rollout(slots=B)))
  assert distance(gradient, whole[0]) < 1e-6
  assert_near(metrics, whole[1])


def test_forced_tokens_are_attended_but_not_trained(gradient_of, whole):
  rollout = make_rollout()
  action_mask = rollout.action_mask & (np.arange(T) != 0)
  gradient, _ = gradient_of(make_batch(rollout.replace(
      action_mask=action_mask)))
  assert distance(gradient, whole[0]) > 1e-2
  # A forced token's row and column of the loss are gone, not its context.
  nothing, _ = gradient_of(make_batch(rollout.replace(
      action_mask=np.zeros_like(action_mask))))
  assert all((x == 0).all() for x in jax.tree.leaves(nothing))


def test_a_batch_without_a_token_has_an_exactly_zero_gradient(gradient_of):
  rollout = make_rollout(lengths=np.zeros(B, int))
  for aggregate in ('sequence', 'token', 'constant'):
    gradient, metrics = gradient_of(make_batch(rollout, aggregate))
    assert all((x == 0).all() for x in jax.tree.leaves(gradient))
    assert all(x == 0 for x in metrics.values())


@pytest.mark.parametrize('junk', [199.0, -np.inf, np.nan])
def test_padding_may_hold_anything(gradient_of, whole, score, params, junk):
  batch = make_batch()
  old = jnp.where(batch.rollout.action_mask, score(params, batch.rollout),
                  junk)
  gradient, metrics = gradient_of(batch.replace(old_logprobs=old))
  assert distance(gradient, whole[0]) < 1e-5
  assert np.isfinite(list(metrics.values())).all()


# ---- The step.


def test_zero_advantages_move_nothing(descend, params):
  state, metrics = descend(make_batch(advantages=np.zeros((P, G), np.float32)))
  assert_same_bits(state.params, params)
  assert metrics['update/grad_norm'] == 0


def test_a_step_makes_good_completions_likelier(descend, score, params):
  rollout = make_rollout()
  before = np.asarray(score(params, rollout)).sum(-1)
  for good in (3, 8):
    # All the others are neither good nor bad.
    advantages = np.zeros(B, np.float32)
    advantages[good] = 1.0
    change = {}
    for sign in (1.0, -1.0):
      state, _ = descend(make_batch(
          advantages=sign * advantages.reshape(P, G)))
      after = np.asarray(score(state.params, rollout)).sum(-1)
      change[sign] = after[good] - before[good]
    assert change[1.0] > 1e-4 and change[-1.0] < -1e-4


class Table:
  """A model whose parameters are the logits [B, S, V] themselves."""

  def apply(self, variables, *args, cache=None, method=None):
    if method == 'output_table':
      return jnp.eye(VOCAB)
    return variables['params']['logits'], None


def table_params(seed=1):
  return {'logits': jnp.asarray(np.random.default_rng(seed).normal(
      0, 2, (B, L + T, VOCAB)), jnp.float32)}


def table_batch(**fields):
  """Old and reference log-probs near those of the table."""
  batch = make_batch()
  rng = np.random.default_rng(2)
  here = grpo.make_score_fn(Table(), temperature=0.7, microbatch_size=B)(
      table_params(), batch.rollout)
  near = lambda scale: jnp.asarray(here + rng.normal(0, scale, here.shape),
                                   jnp.float32)
  return batch.replace(**{'old_logprobs': near(0.4), 'ref_logprobs': near(0.6),
                          **fields})


@pytest.mark.parametrize('cap', [0.0, 1.1])
def test_value_and_gradient_of_the_logits_are_torchs(cap):
  torch = pytest.importorskip('torch', reason='the oracle is torch')
  update = grpo.make_update_fn(
      Table(), CAPTURE, temperature=0.7, microbatch_size=B, clip_low=0.2,
      clip_high=0.28, kl_coef=0.1, importance_cap=cap)
  batch = table_batch()
  sampler_logprobs = np.random.default_rng(4).normal(
      batch.old_logprobs, 0.2).astype(np.float32)
  batch = batch.replace(rollout=batch.rollout.replace(
      sampler_logprobs=jnp.asarray(sampler_logprobs)))
  state, metrics = update(make_state(table_params()), batch)

  tensor = lambda x: torch.tensor(np.asarray(x))
  logits = tensor(table_params()['logits']).requires_grad_()
  tokens = tensor(batch.rollout.completion_tokens).long()
  mask = tensor(batch.rollout.completion_mask)
  logprobs = torch.log_softmax(logits[:, L - 1:-1] / 0.7, dim=-1)
  chosen = logprobs.gather(-1, tokens[..., None])[..., 0]
  ratio = (chosen - tensor(batch.old_logprobs)).exp()
  advantages = tensor(ADVANTAGES).reshape(B, 1)
  clipped = ratio.clamp(0.8, 1.28)
  surrogate = -torch.minimum(ratio * advantages, clipped * advantages)
  # TRL's order: weighted by the sampler's gap first, then the penalty.
  gap = (tensor(batch.old_logprobs) - tensor(sampler_logprobs)).exp()
  if cap:
    surrogate = surrogate * gap.clamp(max=cap)
  to_reference = tensor(batch.ref_logprobs) - chosen
  kl = to_reference.exp() - to_reference - 1
  average = lambda x: ((x * mask).sum(-1) / mask.sum(-1)).mean()
  loss = average(surrogate + 0.1 * kl)
  loss.backward()
  entropy = -(logprobs.exp() * logprobs).sum(-1)
  is_clipped = (((advantages > 0) & (ratio > 1.28)) |
                ((advantages < 0) & (ratio < 0.8)))
  assert 0.05 < is_clipped.float().mean() < 0.6
  outside = ((gap < 0.8) | (gap > 1.25))[mask].float()
  assert 0.05 < outside.mean() < 0.6
  for name, want in (('update/loss', loss),
                     # Tokens count the same from here on, not completions.
                     ('policy/entropy', entropy[mask].mean()),
                     ('policy/kl', kl[mask].mean()),
                     ('policy/clip_fraction', is_clipped[mask].float().mean()),
                     ('policy/sampler_ratio_mean', gap[mask].mean()),
                     ('policy/sampler_ratio_max', gap[mask].max()),
                     ('policy/sampler_ratio_outside', outside.mean()),
                     ('update/tokens', mask.sum())):
    assert float(metrics[name]) == pytest.approx(want.item(), rel=1e-5), name
  np.testing.assert_allclose(state.opt_state['logits'], logits.grad.numpy(),
                             rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize('aggregate', losses.AGGREGATES)
def test_muted_tokens_have_no_advantage_and_leave_the_others_their_weight(
    aggregate):
  rollout = make_rollout()
  trained = jnp.asarray(np.random.default_rng(5).random(
      rollout.action_mask.shape) < 0.4)
  make = lambda *trained: grpo.make_batch_fn(aggregate)(
      rollout, jnp.asarray(ADVANTAGES), T - 1, *trained)
  muted, whole = make(trained), make()
  kept = trained[:, :T - 1]
  np.testing.assert_array_equal(
      muted.advantages, np.where(kept, whole.advantages[:, None], 0))
  for (part, rows), (like, _) in zip(
      grpo.minibatches(muted, 1, 4, aggregate),
      grpo.minibatches(whole, 1, 4, aggregate), strict=True):
    np.testing.assert_array_equal(part.weights, like.weights)
    np.testing.assert_array_equal(
        part.advantages, np.where(kept[rows], like.advantages[:, None], 0))


@pytest.mark.parametrize('muted', [False, True])
@pytest.mark.parametrize('aggregate', losses.AGGREGATES)
def test_metrics_are_means_over_tokens_whatever_the_loss_weighs(
    aggregate, muted):
  rollout = make_rollout()
  trained = rollout.action_mask
  if muted:
    trained = trained & (jnp.arange(trained.shape[1])[None] % 2 == 0)
  batch = grpo.make_batch_fn(aggregate)(
      rollout, jnp.asarray(ADVANTAGES), trained.shape[1], trained)
  params = {'logits': jnp.zeros((B, L + T, VOCAB))}
  uniform = jnp.full(trained.shape, -np.log(VOCAB), jnp.float32)
  # The old policy was half as sure of each token, the reference twice.
  batch = batch.replace(
      old_logprobs=uniform - np.float32(np.log(2)),
      ref_logprobs=uniform + np.float32(np.log(2)))
  update = grpo.make_update_fn(Table(), CAPTURE, temperature=1.0,
                               microbatch_size=B, kl_coef=0.1)
  metrics = update(make_state(params), batch)[1]
  assert float(metrics['policy/entropy']) == pytest.approx(np.log(VOCAB))
  assert float(metrics['policy/kl']) == pytest.approx(1 - np.log(2), rel=1e-5)
  above = trained & (jnp.ravel(jnp.asarray(ADVANTAGES))[:, None] > 0)
  assert float(metrics['policy/clip_fraction']) == pytest.approx(
      np.asarray(above)[rollout.action_mask].mean())
  assert int(metrics['update/tokens']) == int(rollout.action_mask.sum())


def test_a_sampler_that_agrees_needs_no_correction():
  batch = table_batch(ref_logprobs=None)
  batch = batch.replace(rollout=batch.rollout.replace(
      sampler_logprobs=batch.old_logprobs))
  (plain, metrics), (capped, same) = (
      grpo.make_update_fn(Table(), CAPTURE, temperature=0.7, microbatch_size=B,
                          importance_cap=cap)(make_state(table_params()), batch)
      for cap in (0.0, 1.0))
  assert_same_bits(capped.opt_state, plain.opt_state)
  assert_same_bits(same, metrics)
  assert metrics['policy/sampler_ratio_mean'] == 1
  assert metrics['policy/sampler_ratio_max'] == 1
  assert metrics['policy/sampler_ratio_outside'] == 0


def test_temperature_divides_the_logits():
  rollout = make_rollout()
  score = grpo.make_score_fn(Table(), temperature=0.5, microbatch_size=B)
  want = jax.nn.log_softmax(table_params()['logits'][:, L - 1:-1] / 0.5)
  want = np.take_along_axis(np.asarray(want),
                            rollout.completion_tokens[..., None], -1)[..., 0]
  np.testing.assert_allclose(
      score(table_params(), rollout),
      np.where(rollout.completion_mask, want, 0), rtol=1e-5)


def test_the_penalty_is_added_and_pulls_to_the_reference():
  still = jnp.zeros(B)
  # The loss weighs as the metric does: by tokens.
  batch = table_batch(advantages=still, old_logprobs=None,
                      weights=make_batch(aggregate='token').weights)
  sgd = optax.sgd(20.0)
  ask = lambda coef: grpo.make_update_fn(
      Table(), sgd, temperature=0.7, microbatch_size=B, kl_coef=coef)
  without, free = ask(0.0)(make_state(table_params(), sgd),
                           batch.replace(ref_logprobs=None))
  assert free['update/loss'] == 0 and free['policy/kl'] == 0
  assert_same_bits(without.params, table_params())
  update = ask(0.5)
  state, first = update(make_state(table_params(), sgd), batch)
  _, second = update(state, batch)
  assert float(first['update/loss']) == pytest.approx(
      0.5 * float(first['policy/kl']), rel=1e-6)
  assert first['policy/kl'] > second['policy/kl'] > 0


@pytest.mark.parametrize('where', ['advantages', 'old_logprobs', 'params'])
def test_a_step_that_is_not_finite_is_not_taken(where):
  adam = optax.adam(1e-2)
  update = grpo.make_update_fn(Table(), adam, temperature=0.7,
                               microbatch_size=B)
  good = table_batch(ref_logprobs=None)
  bad, params = good, table_params()
  # From a state that has moments already.
  state, _ = update(make_state(params, adam), good)
  if where == 'params':
    logits = state.params['logits'].at[0, L - 1, 3].set(jnp.nan)
    state = state.replace(params={'logits': logits})
  else:
    junk = jnp.nan if where == 'advantages' else -1e9
    values = getattr(good, where)
    bad = good.replace(**{where: values.at[0].set(junk)})
  before = host(state)
  for count in (1, 2):
    state, _ = update(state, bad)
    assert int(state.nonfinite) == count
    assert_same_bits(state.params, before.params)
    assert_same_bits(state.opt_state, before.opt_state)
  if where != 'params':
    state, _ = update(state, good)
    assert int(state.nonfinite) == 0
    assert not np.array_equal(state.params['logits'],
                              before.params['logits'])


# ---- Batches and their parts.


def test_the_cut_takes_padding_only_and_keeps_the_constant():
  lengths = np.minimum(LENGTHS, 5)
  rollout = make_rollout(lengths)
  batch = grpo.make_batch_fn('constant')(rollout, jnp.asarray(ADVANTAGES), 5)
  assert batch.weights.shape == (B, 5)
  # Each token weighs 1 / (B · cap), though no row is longer than 5.
  np.testing.assert_allclose(
      batch.weights, (np.arange(5) < lengths[:, None]) / (B * T), rtol=1e-6)
  np.testing.assert_array_equal(batch.rollout.completion_mask.sum(-1), lengths)
  np.testing.assert_array_equal(batch.advantages, ADVANTAGES.ravel())
  np.testing.assert_array_equal(batch.rollout.prompt_tokens,
                                rollout.prompt_tokens)
  for name in ('completion_tokens', 'sampler_logprobs', 'action_mask'):
    np.testing.assert_array_equal(getattr(batch.rollout, name),
                                  getattr(rollout, name)[:, :5])


@pytest.mark.parametrize('aggregate', losses.AGGREGATES)
@pytest.mark.parametrize('count', [2, 4])
def test_minibatches_hold_each_row_once_an_epoch(aggregate, count):
  batch = make_batch(aggregate=aggregate).replace(
      old_logprobs=jnp.zeros((B, T)))
  parts = list(grpo.minibatches(batch, num_epochs=2, num_minibatches=count,
                                aggregate=aggregate))
  assert len(parts) == 2 * count
  for epoch in (parts[:count], parts[count:]):
    order = np.concatenate([np.arange(B)[rows] for _, rows in epoch])
    assert sorted(order) == list(range(B))
    tokens = np.concatenate([part.rollout.prompt_tokens for part, _ in epoch])
    np.testing.assert_array_equal(tokens, batch.rollout.prompt_tokens[order])
    advantages = np.concatenate([part.advantages for part, _ in epoch])
    np.testing.assert_array_equal(advantages, ADVANTAGES.ravel()[order])
  for part, _ in parts:
    assert part.ref_logprobs is None
    # What the part would weigh alone.
    np.testing.assert_allclose(
        part.weights, losses.token_weights(part.rollout.action_mask,
                                           aggregate), rtol=1e-6)


def test_one_minibatch_is_the_batch_itself():
  batch = make_batch()
  parts = list(grpo.minibatches(batch, num_epochs=3, num_minibatches=1,
                                aggregate='sequence'))
  assert len(parts) == 3
  for part, rows in parts:
    assert part is batch and rows == slice(None)


def test_metrics_of_updates_are_merged_by_name():
  per_token = ('entropy', 'clip_fraction', 'kl', 'sampler_kl',
               'sampler_ratio_mean', 'sampler_ratio_outside')
  names = ('update/loss', 'update/grad_norm', 'update/tokens',
           'policy/sampler_ratio_max', *(f'policy/{x}' for x in per_token))
  updates = [dict(zip(names, map(jnp.float32, values), strict=True))
             for values in ((0.5, 1.0, 1, 2.0, 4, 1, 8, 0, 2.0, 1.0),
                            (1.5, 2.0, 3, 1.5, 0, 0, 4, 4, 1.0, 0.0),
                            (1.0, 0.0, 0, 0.0, 0, 0, 0, 0, 0.0, 0.0))]
  assert grpo.merge(updates) == pytest.approx({
      'update/loss': 1.0, 'update/grad_norm': 1.0, 'policy/entropy': 1.0,
      'policy/clip_fraction': 0.25, 'policy/kl': 5.0, 'policy/sampler_kl': 3.0,
      'policy/sampler_ratio_mean': 1.25, 'policy/sampler_ratio_max': 2.0,
      'policy/sampler_ratio_outside': 0.25})
  # One update is itself, and one without a token is finite.
  for update in updates:
    merged = grpo.merge([update])
    assert merged == {name: float(update[name]) for name in merged}


def test_the_gap_to_the_sampler_is_that_of_the_start_of_the_step(
    model, params, score):
  batch = make_batch()
  old = score(params, batch.rollout)
  sgd = optax.sgd(1e-1)
  update = grpo.make_update_fn(model, sgd, temperature=1.0, microbatch_size=4)
  state, updates = make_state(params, sgd), []
  for part, _ in grpo.minibatches(batch.replace(old_logprobs=old), 2, 4,
                                  'sequence'):
    state, found = update(state, part)
    updates.append(found)
  assert len({int(found['update/tokens']) for found in updates}) > 1
  # Tokens count the same, whatever part they fell into.
  mask = batch.rollout.action_mask
  ratio = np.exp((np.asarray(old) - batch.rollout.sampler_logprobs)[mask])
  merged = grpo.merge(updates)
  assert merged['policy/sampler_ratio_mean'] == pytest.approx(
      ratio.mean(), rel=1e-5)
  assert merged['policy/sampler_ratio_max'] == pytest.approx(
      ratio.max(), rel=1e-5)
  assert merged['policy/sampler_ratio_outside'] == pytest.approx(
      np.mean((ratio < 0.8) | (ratio > 1.25)), rel=1e-6)
  assert 0.1 < merged['policy/sampler_ratio_outside'] < 0.9


def test_a_minibatch_without_a_token_stays_finite():
  lengths = np.where(np.arange(B) % 2, LENGTHS, 0)
  (empty, _), (filled, _) = grpo.minibatches(
      make_batch(make_rollout(lengths)), 1, 2, 'sequence')
  assert (np.asarray(empty.weights) == 0).all()
  assert float(filled.weights.sum()) == pytest.approx(1.0, rel=1e-6)


def step_by_minibatches(model, params, mesh=None):
  """The momentum after one epoch of two minibatches."""
  sgd = optax.sgd(0.1, momentum=0.9)
  places = (None, None) if mesh is None else shardings_of(model, mesh, sgd)
  state, rollout = make_state(params, sgd), make_rollout()
  advantages = jnp.asarray(ADVANTAGES)
  if mesh is not None:
    state = put(state, places[0])
    rollout = sharding.to_global(rollout, places[1])
    advantages = sharding.to_global(ADVANTAGES, sharding.replicated(mesh))
  update = grpo.make_update_fn(
      model, sgd, temperature=1.0, microbatch_size=8,
      shardings=None if mesh is None else places)
  batch = grpo.make_batch_fn('sequence', shardings=places[1])(
      rollout, advantages, T)
  old = jnp.where(batch.rollout.action_mask, -4.0, 0.0)
  batch = batch.replace(old_logprobs=old)
  for part, _ in grpo.minibatches(
      batch, num_epochs=1, num_minibatches=2, aggregate='sequence'):
    if mesh is not None:
      for x in jax.tree.leaves(part):
        assert x.sharding.is_equivalent_to(places[1], x.ndim)
    state, _ = update(state, part)
  return host(state.opt_state)


@pytest.fixture(scope='module')
def momentum(model, params):
  return step_by_minibatches(model, params)


@pytest.mark.parametrize('axes', [
    dict(data=8), dict(data=2, fsdp=2, tensor=2)], ids=str)
def test_minibatches_of_eight_devices_are_those_of_one(model, params, momentum,
                                                       axes):
  found = step_by_minibatches(model, params, sharding.make_mesh(**axes))
  assert distance(found, momentum) < 1e-5
