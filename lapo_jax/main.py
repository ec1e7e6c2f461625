# SPDX-License-Identifier: Apache-2.0
"""The program: flags, then training, an evaluation or an export.

  python -m lapo_jax.main --config=configs/tiny.py --workdir=runs/tiny
  python -m lapo_jax.main --mode=export --workdir=runs/tiny --out=my_model
  python -m lapo_jax.main --mode=eval --config=configs/benchmarks.py \\
    --config.model.path=my_model --workdir=runs/eval

On several hosts it is the same command on each. TPU pods, Slurm and Open MPI
are recognised; elsewhere each host is told, see `hosts.initialize`:

  … --coordinator=first-host:8476 --num_hosts=4 --host=1
"""

import functools
import logging as python_logging
import os
import pathlib
import re
import signal
import sys
import traceback
from typing import NoReturn

from absl import app, flags, logging
from etils import epath
import jax
from ml_collections import config_flags

from lapo_jax import benchmark, checkpoint, export, grader, hosts, train

_MODE = flags.DEFINE_enum('mode', 'train', ['train', 'eval', 'export'],
                          'What to do.')
_CONFIG = config_flags.DEFINE_config_file(
    'config', None, 'The run; its argument, after a colon, is the method.')
_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder of the run.')
_OUT = flags.DEFINE_string(
    'out', None, 'Folder for the exported model, in the Hugging Face layout.')
_COORDINATOR = flags.DEFINE_string(
    'coordinator', '', 'Of several hosts: host:port of the first.')
_NUM_HOSTS = flags.DEFINE_integer(
    'num_hosts', 0, 'How many hosts; 1 joins no others.', lower_bound=0)
_HOST = flags.DEFINE_integer('host', -1, 'Which host this is, from 0.')
_HEARTBEAT = flags.DEFINE_integer(
    'heartbeat_seconds', 30, 'Without a sign of life for so long, a host '
    'counts as dead and the others end.', lower_bound=1)

# A plug-in's name decides which other keys its section has.
_NAME_FLAG = re.compile(r'--config\.(model|task|reward)\.name=(.*)')
_NEEDS_VALUE = re.compile(r'--config(\.(model|task|reward)\.name)?')
# In seconds; a program that compiles faster is not worth a file.
_MIN_COMPILE_TIME = 0.5


def run() -> None:
  """The command; a user's mistake ends it with one line and status 2."""
  if '--help' in sys.argv[1:]:
    print(__doc__, flags.FLAGS.main_module_help(), sep='\n')
    return
  try:
    argv = flags.FLAGS(names_first(sys.argv))
  except (KeyError, AttributeError) as error:
    frames = traceback.extract_tb(error.__traceback__)
    if 'ml_collections' not in frames[-1].filename:  # a plug-in's mistake
      own = [f for f in frames if 'site-packages' not in f.filename]
      place = (own or frames)[-1]
      stop(f'{place.filename}:{place.lineno}: {type(error).__name__}: {error}')
    # A KeyError within a KeyError: its text is quoted twice.
    text = str(error.args[0]).replace('\\n', '. ').replace('\n', '. ')
    text = text.translate(str.maketrans('', '', '\\\''))
    stop(f'no such key in the config: {text.removesuffix("?")}? Keys are those '
         'of configs/default.py and of a plug-in\'s `make`.')
  except (flags.Error, ValueError, TypeError, OSError) as error:
    stop(error)
  if argv[1:]:
    stop(f'got {" ".join(argv[1:])}: expected flags alone, such as '
         '--config.seed=3, and quotes around what has spaces.')
  app.run(main, argv=argv, flags_parser=lambda args: args)


def names_first(argv: list[str]) -> list[str]:
  """Moves `--config.task.name=x` into the config's argument.

  There a plug-in's name is known before the keys of its section are read.
  """
  joined = []
  for arg in argv:  # `--flag value` is `--flag=value`
    if joined and _NEEDS_VALUE.fullmatch(joined[-1]):
      joined[-1] += f'={arg}'
    else:
      joined.append(arg)
  argv = joined
  names = [match for match in map(_NAME_FLAG.fullmatch, argv) if match]
  if not names:
    return argv
  argument = ','.join(f'{match[1]}={match[2]}' for match in names)
  extended = lambda path: f'{path}{"," if ":" in path else ":"}{argument}'
  return [f'--config={extended(arg.removeprefix("--config="))}'
          if arg.startswith('--config=') else arg
          for arg in argv if not _NAME_FLAG.fullmatch(arg)]


