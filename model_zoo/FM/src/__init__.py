# SPDX-License-Identifier: Apache-2.0
from .FM import FM

__all__ = ["FM"]
