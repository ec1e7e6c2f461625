# SPDX-License-Identifier: Apache-2.0
"""Model families, one file each; `types` and the README say how to add one."""
