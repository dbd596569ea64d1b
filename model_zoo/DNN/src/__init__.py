# SPDX-License-Identifier: Apache-2.0
from .DNN import DNN

__all__ = ["DNN"]
