# SPDX-License-Identifier: Apache-2.0
"""Length-adaptive methods, one file each; each offers `reward` and `make`."""
