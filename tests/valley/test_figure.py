import sys

import pytest

from tests.valley.test_certificate import certificate


def titles(figure):
    return [axes.get_title() for axes in figure.axes]


def test_draws_what_there_is(tmp_path):
    path = tmp_path / "certificate.png"
    figure = certificate().plot(path)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert titles(figure) == [
        "loss along the paths",
        "training",
        "moves of the same kind",
        "spectrum",
    ]
    line = figure.axes[0].lines[0].get_ydata()
    assert list(line) == list(certificate().line.train["loss"])
    few = certificate(histories={}, density=None).plot()
    assert titles(few) == [
        "loss along the paths",
        "moves of the same kind",
        "largest eigenvalues",
    ]


def test_says_what_to_install_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'sdp-jax\[plot\]'"):
        certificate().plot()
