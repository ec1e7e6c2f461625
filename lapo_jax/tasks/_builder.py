# SPDX-License-Identifier: Apache-2.0
"""Text records in ArrayRecord, by a tensorflow-datasets builder.

Neither TensorFlow nor the network is used. The builder works in a folder of
its own that is renamed when whole, so processes that build at once do not see
each other's halves; the first one wins.

tensorflow-datasets is imported when records are written or read, which a
process that only grades never does: the summary beside them is plain JSON.
"""

from collections.abc import Iterator
import contextlib
import functools
import hashlib
import importlib.metadata
import io
import json
import logging
import pathlib
import tempfile
from typing import Any

from absl import logging as absl_logging

Record = dict[str, str]

_HERE = pathlib.Path(__file__).parent
# What the code beside us calls and cannot tell the version of.
_READERS = ('math-verify', 'tensorflow-datasets')
_SUMMARY = 'summary.json'
# How tensorflow-datasets names things: <name>/<version>, <name>-<split>.
_NAME, _VERSION, _SPLIT = 'problems', '1.0.0', 'kept'


def cache_folder(cache: str, name: str, digest: str,
                 code: str) -> pathlib.Path:
  """Where the records of a file belong; it need not exist.

  Args:
    cache: folder of all, '' = ~/.cache/lapo_jax/datasets.
    name: of the file, to be recognised by.
    digest: hash of the file's bytes.
    code: the Python file that reads its rows; what it shares with others,
      the underscore files of this folder, counts as well.
  """
  found = hashlib.sha256(digest.encode())
  for file in sorted({*_HERE.glob('_*.py'), pathlib.Path(code)}):
    found.update(file.read_bytes())
  for package in _READERS:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
      found.update(importlib.metadata.version(package).encode())
  root = pathlib.Path(cache or '~/.cache/lapo_jax/datasets').expanduser()
  return root / f'{name}-{found.hexdigest()[:16]}'


def write(folder: pathlib.Path, records: list[Record],
          summary: dict[str, Any]) -> None:
  """Writes records of one set of fields, and a summary, all at once.

  Raises:
    ValueError: the folder cannot be written.
  """
  try:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix='.building-',
                                     ignore_cleanup_errors=True) as scratch:
      made = pathlib.Path(scratch, 'made')
      with _quiet_tfds() as tfds:
        builder = _builder_class()(
            records, data_dir=made,
            file_format=tfds.core.FileFormat.ARRAY_RECORD)
        builder.download_and_prepare(
            download_config=tfds.download.DownloadConfig(
                try_download_gcs=False))
      (made / _SUMMARY).write_text(json.dumps(summary))
      with contextlib.suppress(OSError):  # another process was first
        made.rename(folder)
    if not folder.exists():
      raise OSError('the finished folder could not be renamed')
  except OSError as error:
    raise ValueError(f'cannot write the data cache {folder.parent} ({error}): '
                     'set --config.task.cache=... to a folder.') from error


def read_summary(folder: pathlib.Path) -> dict[str, Any]:
  """The summary that was written with the records.

  Raises:
    ValueError: it is damaged.
  """
  with _whole(folder):
    return json.loads((folder / _SUMMARY).read_text())


def read(folder: pathlib.Path) -> list[Record]:
  """The records, in the order in which they were written.

  Raises:
    ValueError: they are damaged.
  """
  with _whole(folder), _quiet_tfds() as tfds:
    builder = tfds.builder_from_directory(folder / _NAME / _VERSION)
    source = builder.as_data_source(split=_SPLIT)
    found = source.__getitems__(range(len(source)))
    return [{name: value.decode() for name, value in record.items()}
            for record in found]


@contextlib.contextmanager
def _whole(folder: pathlib.Path) -> Iterator[None]:
  """Names the folder if what it holds cannot be read."""
  try:
    yield
  except Exception as error:  # whatever tensorflow-datasets raises
    raise ValueError(
        f'the data cache {folder} is damaged ({" ".join(str(error).split())}): '
        'delete it, and it is made again.') from error


@functools.cache
def _builder_class() -> type:
  """The builder, made when tensorflow-datasets is first needed."""
  import tensorflow_datasets as tfds

  class _Info(tfds.core.DatasetInfo):
    """Knows only what was built here."""

    def initialize_from_bucket(self) -> None:
      """Asks no bucket about a data set that is ours."""

  class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Writes records in the order given, under the keys 0, 1, 2, …"""

    name = _NAME
    VERSION = tfds.core.Version(_VERSION)

    def __init__(self, records: list[Record], **settings: Any):
      self._records = records
      super().__init__(**settings)

    def _info(self) -> tfds.core.DatasetInfo:
      text = tfds.features.Text()
      return _Info(builder=self, disable_shuffling=True,
                   features=tfds.features.FeaturesDict(
                       dict.fromkeys(self._records[0], text)))

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator]:
      del dl_manager  # nothing is downloaded
      return {_SPLIT: self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, Record]]:
      yield from enumerate(self._records)

  return Builder


@contextlib.contextmanager
def _quiet_tfds() -> Iterator[Any]:
  """tensorflow_datasets, which otherwise prints, draws bars and logs."""
  import tensorflow_datasets as tfds

  tfds.disable_progress_bar()
  logger = absl_logging.get_absl_logger()
  before = logger.level
  logger.setLevel(max(before, logging.WARNING))
  try:
    with contextlib.redirect_stdout(io.StringIO()):
      yield tfds
  finally:
    logger.setLevel(before)
