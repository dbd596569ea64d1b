# SPDX-License-Identifier: Apache-2.0
from .QNNAlpha import QNNAlpha

__all__ = ["QNNAlpha"]
