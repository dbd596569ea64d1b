# SPDX-License-Identifier: Apache-2.0
from .FCN import FCN

__all__ = ["FCN"]
