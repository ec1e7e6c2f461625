# SPDX-License-Identifier: Apache-2.0
"""Length-adaptive methods, one file each; each offers `reward` and `make`.

To add one, add one file; nothing lists it. Its name is the name in a config:
`rewards/mine.py` is `config.reward.name = 'mine'`.

  * The docstring gives the rule, the paper and every departure from it.
  * `reward(correct, lengths, …, *, hyperparameters) -> [P, G]`, a jitted
    function of arrays, is what people import.
  * `make(hyperparameters) -> types.Reward` plugs it into the loop. Every
    argument has a default; these are the keys of `config.reward`. `apply` is
    required. A method with a memory adds `init`, one that states a budget in
    the prompt `instruct`, one that looks at the text `read`, one that asks the
    policy `measure`: see `types.Reward`.
  * Memory is a pytree of arrays, one number per problem, at
    `outcomes.prompt_index`: it is then checkpointed like the parameters.

`tests/test_rewards.py` finds the file and tries the contract's laws on it;
numbers of the paper go into `tests/rewards/test_<name>.py`, and the formula in
plain Python, which `tests/test_oracles.py` asks for, into `tests/oracles.py`.
Files whose names start with an underscore are shared parts, not methods.
"""
