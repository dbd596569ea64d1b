# SPDX-License-Identifier: Apache-2.0
from .DCNv3 import DCNv3

__all__ = ["DCNv3"]
