# SPDX-License-Identifier: Apache-2.0
"""What `pip install` needs to know; tools are set up in pyproject.toml."""

import pathlib
import re

import setuptools

_HERE = pathlib.Path(__file__).parent
_INIT = (_HERE / 'lapo_jax' / '__init__.py').read_text()
_README = _HERE / 'README.md'

setuptools.setup(
    name='lapo_jax',
    # Read, not imported: JAX is not there yet.
    version=re.search(r"^__version__ = '(.+)'$", _INIT, re.M)[1],
    description='Length-adaptive reinforcement learning for reasoning in JAX',
    long_description=_README.read_text() if _README.exists() else '',
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    python_requires='>=3.11',
    packages=[*setuptools.find_packages(include=['lapo_jax', 'lapo_jax.*']),
              'configs'],
    package_data={'lapo_jax': ['assets/**/*']},
    install_requires=[
        'absl-py>=2.1',
        'array_record>=0.8',
        'chex>=0.1.90',
        'etils[epath]>=1.9',
        'flax>=0.12',
        'huggingface_hub>=1.0',  # pinned models
        'importlib_resources>=6.0',  # tensorflow-datasets forgets to ask
        'jax>=0.10,<0.12',
        'jaxtyping>=0.3',
        'jinja2>=3.1',  # chat templates
        'math-verify>=0.9',
        'matplotlib>=3.9',
        'ml-collections>=1.0',
        'numpy>=2.0',
        'optax>=0.2.5',
        'orbax-checkpoint>=0.11.25',
        'safetensors>=0.5',
        'tensorboardX>=2.6',
        'tensorflow-datasets>=4.9.9',  # runs without TensorFlow
        'tqdm>=4.66',
        'transformers>=5.0',
    ],
    extras_require={
        'gpu': ['jax[cuda13]'],
        # Compiles for TPUs on a machine without: python -m lapo_jax.plan.
        'plan': ['libtpu'],
        'tpu': ['jax[tpu]'],
        'colab': ['ipykernel>=6.29', 'ipywidgets>=8.1'],
        'test': ['beartype>=0.19', 'hypothesis>=6.130', 'ipython>=8.20',
                 'ipywidgets>=8.1', 'nbformat>=5.10', 'pytest>=8.0',
                 'pytest-xdist>=3.6', 'ruff>=0.12'],
    },
)
