import json

import pytest

from experiments.quadratic import Quadratic, main


@pytest.mark.study
def test_explicit_stays_at_the_exact_point(tmp_path, capsys):
    figures = main(Quadratic(time=20.0, seeds=2, out=tmp_path))
    plain, explicit = (
        figures["as training goes on"][method] for method in ("plain", "explicit")
    )
    # At the start SGD itself is still on its way.
    for a, b in zip(plain, explicit, strict=True):
        for x, y in zip(a[-3:], b[-3:], strict=True):
            assert y["distance"] < 0.1 * x["distance"]
            assert y["loss"] < 1e-4 * x["loss"]
            assert y["zero"] == y["exact_zero"]
    # Plain AltSDP draws nearer like a power of time.
    assert figures["slope"]["plain"] < -0.2
    assert (tmp_path / "distance.png").stat().st_size > 10_000
    written = json.loads((tmp_path / "quadratic.json").read_text())
    assert written["slope"]["plain"] == pytest.approx(figures["slope"]["plain"])
    assert "rushed, explicit" in capsys.readouterr().out
