"""Lines of a picture are told apart."""

from __future__ import annotations

from dynamask.inspect.style import MECHANISMS, line_style


def test_a_dozen_mechanisms_look_different_and_the_known_ones_alike_everywhere() -> None:
    looks = [str(line_style(f"form {number}", number)) for number in range(12)]
    looks += [str(line_style(name, number)) for number, name in enumerate(MECHANISMS)]
    assert len(set(looks)) == len(looks)
    assert line_style("mha", 0) == line_style("mha", 7)


def test_a_style_is_its_callers_own() -> None:
    line_style("mha")["color"] = "red"
    line_style("other", 1)["color"] = "red"
    assert line_style("mha")["color"] != "red"
    assert line_style("other", 1)["color"] != "red"
