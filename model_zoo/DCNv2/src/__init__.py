# SPDX-License-Identifier: Apache-2.0
from .DCNv2 import DCNv2

__all__ = ["DCNv2"]
