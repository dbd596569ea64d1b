# SPDX-License-Identifier: Apache-2.0
from .AutoIntPlus import AutoIntPlus

__all__ = ["AutoIntPlus"]
