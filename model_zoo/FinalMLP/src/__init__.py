# SPDX-License-Identifier: Apache-2.0
from .FinalMLP import FinalMLP

__all__ = ["FinalMLP"]
