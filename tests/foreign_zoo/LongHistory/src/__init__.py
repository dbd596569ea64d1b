# SPDX-License-Identifier: Apache-2.0
from .history_dataloader import HistoryDataLoader
from .LongHistory import LongHistory
