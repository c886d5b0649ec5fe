"""The benchmark of compile time and of a large mesh, at a small size."""

from experiments.benchmarks import scale


def test_ratios_come_last_and_the_decoder_sends_two_sums(capsys):
    config = scale.Config(layers=(1,), names=("valley",), decoder=1, mesh=(2, 2))
    found = scale.main(config)
    plan = found["decoder"]
    # One number for all, and on the ramp two for each channel.
    sent = [("all_reduce", 4), ("all_reduce", 8 * plan["channels"])]
    assert plan["collectives"] == sent
    assert plan["devices"] == 4
    assert plan["moments"] == 2 * plan["parameters"]
    assert found["1"]["adamw"] == 1 and found["1"]["valley"] > 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("decoder of 1 layers on 4 devices")
    assert "ratio to adamw" in lines[-1]
