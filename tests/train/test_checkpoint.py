import pytest
import torch

from autohdr.errors import UserError
from autohdr.train.checkpoint import load_state, restore_rng, rng_state, save_state

KEYS = ("run_id", "step", "epoch", "epoch_steps", "epoch_loss", "epoch_seconds", "history", "rng", "model", "optimizer", "scaler")


def make_state(**values):
    return dict.fromkeys(KEYS, 0) | values


def test_state_reads_back(tmp_path):
    state = make_state(step=3, history=[{"epoch": 1, "val_psnr": 20.5}], model={"w": torch.arange(3.0)})
    save_state(tmp_path / "state.pt", state)
    loaded = load_state(tmp_path / "state.pt")
    assert torch.equal(loaded["model"].pop("w"), state["model"].pop("w"))
    assert loaded == state
    assert [file.name for file in tmp_path.iterdir()] == ["state.pt"]


def test_a_failed_save_leaves_the_old_state(tmp_path):
    save_state(tmp_path / "state.pt", make_state(step=1))
    with pytest.raises(AttributeError):
        save_state(tmp_path / "state.pt", make_state(step=2, unpicklable=lambda: None))
    assert load_state(tmp_path / "state.pt")["step"] == 1
    assert [file.name for file in tmp_path.iterdir()] == ["state.pt"]


def test_rejects_a_missing_state(tmp_path):
    with pytest.raises(UserError, match="nothing to resume"):
        load_state(tmp_path / "state.pt")


@pytest.mark.parametrize("keep", [0, 10, 300])
def test_rejects_a_damaged_state(tmp_path, keep):
    path = tmp_path / "state.pt"
    save_state(path, make_state(model={"w": torch.arange(100.0)}))
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match="damaged or foreign"):
        load_state(path)


@pytest.mark.parametrize(
    "content, missing",
    [({key: 0 for key in KEYS if key != "rng"}, "rng$"), ({"w": torch.ones(1)}, "epoch, .*"), (torch.ones(1), "epoch, .*")],
    ids=["another version's", "weights", "tensor"],
)
def test_rejects_a_foreign_state(tmp_path, content, missing):
    torch.save(content, tmp_path / "state.pt")
    with pytest.raises(UserError, match=f"expected a training state, got a file without {missing}"):
        load_state(tmp_path / "state.pt")


def test_rng_is_restored():
    before = rng_state()
    first = torch.rand(3)
    restore_rng(before)
    assert torch.equal(torch.rand(3), first)
