import pytest
from runs import TINY, write_pairs

from autohdr.train.config import TrainConfig


@pytest.fixture(scope="session")
def pair_files(tmp_path_factory):
    """(pairs to train on, pairs to validate on)"""
    folder = tmp_path_factory.mktemp("pairs")
    return write_pairs(folder / "train", 6, seed=0), write_pairs(folder / "val", 2, seed=1)


@pytest.fixture
def make_config(tmp_path, pair_files):
    def make(out="run", **changes):
        settings = {"model": "restormer_nano", "model_args": TINY, "size": 32, "batch_size": 2, "epochs": 2, "lr": 2e-3}
        settings |= {"train_pairs": pair_files[0], "val_pairs": pair_files[1], "workers": 0, "device": "cpu"}
        return TrainConfig(out=tmp_path / out, **(settings | changes))

    return make
