# SPDX-License-Identifier: Apache-2.0
from .DeepFM import DeepFM

__all__ = ["DeepFM"]
