# SPDX-License-Identifier: Apache-2.0
from .DCN import DCN

__all__ = ["DCN"]
