# SPDX-License-Identifier: Apache-2.0
from .AFNPlus import AFNPlus

__all__ = ["AFNPlus"]
