# SPDX-License-Identifier: Apache-2.0
"""What every test shares: eight CPU devices, strict arrays, checked types."""

import json
import os

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ.setdefault('JAX_NUM_CPU_DEVICES', '8')
os.environ.setdefault('HF_HUB_OFFLINE', '1')

from jaxtyping import install_import_hook  # noqa: E402

# Shapes and dtypes in signatures are checked on every call, in tests only.
# Before anything else imports the package: the hook sees imports, not modules.
install_import_hook('lapo_jax', 'beartype.beartype')

import flax.traverse_util  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

# [B] against [B, T] is the classic bug of this field: make it an error.
jax.config.update('jax_numpy_rank_promotion', 'raise')


# Files that take longest go first, so that no process ends with one of them.
_LONG = ('test_train', 'test_slots', 'test_hosts', 'test_grpo', 'test_groups',
         'test_checkpoint', 'test_models', 'test_benchmark', 'test_configs')


def pytest_collection_modifyitems(items):
  place = {name: i for i, name in enumerate(_LONG)}
  items.sort(key=lambda item: place.get(item.path.stem, len(_LONG)))


@pytest.fixture(scope='session', autouse=True)
def home(tmp_path_factory):
  """No test reads or fills the caches in the user's home."""
  with pytest.MonkeyPatch.context() as patch:
    # matplotlib would look through all fonts again in a new home.
    patch.setenv('MPLCONFIGDIR', os.environ.get(
        'MPLCONFIGDIR', os.path.expanduser('~/.config/matplotlib')))
    patch.setenv('HOME', str(tmp_path_factory.mktemp('home')))
    yield


@pytest.fixture
def key():
  return jax.random.key(0)


@pytest.fixture(scope='session')
def tiny_model():
  """A decoder of 20 thousand parameters whose axes eight devices divide."""
  from lapo_jax.models import qwen2
  return qwen2.Model(vocab_size=64, width=32, num_layers=2, num_heads=4,
                     num_kv_heads=2, mlp_width=48, rope_theta=10000.0,
                     max_positions=512)


@pytest.fixture(scope='session')
def make_params():
  """model -> parameters by a formula in integers: alike on every machine."""
  from lapo_jax.models import qwen2

  def values(number, path, shape):
    k = np.arange(np.prod(shape), dtype=np.int64)
    mixed = (k * k % 65521 * 7919 + k * 104729 + number * 1299709) % 65521
    centred = (mixed / 65521 - 0.5).reshape(shape)
    if path.endswith('scale'):
      values = 1.0 + 0.2 * centred
    elif path.endswith('bias'):
      values = 0.5 * centred
    elif path == 'embedding':
      values = centred
    else:
      values = centred * np.sqrt(12 / shape[0])
    return values.astype(np.float32)

  def make(model):
    shapes = flax.traverse_util.flatten_dict(qwen2.init_shapes(model), sep='/')
    return flax.traverse_util.unflatten_dict(
        {path: values(number, path, shapes[path].shape)
         for number, path in enumerate(sorted(shapes))}, sep='/')

  return make


@pytest.fixture(scope='session')
def tiny_params(tiny_model, make_params):
  return jax.tree.map(jnp.asarray, make_params(tiny_model))


@pytest.fixture
def write_tokenizer():
  """folder, settings -> a byte-level tokenizer.json without merges there."""
  import tokenizers

  def write(folder, **settings):
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(
        vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
        add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(['<|end|>', '<|pad|>'])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / 'tokenizer.json'))
    settings = {'tokenizer_class': 'PreTrainedTokenizerFast',
                'clean_up_tokenization_spaces': False, **settings}
    (folder / 'tokenizer_config.json').write_text(json.dumps(settings))
    return folder

  return write


@pytest.fixture(scope='session')
def model_folder(tmp_path_factory):
  """The path of a random one-layer model whose tokens are bytes."""
  from toys import folder  # the hook above must come first
  return folder.write(tmp_path_factory.mktemp('models') / 'toy')


@pytest.fixture(scope='session')
def compile_cache(tmp_path_factory):
  """Programs are compiled once, here and in processes that a test starts."""
  from jax.experimental.compilation_cache import compilation_cache
  settings = {'jax_compilation_cache_dir': str(tmp_path_factory.mktemp('xla')),
              'jax_persistent_cache_min_compile_time_secs': 0,
              'jax_persistent_cache_min_entry_size_bytes': -1}
  old = {name: getattr(jax.config, name) for name in settings}
  for name, value in settings.items():
    jax.config.update(name, value)
  # JAX decides at its first compilation whether there is a cache.
  compilation_cache.reset_cache()
  yield {name.upper(): str(value) for name, value in settings.items()}
  for name, value in old.items():
    jax.config.update(name, value)
  compilation_cache.reset_cache()
