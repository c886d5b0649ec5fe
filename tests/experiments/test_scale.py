"""The benchmark of compile time and of a large mesh, at a small size."""

from experiments.benchmarks import scale


def test_ratios_come_last_and_the_decoder_sends_one_sum(capsys):
    config = scale.Config(layers=(1,), names=("valley, full",), decoder=1, mesh=(2, 2))
    found = scale.main(config)
    plan = found["decoder"]
    # One sum of squares for each channel, and one number for all.
    assert plan["collectives"] == [("all_reduce", 4 * (plan["channels"] + 1))]
    assert plan["devices"] == 4
    assert plan["dual"] == plan["moments"] == 2 * plan["parameters"]
    assert found["1"]["adamw"] == 1 and found["1"]["valley, full"] > 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("decoder of 1 layers on 4 devices")
    assert "ratio to adamw" in lines[-1]
