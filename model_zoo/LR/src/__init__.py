# SPDX-License-Identifier: Apache-2.0
from .LR import LR

__all__ = ["LR"]
