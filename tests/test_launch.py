# SPDX-License-Identifier: Apache-2.0
"""The scripts that start runs on other machines say what they would do."""

import os
import pathlib
import shlex
import shutil
import subprocess
import sys

import pytest

_ROOT = pathlib.Path(__file__).parent.parent
_SCRIPTS = sorted([*_ROOT.glob('experiments/[gt]pu/*.sh'),
                   *_ROOT.glob('experiments/gpu/*.sbatch')])
_FLAGS = ('--config=configs/tiny.py', '--config.rollout.template=Q: {question}')


def call(script, *arguments, **environment):
  return subprocess.run(
      ['bash', str(_ROOT / 'experiments' / script), *arguments],
      capture_output=True, text=True, env={**os.environ, **environment})


def dry(script, *arguments):
  """The words of each command that it would run."""
  done = call(script, '--dry-run', *arguments)
  assert done.returncode == 0, done.stderr
  return [shlex.split(line) for line in done.stdout.split('\n\n')[0]
          .splitlines()]


@pytest.mark.parametrize('script', _SCRIPTS, ids=lambda path: path.name)
def test_every_script_is_sound(script):
  assert subprocess.run(['bash', '-n', script]).returncode == 0
  assert 'set -euo pipefail' in script.read_text()
  checker = shutil.which('shellcheck')
  if checker:
    done = subprocess.run([checker, script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_a_queued_resource_with_its_start_up_script():
  options = ('--name=r1', '--zone=z', '--type=v5litepod-16', '--runtime=v2',
             '--bucket=b', '--spot', '--', *_FLAGS, '--workdir=/bucket/r/1')
  archive, copy, create, describe, watch, delete = dry(
      'tpu/queued_resource.sh', *options)
  verb = ['gcloud', 'compute', 'tpus', 'queued-resources']
  assert archive[0] == 'git' and archive[-1] == 'HEAD'
  assert copy[:3] == ['gcloud', 'storage', 'cp']
  assert create[:7] == [*verb, 'create', 'r1', '--zone=z']
  assert {'--accelerator-type=v5litepod-16', '--runtime-version=v2',
          '--node-id=r1', '--spot'} < set(create)
  assert any(word.startswith('--metadata-from-file=startup-script=')
             for word in create)
  assert describe[4] == 'describe' and delete[4] == 'delete'
  assert watch[-1] == 'gs://b/r/1/summary.json'
  # What a host runs gets the flags word by word.
  said = call('tpu/queued_resource.sh', '--dry-run', *options).stdout
  line = next(line for line in said.splitlines() if line.startswith('FLAGS=('))
  assert shlex.split(line[len('FLAGS=('):-1]) == [*_FLAGS,
                                                  '--workdir=/bucket/r/1']
  assert 'BUCKET=b CODE=gs://b/code/r1.tar.gz ENDED=/bucket/r/1.ended' in said


def test_a_workload_on_gke():
  attach, create = dry(
      'tpu/gke.sh', '--name=r1', '--cluster=c', '--project=p', '--zone=z',
      '--type=v5litepod-16', '--slices=2', '--attach=b', '--', *_FLAGS)
  assert attach[:4] == ['xpk', 'storage', 'attach', 'b']
  assert create[:3] == ['xpk', 'workload', 'create']
  assert {'--workload=r1', '--cluster=c', '--tpu-type=v5litepod-16',
          '--num-slices=2', '--max-restarts=100',
          '--restart-on-user-code-failure'} < set(create)
  command = create[-1].removeprefix('--command=')
  assert shlex.split(command)[-5:] == ['python', '-m', 'lapo_jax.main', *_FLAGS]


def test_a_slurm_job():
  run, again = dry('gpu/slurm.sbatch', *_FLAGS)
  assert run[0] == 'srun' and '--kill-on-bad-exit=1' in run
  assert run[-4:] == ['-m', 'lapo_jax.main', *_FLAGS]
  assert again[-3:] == ['scontrol', 'requeue', 'JOB'] or 'requeue' in again


@pytest.mark.parametrize('script', ['tpu/queued_resource.sh', 'tpu/gke.sh',
                                    'gpu/slurm.sbatch', 'gpu/single_host.sh'])
def test_without_flags_a_script_says_what_it_expects(script):
  done = call(script, '--dry-run')
  assert done.returncode == 2 and done.stderr.startswith('expected ')


def test_one_host_is_tried_again_unless_it_is_refused(tmp_path):
  assert dry('gpu/single_host.sh', *_FLAGS) == [
      ['python', '-m', 'lapo_jax.main', *_FLAGS]]
  stand_in = tmp_path / 'python'
  stand_in.write_text(f'#!{sys.executable}\n' + """
import pathlib, sys
file = pathlib.Path(__file__).with_name('statuses')
first, *rest = file.read_text().split()
file.write_text(' '.join(rest))
sys.exit(int(first))
""")
  stand_in.chmod(0o755)
  statuses = tmp_path / 'statuses'
  for given, left, status in (('3 143 0 7', '7', 0), ('1 2 0', '0', 2),
                              ('5 6 4 0', '0', 4)):
    statuses.write_text(given)
    done = call('gpu/single_host.sh', '--tries=3', *_FLAGS, PAUSE='0',
                PYTHON=str(stand_in))
    assert done.returncode == status and statuses.read_text() == left
