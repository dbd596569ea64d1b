# SPDX-License-Identifier: Apache-2.0
from .xDeepFM import xDeepFM

__all__ = ["xDeepFM"]
