# SPDX-License-Identifier: Apache-2.0
from .EulerNet import EulerNet

__all__ = ["EulerNet"]
