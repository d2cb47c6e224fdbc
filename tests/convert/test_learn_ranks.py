"""`learn_ranks` finds planted structure, trains nothing else, and resumes exactly."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from dynamask import InvalidInputError, convert
from dynamask.convert.progress import Progress, save_state


def planted_blocks(count: int, length: int = 96) -> list[torch.Tensor]:
    """Blocks of noise with some tokens, of ids below 10, that `planted` makes every query look for."""
    blocks = torch.randint(10, 300, (count, 2, length))
    marks = torch.rand(count, 2, length) < 0.1
    return list(torch.where(marks, torch.randint(3, 10, blocks.shape), blocks))


def planted(llama: Any) -> Any:
    """Make every query of the first layer attend to the tokens of ids 3 to 9."""
    with torch.no_grad():
        llama.model.embed_tokens.weight.normal_(0.0, 0.3)
        llama.model.embed_tokens.weight[:, 0] = 1.0
        llama.model.embed_tokens.weight[:, 1] = -1.0
        llama.model.embed_tokens.weight[3:10, 1] = 3.0
        for projection, channel in (("q_proj", 0), ("k_proj", 1)):
            weight = getattr(llama.model.layers[0].self_attn, projection).weight
            weight.zero_()
            weight[7::8, channel] = 3.0  # the slowest of the rotary frequencies
    return llama


def recall(model: Any, block: torch.Tensor) -> float:
    """Share of the planted keys among as many best-ranked keys of the first layer."""
    with torch.no_grad():
        layer = model.model.layers[0]
        ranks = layer.self_attn.rank_predictor(layer.input_layernorm(model.model.embed_tokens(block)))
    wanted = (block < 10)[:, None].expand_as(ranks)
    found = [w[r.argsort(descending=True)[: int(w.sum())]] for w, r in zip(wanted.flatten(0, 1), ranks.flatten(0, 1))]  # noqa: B905
    return float(torch.cat(found).float().mean())


def test_it_learns_what_is_attended_to_and_trains_nothing_else(llama: Any) -> None:
    model = convert.upcycle(planted(llama), 24, local=4, sinks=2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    blocks = planted_blocks(8)
    reports: list[Progress] = []
    losses = convert.learn_ranks(model, blocks, steps=40, progress=reports.append)
    assert len(losses) == 40
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    assert recall(model, planted_blocks(1)[0]) > 0.95
    assert model.config.trained_ranks
    for name, value in model.state_dict().items():
        assert ("rank_predictor" in name) or torch.equal(value, before[name]), name
    assert all(parameter.grad is None for parameter in model.parameters())
    assert [report.step for report in reports] == [1, 10, 20, 30, 40]
    assert reports[-1].seconds_left == 0
    # Windows of equal means: the layer in which few keys matter needs few.
    windows = convert.allocate_windows(model, blocks, 24)
    assert sum(map(sum, windows)) == 4 * 24  # type: ignore[arg-type]


class Killed(Exception):
    pass


def test_a_killed_run_continues_to_the_same_ranks(llama: Any, tmp_path: Path) -> None:
    blocks = planted_blocks(3)

    def fresh() -> Any:
        torch.manual_seed(1)
        return convert.upcycle(llama, 24, local=4, sinks=2)

    def kill(report: Progress) -> None:
        if report.step == 20:
            raise Killed

    whole, broken = fresh(), fresh()
    expected = convert.learn_ranks(whole, blocks, steps=25)
    file = tmp_path / "ranks.pt"
    with pytest.raises(Killed):
        convert.learn_ranks(broken, blocks, steps=25, checkpoint=file, save_every=0.0, progress=kill)
    again = fresh()
    losses = convert.learn_ranks(again, blocks, steps=25, checkpoint=file)
    assert losses == expected
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    # A finished run is not trained on, and another run's file is refused.
    assert convert.learn_ranks(fresh(), [], steps=25, checkpoint=file) == expected
    with pytest.raises(InvalidInputError, match="other steps"):
        convert.learn_ranks(fresh(), blocks, steps=26, checkpoint=file)
    file.write_bytes(b"damaged")
    with pytest.raises(InvalidInputError, match="is damaged"):
        convert.learn_ranks(fresh(), blocks, steps=25, checkpoint=file)


def test_bad_input(llama: Any) -> None:
    model = convert.upcycle(llama, 24, local=4, sinks=2)
    for blocks, message in (
        ([], "no blocks"),
        (iter(planted_blocks(2)), "the blocks ended after 2"),
        ([torch.randint(3, 9, (2, 7))], "blocks of 7 tokens teach no ranks"),
        ([torch.rand(2, 7)], "token ids; got torch.float32"),
        (["text"], "token ids"),
        ([torch.full((2, 64), 300)], "token ids must be from 0 to 299; got 300 to 300"),
        (None, "blocks must be an iterable"),
    ):
        with pytest.raises(InvalidInputError, match=message):
            convert.learn_ranks(model, blocks, steps=5)  # type: ignore[arg-type]
        assert not model.config.trained_ranks
    with pytest.raises(InvalidInputError, match=r"made by dynamask.convert.upcycle"):
        convert.learn_ranks(llama, planted_blocks(1), steps=1)
    for options, message in (
        ({"steps": 0}, "steps must be an integer of at least 1"),
        ({"steps": 2.0}, "steps must be an integer of at least 1"),
        ({"steps": 2, "learning_rate": math.nan}, "learning_rate must be a finite number above 0"),
    ):
        with pytest.raises(InvalidInputError, match=message):
            convert.learn_ranks(model, planted_blocks(1), **options)  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match="untrained; run learn_ranks"):
        convert.allocate_windows(model, planted_blocks(1), 24)
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight[0, 0] = math.nan
    with pytest.raises(InvalidInputError, match="layer 1 is not finite at step 1"):
        convert.learn_ranks(model, planted_blocks(1), steps=5)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a file that is always full is Linux's")
def test_a_full_disk_is_named(tmp_path: Path) -> None:
    (tmp_path / "state.pt.partial").symlink_to("/dev/full")
    with pytest.raises(InvalidInputError, match=r"cannot write .*state\.pt: .*(disk space|No space left)"):
        save_state({"weights": torch.zeros(1000)}, tmp_path / "state.pt")
    assert not (tmp_path / "state.pt").exists()
