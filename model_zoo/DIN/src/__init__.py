# SPDX-License-Identifier: Apache-2.0
from .DIN import DIN

__all__ = ["DIN"]
