"""The most that was seen within a while."""

from __future__ import annotations

from workers.sizing import Peak


def test_a_peak_lasts_for_its_window_and_then_the_next_highest_counts() -> None:
    peak = Peak(10.0)
    assert [peak.see(value, now) for now, value in ((0, 1), (1, 4), (2, 2), (5, 3), (6, 0))] == [1, 4, 4, 4, 4]
    assert peak.see(0, 11.0) == 4
    assert peak.see(0, 11.5) == 3
    assert peak.see(0, 15.5) == 0
    assert peak.see(1, 15.5) == 1
