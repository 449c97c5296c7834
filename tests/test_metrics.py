"""Metrics against closed forms, second implementations and published numbers."""

from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from conftest import make_pipeline, random_picture, smooth_picture
from safetensors.torch import save_file

from flowsr.degradations import matlab_bicubic
from flowsr.evaluation import load_pairs, markdown_table, measure_dial, measure_steps, plot_dial, read_others
from flowsr.metrics import detail, haarpsi, load_lpips, lr_psnr, luma, psnr_y, ssim_y

SHARED = Path(__file__).resolve().parents[2] / "shared"
needs_published = pytest.mark.skipif(
    not (SHARED / "data/Set5").is_dir(), reason="the published test sets Set5 and Set14 are not beside this checkout"
)


def test_luma_spans_the_studio_range():
    primaries = np.array([[[0, 0, 0], [255, 255, 255], [255, 0, 0], [0, 255, 0], [0, 0, 255]]], np.uint8)
    np.testing.assert_allclose(luma(primaries)[0], [16, 235, 81.481, 144.553, 40.966], atol=1e-9)


def test_psnr_of_a_constant_difference():
    a = np.full((20, 24, 3), 100, np.uint8)
    b = a + np.uint8(5)
    assert psnr_y(a, b, 4) == pytest.approx(20 * np.log10(255 / (5 * 219 / 255)), abs=1e-9)
    assert psnr_y(a, a, 4) == float("inf")


def test_the_border_does_not_count():
    a = np.asarray(random_picture(24, 20)).copy()
    b = a.copy()
    b[:4], b[-4:], b[:, :4], b[:, -4:] = 0, 0, 0, 0
    assert psnr_y(a, b, 4) == float("inf")
    assert ssim_y(a, b, 4) == pytest.approx(1)


