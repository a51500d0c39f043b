"""What is said while a download goes on."""

from vmtasks.installer.download.fetch import Meter


def test_the_meter_says_rate_and_time_left_not_too_often():
    said: list[str] = []
    clock = [0.0]
    meter = Meter(said.append, every_s=1, clock=lambda: clock[0])
    for second in range(21):  # 5 MB/s, told twice a second
        clock[0] = second / 2
        meter(60_000_000 + second * 2_500_000, 260_000_000)
    assert len(said) == 11
    assert said[0] == "60.0 of 260.0 MB (23 %)"
    assert said[-1] == "110.0 of 260.0 MB (42 %), 5.0 MB/s, 30 s left"
    meter(0, None)
    assert said[-1] == "0.0 MB"
    clock[0] += 0.5
    meter(10_000_000, 10_000_000)
    assert said[-1] == "10.0 of 10.0 MB (100 %), 20.0 MB/s"
