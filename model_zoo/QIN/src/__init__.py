# SPDX-License-Identifier: Apache-2.0
from .QIN import QIN

__all__ = ["QIN"]
