# SPDX-License-Identifier: Apache-2.0
"""Keep freed memory in the process, so that a training step finds warm pages where the one before left them.

glibc gives large blocks back to the kernel as soon as they are freed: every activation of the next step then costs a page
fault per 4 KiB, a tenth of a CPU training step. Nothing is computed differently and the peak stays what it was.
"""

from __future__ import annotations

import ctypes
import functools
import sys

# The parameters of mallopt(3), with values that keep the activations of a step but not a whole dataset.
_MMAP_THRESHOLD, _TRIM_THRESHOLD, _TOP_PAD = -3, -1, -2
_SETTINGS = ((_MMAP_THRESHOLD, 1 << 28), (_TRIM_THRESHOLD, 1 << 30), (_TOP_PAD, 1 << 26))


@functools.cache
def keep_freed_memory() -> bool:
    """Tell the C library once per process. Returns whether it took it; only glibc knows these settings."""
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all(mallopt(name, value) == 1 for name, value in _SETTINGS)
