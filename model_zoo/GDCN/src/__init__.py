# SPDX-License-Identifier: Apache-2.0
from .GDCN import GDCN

__all__ = ["GDCN"]
