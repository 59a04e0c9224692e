import numpy as np
import pytest
from PIL import Image

from autohdr.train.config import TrainConfig

TINY = {"dim": 8, "num_blocks": [1, 1, 1, 1], "num_refinement_blocks": 0}


def write_pairs(folder, count, seed):
    """`count` pairs of 32 x 32 pictures: smooth colours, and the same brightened by a square root."""
    folder.mkdir()
    rng = np.random.default_rng(seed)
    lines = []
    for index in range(count):
        small = rng.integers(0, 160, (4, 4, 3), dtype=np.uint8)
        source = np.asarray(Image.fromarray(small).resize((32, 32), Image.Resampling.BICUBIC))
        target = (255 * np.sqrt(source / 255)).round().astype(np.uint8)
        for name, pixels in (("src", source), ("tar", target)):
            Image.fromarray(pixels).save(folder / f"{index}_{name}.png")
        lines.append(f'{{"src": "{index}_src.png", "tar": "{index}_tar.png"}}\n')
    (folder / "pairs.jsonl").write_text("".join(lines))
    return folder / "pairs.jsonl"


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
