# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pandas as pd
import torch


class HistoryDataLoader:
    """The folder's own loader, row by row from the raw files, as run_expid.py passes it to RankDataLoader."""

    def __init__(self, feature_map, data_path, item_info, batch_size=32, shuffle=False, max_len=100, **kwargs):
        assert not shuffle
        self.rows = pd.read_parquet(data_path)
        self.items = pd.read_parquet(item_info).set_index("item_id", drop=False)
        self.columns = list(feature_map.features.keys()) + feature_map.labels
        self.batch_size, self.max_len = batch_size, max_len

    def __len__(self):
        return -(-len(self.rows) // self.batch_size)

    def __iter__(self):
        for start in range(0, len(self.rows), self.batch_size):
            yield self.collate(self.rows.iloc[start : start + self.batch_size])

    def collate(self, rows):
        batch_dict = {
            name: torch.tensor(rows[name].to_numpy())
            for name in rows.columns
            if name in self.columns
            if name not in ("item_seq", "item_id")
        }
        histories = np.stack(rows["item_seq"].to_list())[:, -self.max_len :]
        mask = torch.from_numpy((histories > 0).astype(np.float32))
        ids = np.hstack([histories, rows["item_id"].to_numpy().reshape(-1, 1)]).flatten()
        items = self.items.loc[ids]
        item_dict = {
            name: torch.from_numpy(np.stack(items[name].to_list())) for name in items.columns if name in self.columns
        }
        return batch_dict, item_dict, mask