def main(argv: list[str]) -> None:
  """Trains, evaluates or exports; a user's mistake ends with one line."""
  del argv
  logging.set_verbosity(logging.INFO)
  # Below a warning it lists the accelerators that this machine lacks.
  python_logging.getLogger('jax').setLevel('WARNING')
  _check_flags()
  _join()
  cache, trouble = _keep_programs()
  # What is wrong with the request shows in the first half, before any compute.
  try:
    if _MODE.value == 'export':
      print(f'Written: {export.export(_WORKDIR.value, _OUT.value)}')
      return
    if _MODE.value == 'eval':
      work = functools.partial(benchmark.run, hosts.in_step(
          lambda: benchmark.prepare(_CONFIG.value, _WORKDIR.value)))
    else:
      work = functools.partial(
          train.train, train.prepare(_CONFIG.value, _WORKDIR.value),
          _WORKDIR.value)
  except (ValueError, OSError, checkpoint.DamagedError) as error:
    stop(error)
  except KeyboardInterrupt as error:
    _interrupted(error, 'nothing has been computed')
  except Exception as error:
    _fail(error)
  # Not before: a request that is refused is told that in one line.
  if trouble:
    logging.warning('Compiled programs are not kept: %s',
                    ' '.join(str(trouble).split()))
  else:
    logging.info('Compiled programs: %s', cache or 'not kept, as asked.')
  try:
    work()
  except (train.TrainingError, checkpoint.DamagedError,
          grader.GradingError) as error:
    stop(error)
  except hosts.Stopped as error:
    stop(error, 128 + signal.SIGTERM)
  except KeyboardInterrupt as error:
    _interrupted(error, 'the same command goes on from what is saved')
  except Exception as error:
    _fail(error)


def _check_flags() -> None:
  """Ends the program when a flag is missing or has no meaning here."""
  for name, folder in (('workdir', _WORKDIR.value), ('out', _OUT.value)):
    if folder and '://' in folder:
      stop(f'--{name} {folder}: expected a folder, such as where the bucket is '
           'mounted.')
  if _MODE.value == 'export':
    if not _WORKDIR.value or not _OUT.value or _CONFIG.value is not None:
      stop('expected --mode=export --workdir=runs/tiny --out=my_model, and no '
            '--config: the run has its own.')
    return
  if not _WORKDIR.value or _CONFIG.value is None or _OUT.value:
    example = {'train': '--config=configs/tiny.py --workdir=runs/tiny',
               'eval': '--mode=eval --config=configs/benchmarks.py '
                       '--workdir=runs/eval'}
    stop(f'expected {example[_MODE.value]}'
          f'{" and no --out" if _OUT.value else ""}')
  kind = 'eval' if 'benchmarks' in _CONFIG.value else 'train'
  if kind != _MODE.value:
    stop(f'--config is for --mode={kind}: got --mode={_MODE.value}.')


def _join() -> None:
  """Finds the other hosts; only the first speaks of the run as it goes."""
  try:
    hosts.initialize(_COORDINATOR.value, _NUM_HOSTS.value, _HOST.value,
                     _HEARTBEAT.value)
  except ValueError as error:
    stop(error)
  except hosts.NotFoundError as error:
    stop(error, 3)  # perhaps an old run is still ending: to be tried again
  if hosts.several():
    if _MODE.value == 'export':
      stop('--mode=export runs on one host: got '
            f'{jax.process_count()}; start it alone, with --num_hosts=1.')
    if jax.process_index():
      logging.set_verbosity(logging.WARNING)


def _keep_programs() -> tuple[str | None, Exception | None]:
  """Lets JAX keep compiled programs, for a run that goes on and for the next.

  The folder is that of JAX_COMPILATION_CACHE_DIR, none if that is empty, or
  else lapo_jax/xla in the user's cache. Several processes may share it: JAX
  compiles what it cannot read.

  Returns:
    The folder, None without; and what is wrong with it, if anything is.
  """
  folder, trouble = jax.config.jax_compilation_cache_dir, None
  try:
    if folder is None:
      home = os.environ.get('XDG_CACHE_HOME') or pathlib.Path.home() / '.cache'
      folder = str(pathlib.Path(home) / 'lapo_jax' / 'xla')
    if folder:
      _try_writing(epath.Path(folder))
  except Exception as error:  # whatever the client of a bucket raises, too
    folder, trouble = None, error
  # JAX reads '' as a folder here and there.
  jax.config.update('jax_compilation_cache_dir', folder or None)
  name = 'jax_persistent_cache_min_compile_time_secs'
  if name.upper() not in os.environ:
    jax.config.update(name, _MIN_COMPILE_TIME)
  return folder or None, trouble


def _try_writing(folder: epath.Path) -> None:
  """Raises the OSError that would stop JAX from writing into the folder."""
  folder.mkdir(parents=True, exist_ok=True)
  probe = folder / f'.{os.getpid()}'
  probe.write_text('')
  # Missing where another host's process has the same number.
  probe.unlink(missing_ok=True)


def _interrupted(error: KeyboardInterrupt, told: str) -> NoReturn:
  """Ends the program after Ctrl-C."""
  if hosts.several():
    hosts.leave(error)
  stop(f'interrupted; {told}.', 128 + signal.SIGINT)


def _fail(error: BaseException) -> NoReturn:
  """Ends the program with a traceback; of several hosts, without waiting."""
  if hosts.several():
    hosts.leave(error)
  raise error


def stop(reason: Exception | str, status: int = 2) -> NoReturn:
  """Ends the program with one line."""
  # A KeyError's text is quoted, an OSError's first argument is a number.
  arguments = getattr(reason, 'args', None)
  told = arguments and isinstance(arguments[0], str)
  text = arguments[0] if told else str(reason)
  if 'Traceback (most recent call last)' in text:
    # ml_collections wraps what a config file raises; its last line tells.
    text = text.strip().splitlines()[-1].partition(': ')[2]
  print(f'{hosts.name()}: {" ".join(text.split())}', file=sys.stderr)
  sys.exit(status)


if __name__ == '__main__':
  run()
