# SPDX-License-Identifier: Apache-2.0
"""Sweeps: a search space -> trials on GPU or CPU slots, resumable, shared by any number of machines."""
