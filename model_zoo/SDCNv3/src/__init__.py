# SPDX-License-Identifier: Apache-2.0
from .SDCNv3 import SDCNv3

__all__ = ["SDCNv3"]
