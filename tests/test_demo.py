"""`python -m rawkern demo`, much reduced: the training, the comparison with plain PyTorch, the picture."""

import argparse
from dataclasses import replace

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from PIL import Image

from rawkern import demo
from rawkern.demo_decoder import Decoder, Plain, Rawkern, enlarge, psnr, reduce

TINY = demo.Size(features=8, blocks=1, batch=2, patch=8, steps=6, rate=5e-3)


@pytest.fixture(scope="module")
def photographs():
    return demo.load_photographs()


@pytest.fixture(scope="module")
def small_photographs(photographs):
    """Held-out parts cut down, so that judging them takes no time."""
    return [
        replace(p, held_out=p.held_out[:, 200:264, -64:], held_out_small=p.held_out_small[:, 50:66, -16:])
        for p in photographs
    ]


def arguments(*texts):
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    return parser.parse_args(texts)


def test_it_writes_the_picture_and_curves_agree(monkeypatch, small_photographs, device, tmp_path, capsys):
    monkeypatch.setitem(demo.SIZES, "small", TINY)
    monkeypatch.setattr(demo, "load_photographs", lambda: small_photographs)
    results = []
    original = demo.run
    monkeypatch.setattr(demo, "run", lambda *args: results.append(original(*args)) or results[0])
    output = tmp_path / "demo.png"
    status = demo.main(arguments("--size", "small", "--device", device, "--output", str(output)))
    result = results[0]
    assert status == (1 if result.failures() else 0)
    assert len(result.losses) == len(result.plain_losses) == TINY.steps
    assert result.losses[0] == pytest.approx(1.0)  # it starts at bicubic
    assert result.losses[-1] != result.losses[0]
    assert result.difference < 1e-3
    image = Image.open(output)
    assert image.format == "PNG" and min(image.size) > 500
    assert output.stat().st_size < 400_000
    printed = capsys.readouterr().out
    assert "china" in printed and "flower" in printed and "dB" in printed


def test_failures_are_failures(small_photographs):
    bicubic = [enlarge(p.held_out_small[None])[0] for p in small_photographs]
    perfect = [p.held_out for p in small_photographs]
    curves = [1.0, 0.9]
    assert not demo.Result(small_photographs, perfect, curves, curves, 1, 1).failures()
    assert len(demo.Result(small_photographs, bicubic, curves, curves, 1, 1).failures()) == 2
    assert len(demo.Result(small_photographs, perfect, curves, [1.0, 0.8], 1, 1).failures()) == 1
    assert demo.Result(small_photographs, perfect, curves, [1.0, float("nan")], 1, 1).failures()
    assert demo.Result(small_photographs, perfect, [float("nan"), 1.0], curves, 1, 1).failures()


def test_nothing_of_the_held_out_part_is_trained_on(photographs):
    for p in photographs:
        assert p.held_out.shape[2] + p.train.shape[2] == 640
        torch.testing.assert_close(reduce(p.train[None])[0], p.train_small)
        torch.testing.assert_close(reduce(p.held_out[None])[0], p.held_out_small)


def test_patches_match_their_reduced_patches(photographs):
    """Reducing a patch gives its low-resolution twin (away from the border, which reduction continues)."""
    small, large = demo._batch(photographs, replace(TINY, batch=16), torch.Generator().manual_seed(0))
    assert small.shape == (16, 3, 8, 8) and large.shape == (16, 3, 32, 32)
    torch.testing.assert_close(reduce(large)[..., 3:-3, 3:-3], small[..., 3:-3, 3:-3], atol=0.02, rtol=0)


def test_the_plain_decoder_has_the_same_state():
    plain, ours = Decoder(Plain, 8, 2), Decoder(Rawkern, 8, 2)
    ours.load_state_dict(plain.state_dict(), strict=True)
    assert list(plain.state_dict()) == list(ours.state_dict())


def test_psnr():
    original = torch.full((3, 4, 4), 0.5)
    assert psnr(original + 0.1, original) == pytest.approx(20.0, abs=1e-4)
    assert psnr(original - 2, original) == pytest.approx(6.0206, abs=1e-3)  # colours are clamped


def test_steps_must_be_positive(capsys):
    assert demo.main(arguments("--steps", "0")) == 2


def test_a_missing_folder_is_found_before_the_work(tmp_path):
    assert demo.main(arguments("--output", str(tmp_path / "missing" / "demo.png"))) == 2
