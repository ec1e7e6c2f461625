# SPDX-License-Identifier: Apache-2.0
"""Where a model's folder is: on this disk, embedded, or on the hub.

A folder has the Hugging Face layout: config.json, *.safetensors and the
tokenizer's files. From the hub comes a pinned commit or nothing: a branch may
say something else tomorrow.
"""

import hashlib
import pathlib
import re

_ASSETS = pathlib.Path(__file__).parent.parent / 'assets'

_PINNED = re.compile(r'([\w.-]+/[\w.-]+)@([0-9a-f]{40})')
_UNPINNED = re.compile(r'[\w.-]+/[\w.-]+(@.*)?')
# That a fingerprint reads of a file, and bytes of each: few, for a mounted
# bucket answers each read by itself.
_PARTS, _PART = 64, 2**16
# Weights and text: no pickle, no code.
_PATTERNS = ('*.json', '*.safetensors', 'merges.txt', 'chat_template.jinja')


def resolve(path: str) -> pathlib.Path:
  """The folder of a model.

  Args:
    path: a local folder, the name of an embedded model, or
      `owner/name@<commit>` on the hub, the commit in full (40 hex digits).

  Raises:
    ValueError: no such folder, it holds no config.json, or the hub's commit is
      not named or cannot be fetched.
  """
  path = str(path)
  for folder in (pathlib.Path(path), _ASSETS / path):
    if path and (folder / 'config.json').is_file():
      return folder.resolve()
  pinned = _PINNED.fullmatch(path)
  if pinned:
    return _download(*pinned.groups())
  embedded = sorted(p.parent.name for p in _ASSETS.glob('*/config.json'))
  hub = (' If it is a name on the hub, add its commit: owner/name@<40 hex '
         'digits>.' if _UNPINNED.fullmatch(path) else '')
  raise ValueError(
      f'model.path {path!r}: expected a folder with config.json and '
      f'*.safetensors, one of the embedded models {embedded}, or '
      f'owner/name@<commit> on the hub.{hub}')


def fingerprint(path: str) -> str:
  """A digest of a model's folder: other weights or text, another digest.

  Of large files parts are read, evenly over the whole: weights that have been
  trained since differ everywhere.

  Raises:
    ValueError: as `resolve`.
  """
  folder = resolve(path)
  digest = hashlib.sha256()
  files = {file for pattern in _PATTERNS for file in folder.glob(pattern)}
  for file in sorted(files):
    size = file.stat().st_size
    digest.update(f'{file.name} {size} '.encode())
    with file.open('rb') as data:
      for start in range(0, size, max(size // _PARTS, _PART)):
        data.seek(start)
        digest.update(data.read(_PART))
  return digest.hexdigest()


def _download(repository: str, commit: str) -> pathlib.Path:
  """The folder of a commit in the hub's local cache, fetched if absent."""
  import huggingface_hub  # a quarter of a second
  try:
    folder = huggingface_hub.snapshot_download(
        repository, revision=commit, allow_patterns=list(_PATTERNS),
        # The patterns' stars cross folders, where others' formats lie.
        ignore_patterns=['*/*'])
  except Exception as error:  # network, hub and cache have no common class
    reason = ' '.join(str(error).split())[:200]
    raise ValueError(
        f'model.path {repository}@{commit}: could not be fetched from the hub '
        f'({type(error).__name__}: {reason}); give a local folder, or fetch '
        'it where there is a network.') from error
  folder = pathlib.Path(folder)
  if not (folder / 'config.json').is_file():
    raise ValueError(f'model.path {repository}@{commit}: got no config.json '
                     'in it; expected a model in the Hugging Face layout.')
  return folder
