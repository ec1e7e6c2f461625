# SPDX-License-Identifier: Apache-2.0
"""What every test shares: eight CPU devices, strict arrays, checked types."""

import os

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ.setdefault('JAX_NUM_CPU_DEVICES', '8')
os.environ.setdefault('HF_HUB_OFFLINE', '1')

from jaxtyping import install_import_hook  # noqa: E402

# Shapes and dtypes in signatures are checked on every call, in tests only.
# Before anything else imports the package: the hook sees imports, not modules.
install_import_hook('lapo_jax', 'beartype.beartype')

import jax  # noqa: E402
import pytest  # noqa: E402

# [B] against [B, T] is the classic bug of this field: make it an error.
jax.config.update('jax_numpy_rank_promotion', 'raise')


@pytest.fixture
def key():
  return jax.random.key(0)
