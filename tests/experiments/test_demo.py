import pathlib

from experiments.demo import Demo, main


def test_demo_in_small(tmp_path, capsys):
    figures = main(
        Demo(sparsity=0.5, epochs=2, widths=(4, 4, 8), out=tmp_path / "demo")
    )
    assert sum(figures["widths"].values()) == 8
    assert figures["small_parameters"] < figures["dense_parameters"]
    assert figures["difference"] < 1e-4
    assert figures["small_seconds"] > 0
    picture = pathlib.Path(tmp_path / "demo/report.png")
    assert picture.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "AltSDP, cut" in printed and "report:" in printed
