# SPDX-License-Identifier: Apache-2.0
from .MaskNet import MaskNet

__all__ = ["MaskNet"]
