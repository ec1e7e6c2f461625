# SPDX-License-Identifier: Apache-2.0
"""Tasks, one data set per file; each offers `make`."""
