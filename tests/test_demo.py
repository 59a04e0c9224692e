from dataclasses import replace

from PIL import Image

from autohdr.demo import demo, demo_train
from autohdr.train.config import load_config


def test_demo(tmp_path, capsys):
    result = demo(tmp_path / "demo")
    assert {path.suffix for path in result.enhanced.iterdir()} == {".jpg", ".jsonl"} and result.report.is_file()
    printed = capsys.readouterr().out
    for shown in (str(result.report), str(result.enhanced), "auto-tone", "autohdr enhance PHOTO_OR_FOLDER"):
        assert shown in printed


def test_demo_that_trains(tmp_path, capsys):
    """Everything in small: rooms, a run, a report, enhanced photos; a second demo replaces the first."""
    config = replace(
        load_config("demo"),
        model_args={"dim": 8, "num_blocks": [1, 1, 1, 1], "num_refinement_blocks": 0},
        size=32,
        epochs=1,
        warmup_epochs=0,
    )
    out = tmp_path / "demo"
    size = {"scenes": 4, "held_out": 1, "height": 32, "width": 48}
    result = demo_train(out, config=config, **size)
    assert sorted(path.name for path in result.enhanced.iterdir()) == ["0000_src.jpg", "autohdr.jsonl"]
    assert Image.open(result.enhanced / "0000_src.jpg").size == (48, 32)
    printed = capsys.readouterr().out
    verdict = "at least" if result.margin >= 0.5 else "LESS than"  # one room and no training: either may come of it
    margin = f"{result.margin:+.2f} dB PSNR against gain and gamma, {verdict} the +0.5 dB"
    for shown in (str(result.report), str(result.enhanced), margin):
        assert shown in printed
    assert result.report.is_file()

    (out / "stale.txt").touch()
    demo_train(out, config=config, **size)
    assert not (out / "stale.txt").exists()