def test_ssim_equals_its_definition():
    # Wang et al. 2004, eq. 13, written out with dense windows.
    a, b = (np.asarray(random_picture(30, 28, seed=i)) for i in range(2))
    b = ((a.astype(int) + b) // 2).astype(np.uint8)
    y_a, y_b = (luma(x)[4:-4, 4:-4] for x in (a, b))
    offsets = np.arange(11) - 5
    window = np.exp(-(offsets[:, None] ** 2 + offsets**2) / (2 * 1.5**2))
    window /= window.sum()
    c1, c2, values = (0.01 * 255) ** 2, (0.03 * 255) ** 2, []
    for i in range(y_a.shape[0] - 10):
        for j in range(y_a.shape[1] - 10):
            p, q = y_a[i : i + 11, j : j + 11], y_b[i : i + 11, j : j + 11]
            mean_p, mean_q = (window * p).sum(), (window * q).sum()
            var_p, var_q = (window * (p - mean_p) ** 2).sum(), (window * (q - mean_q) ** 2).sum()
            covariance = (window * (p - mean_p) * (q - mean_q)).sum()
            values.append(
                (2 * mean_p * mean_q + c1) * (2 * covariance + c2)
                / ((mean_p**2 + mean_q**2 + c1) * (var_p + var_q + c2))
            )  # fmt: skip
    assert ssim_y(a, b, 4) == pytest.approx(np.mean(values), abs=1e-4)


def test_detail_is_the_energy_beyond_the_lr_grid():
    y, x = np.mgrid[0:96, 0:96]
    wave = lambda period, height: height * np.cos(2 * np.pi * x / period) * np.cos(2 * np.pi * y / period)  # noqa: E731
    grey = lambda levels: np.repeat(np.round(128 + levels)[..., None], 3, axis=-1).astype(np.uint8)  # noqa: E731
    hr = grey(wave(40, 40) + wave(4, 40))
    assert detail(hr, hr, 4) == 1
    assert abs(detail(grey(wave(40, 80) + wave(4, 40)), hr, 4) - 1) < 0.02  # what the LR holds does not count
    assert abs(detail(grey(wave(40, 40) + wave(4, 20)), hr, 4) - 0.25) < 0.02
    assert detail(grey(wave(40, 40)), hr, 4) < 0.01


def test_lr_psnr_is_bounded_by_rounding_for_a_consistent_picture():
    hr = np.asarray(smooth_picture(48, 40))
    assert lr_psnr(hr, matlab_bicubic(hr, 4), 4) > 55
    assert lr_psnr(255 - hr, matlab_bicubic(hr, 4), 4) < 20


def test_shapes_must_agree():
    a = np.zeros((20, 20, 3), np.uint8)
    with pytest.raises(ValueError, match="one shape"):
        psnr_y(a, a[:10], 4)
    with pytest.raises(ValueError, match="Nothing is left"):
        psnr_y(a[:8], a[:8], 4)


@needs_published
@pytest.mark.parametrize("name", ["Set5", "Set14"])
def test_downscaling_reproduces_the_published_pictures(name):
    for pair in load_pairs(SHARED / f"data/{name}/HR", SHARED / f"data/{name}/LRx4", 4):
        assert np.array_equal(matlab_bicubic(pair.hr, 4), pair.lr), pair.name


@needs_published
@pytest.mark.parametrize(("name", "psnr", "ssim"), [("Set5", 28.43, 0.811), ("Set14", 26.09, 0.705)])
def test_bicubic_has_the_published_numbers(name, psnr, ssim):
    pairs = load_pairs(SHARED / f"data/{name}/HR", SHARED / f"data/{name}/LRx4", 4)
    row = measure_steps(make_pipeline(), pairs, steps=[])["rows"][0]
    assert row["psnr_y"] == pytest.approx(psnr, abs=0.01)
    assert row["ssim_y"] == pytest.approx(ssim, abs=0.001)


@pytest.mark.skipif(not (SHARED / "lpips").is_dir(), reason="weights of LPIPS are not beside this checkout")
def test_lpips_equals_the_reference_implementation():
    import importlib.util

    weights = SHARED / "lpips/lpips_squeeze_v0.1.safetensors"
    specification = importlib.util.spec_from_file_location("reference", SHARED / "lpips/lpips_squeeze.py")
    reference = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(reference)
    a, b = smooth_picture(70, 64), random_picture(70, 64)
    tensors = [torch.from_numpy(np.array(x)).permute(2, 0, 1)[None] / 127.5 - 1 for x in (a, b)]
    expected = float(reference.LPIPSSqueeze(weights)(*tensors))
    distance, words = load_lpips(str(weights))
    assert distance(np.asarray(a), np.asarray(b)) == pytest.approx(expected, rel=1e-5)
    assert "SqueezeNet" in words


def test_test_pictures_of_sixteen_bits_keep_their_brightness(tmp_path):
    levels = np.asarray(smooth_picture(32, 24).convert("L"))
    PIL.Image.fromarray(levels.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    (pair,) = load_pairs(str(tmp_path), None, 4)
    assert np.array_equal(pair.hr, np.stack([levels] * 3, axis=-1))


def test_all_of_lpips_moves_to_a_device(tmp_path):
    from safetensors.torch import save_file
    from torch import nn

    from flowsr.lpips import FIRES, Fire, SqueezeLPIPS

    layers = {"0": nn.Conv2d(3, 64, 3, stride=2), **{str(n): Fire(*sizes) for n, sizes in FIRES.items()}}
    state = {f"backbone.{name}": weight for name, weight in nn.ModuleDict(layers).state_dict().items()}
    channels = (64, 128, 256, 384, 384, 512, 512)
    state |= {f"lin{n}.weight": torch.ones(1, width, 1, 1) for n, width in enumerate(channels)}
    save_file(state, tmp_path / "lpips.safetensors")
    network = SqueezeLPIPS(str(tmp_path / "lpips.safetensors")).to("meta")
    distance = network(*torch.zeros(2, 2, 3, 64, 64, device="meta"))
    assert (distance.shape, distance.device.type) == ((2,), "meta")


def test_evaluation_of_a_folder(tmp_path):
    (tmp_path / "hr").mkdir()
    (tmp_path / "lr").mkdir()
    for i in range(2):
        smooth_picture(50 + i, 43).save(tmp_path / f"hr/{i}.png")
        hr = np.asarray(smooth_picture(50 + i, 43))[:40, :48]
        PIL.Image.fromarray(matlab_bicubic(hr, 4)).save(tmp_path / f"lr/{i}x4.png")
    made, given = load_pairs(tmp_path / "hr", None, 4), load_pairs(tmp_path / "hr", tmp_path / "lr", 4)
    for a, b in zip(made, given):
        assert a.hr.shape == (40, 48, 3)
        assert np.array_equal(a.lr, b.lr)
    result = measure_steps(make_pipeline(), made, steps=[1, 2], consistency="exact")
    assert [row["method"] for row in result["rows"]] == ["bicubic", "flowsr, 1 step", "flowsr, 2 steps"]
    table = markdown_table(result["rows"]).splitlines()
    assert len(table) == 5
    assert f"{result['rows'][1]['psnr_y']:.2f}" in table[3]
    assert result["rows"][1]["psnr_y"] == pytest.approx(np.mean([i["psnr_y"] for i in result["rows"][1]["images"]]))


def test_evaluation_names_what_does_not_fit(tmp_path):
    (tmp_path / "hr").mkdir()
    (tmp_path / "lr").mkdir()
    with pytest.raises(ValueError, match="No pictures"):
        load_pairs(tmp_path / "hr", None, 4)
    with pytest.raises(ValueError, match="no folder"):
        load_pairs(tmp_path / "absent", None, 4)
    smooth_picture(48, 40).save(tmp_path / "hr/a.png")
    with pytest.raises(ValueError, match="must hold one LR picture for a.png"):
        load_pairs(tmp_path / "hr", tmp_path / "lr", 4)
    smooth_picture(24, 20).save(tmp_path / "lr/a.png")
    with pytest.raises(ValueError, match="Is the scale right"):
        load_pairs(tmp_path / "hr", tmp_path / "lr", 4)


def haarpsi_by_scipy(a: np.ndarray, b: np.ndarray) -> float:
    """The published formulas written for scipy's convolution, one picture and one channel at a time."""
    from scipy.signal import convolve2d

    def channels(image):
        r, g, b = image.astype(float).transpose(2, 0, 1)
        planes = [
            0.299 * r + 0.587 * g + 0.114 * b,
            0.596 * r - 0.274 * g - 0.322 * b,
            0.211 * r - 0.523 * g + 0.312 * b,
        ]
        return [convolve2d(plane, np.ones((2, 2)) / 4, "same")[::2, ::2] for plane in planes]

    def coefficients(plane):
        found = []
        for scale in (1, 2, 3):
            kernel = np.ones((2**scale, 2**scale)) * 2.0**-scale
            kernel[: 2 ** (scale - 1)] *= -1
            found.append(np.abs(convolve2d(plane, kernel, "same")))
            found.append(np.abs(convolve2d(plane, kernel.T, "same")))
        return found

    def similar(x, y):
        return (2 * x * y + 30) / (x**2 + y**2 + 30)

    first, second = channels(a), channels(b)
    x, y = coefficients(first[0]), coefficients(second[0])
    weights = [np.maximum(x[4 + turned], y[4 + turned]) for turned in (0, 1)]
    local = [(similar(x[turned], y[turned]) + similar(x[2 + turned], y[2 + turned])) / 2 for turned in (0, 1)]
    box = np.ones((2, 2)) / 4
    chroma = [[np.abs(convolve2d(plane, box, "same")) for plane in found[1:]] for found in (first, second)]
    local.append(sum(similar(p, q) for p, q in zip(*chroma)) / 2)
    weights.append(sum(weights) / 2)
    value = sum((w / (1 + np.exp(-4.2 * s))).sum() for w, s in zip(weights, local)) / sum(w.sum() for w in weights)
    return (np.log(value / (1 - value)) / 4.2) ** 2


def test_haarpsi_against_its_formulas_in_scipy():
    pytest.importorskip("scipy")
    picture = np.asarray(smooth_picture(37, 30))
    noisy = np.clip(picture + np.random.default_rng(0).normal(0, 12, picture.shape), 0, 255).astype(np.uint8)
    assert haarpsi(picture, noisy) == pytest.approx(haarpsi_by_scipy(picture, noisy), abs=1e-9)
    assert haarpsi(picture, picture) == pytest.approx(1, abs=1e-9)


def test_haarpsi_falls_with_noise_and_is_symmetric():
    picture = np.asarray(smooth_picture(64, 48))
    noise = np.random.default_rng(0).normal(0, 1, picture.shape)
    noisy = [np.clip(picture + std * noise, 0, 255).astype(np.uint8) for std in (2, 8, 32)]
    values = [haarpsi(picture, each) for each in noisy]
    assert 1 > values[0] > values[1] > values[2] > 0
    assert values[1] == pytest.approx(haarpsi(noisy[1], picture))


def test_the_curve_goes_from_the_faithful_end_to_the_vivid_one(tmp_path):
    smooth_picture(64, 64).save(tmp_path / "a.png")
    pairs = load_pairs(tmp_path, None, 4)
    pipe = make_pipeline()
    result = measure_dial(pipe, pairs, steps=[1, 2, 4], fidelities=[0.5])
    rows = [row for row in result["rows"] if "steps" in row]
    assert [(row["steps"], row["fidelity"]) for row in rows] == [(1, 1.0), (4, 0.5), (2, 0.0), (4, 0.0)]
    alone = measure_steps(pipe, pairs, steps=[4], fidelity=0.5)["rows"][1]
    assert rows[1]["psnr_y"] == alone["psnr_y"]
    for row in rows:
        row["lpips"] = 0.1
    (tmp_path / "others.csv").write_text("system,psnr_y,lpips,remark\nA,28.5,0.2,first\nB,26,0.1,\n")
    others = read_others(str(tmp_path / "others.csv"))
    assert others == [{"system": "A", "psnr_y": 28.5, "lpips": 0.2}, {"system": "B", "psnr_y": 26.0, "lpips": 0.1}]
    plot_dial(result, others, tmp_path / "curve.png")
    assert min(PIL.Image.open(tmp_path / "curve.png").size) > 400


@pytest.mark.parametrize(
    ("text", "message"),
    [("system,psnr_y\nA,1\n", "needs the columns"), ("system,psnr_y,lpips\nA,1,high\n", "is no number")],
)
def test_tables_of_others_that_cannot_be_read_are_named(text, message, tmp_path):
    (tmp_path / "others.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_others(str(tmp_path / "others.csv"))


def test_a_file_that_is_not_lpips_is_named(tmp_path):
    (tmp_path / "text.safetensors").write_text("no weights")
    save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    for name in ("text", "other"):
        with pytest.raises(ValueError, match=f"{name}.safetensors does not hold the weights of LPIPS"):
            load_lpips(str(tmp_path / f"{name}.safetensors"))
