"""The web page in a real browser: a Chromium of the system, without a window."""

import io
import shutil
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from conftest import make_pipeline, smooth_picture

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

pytest.importorskip("gradio", reason="the page needs Gradio: pip install 'flowsr[app]'")
playwright = pytest.importorskip("playwright.sync_api", reason="a browser is driven by playwright")
absent = pytest.mark.skipif(BROWSER is None, reason="there is no Chromium here (Debian: apt-get install chromium)")

from flowsr.page import Page, layout, read_strokes  # noqa: E402


def in_browser(test):
    return pytest.mark.slow(absent(test))


EXACT = "exact: the answer of the flow"


@pytest.fixture(scope="module")
def page_of_pipeline():
    return Page(make_pipeline(), model="tiny")


@pytest.fixture(scope="module")
def address(page_of_pipeline):
    app = layout()
    blocks = app.build(page_of_pipeline)
    address = blocks.launch(prevent_thread_lock=True, quiet=True, **app.LAUNCH)[1]
    yield address
    blocks.close()


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextmanager
def visit(browser, address, **options):
    context = browser.new_context(**options)
    tab = context.new_page()
    tab.goto(address)
    tab.locator("#start").wait_for()
    yield tab
    context.close()


def upload(tab, path):
    tab.locator("input[type=file]").first.set_input_files(str(path))


def run(tab, path):
    upload(tab, path)
    tab.get_by_text("which becomes").wait_for()
    tab.locator("#start").click()
    tab.get_by_text(EXACT).wait_for()


def words(tab) -> str:
    return tab.locator("#words").inner_text()


def download(tab) -> tuple[str, bytes]:
    with tab.expect_download() as waiting:
        tab.locator("#save").click()
    return waiting.value.suggested_filename, Path(waiting.value.path()).read_bytes()


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.jpg"
    exif = PIL.Image.Exif()
    exif[0x010F] = "A maker"
    smooth_picture(60, 40).save(path, exif=exif, dpi=(72, 72))
    return path


@in_browser
def test_upload_run_and_download_with_metadata(browser, address, photo):
    with visit(browser, address, accept_downloads=True) as tab:
        run(tab, photo)
        assert "Fidelity 0.00" in words(tab)
        tab.wait_for_timeout(1000)  # the file follows the picture
        name, data = download(tab)
    made = PIL.Image.open(io.BytesIO(data))
    assert name == "photo_x4.jpg" and made.size == (240, 160) and made.format == "JPEG"
    assert made.getexif()[0x010F] == "A maker" and round(made.info["dpi"][0]) == 288
    xmp = made.info["xmp"].decode()
    assert 'flowsr:model="tiny"' in xmp and 'flowsr:fidelity="0.0"' in xmp and 'flowsr:seed="0"' in xmp


@in_browser
def test_the_dial_blends_while_it_moves_and_is_exact_when_it_rests(browser, address, photo):
    with visit(browser, address) as tab:
        run(tab, photo)
        picture = tab.locator("#slider img").last
        vivid = picture.get_attribute("src")
        box = tab.locator("#dial input[type=range]").bounding_box()
        y = box["y"] + box["height"] / 2
        tab.mouse.move(box["x"] + 5, y)
        tab.mouse.down()
        tab.mouse.move(box["x"] + box["width"] / 2, y, steps=5)
        tab.get_by_text("a blend of the two ends. Let go").wait_for()
        tab.wait_for_function("before => [...document.querySelectorAll('#slider img')].pop().src != before", arg=vivid)
        tab.mouse.up()
        tab.get_by_text(EXACT).wait_for()
        assert 0.4 < float(words(tab).split()[1].strip(",")) < 0.6


@in_browser
def test_a_brush_paints_fidelity(browser, address, photo):
    with visit(browser, address, accept_downloads=True) as tab:
        run(tab, photo)
        tab.get_by_role("tab", name="Paint fidelity").click()
        canvas = tab.locator("#canvas canvas").first
        canvas.wait_for()
        tab.wait_for_timeout(1500)  # the editor draws its background
        box = canvas.bounding_box()
        x, y = box["x"] + 0.4 * box["width"], box["y"] + 0.5 * box["height"]
        tab.mouse.move(x, y)
        tab.mouse.down()
        tab.mouse.move(x + 60, y + 20, steps=6)
        tab.mouse.up()
        tab.get_by_text("A painted map").wait_for()
        assert "vivid" in words(tab) and not words(tab).startswith("A painted map: 0 %")
        tab.wait_for_timeout(1000)
        name, data = download(tab)
    assert 'flowsr:fidelity="painted, 0.0 elsewhere"' in PIL.Image.open(io.BytesIO(data)).info["xmp"].decode()


@in_browser
def test_a_wrong_file_is_refused_in_words(browser, address, tmp_path):
    wrong = tmp_path / "wrong.png"
    wrong.write_bytes(b"no picture at all")
    with visit(browser, address) as tab:
        upload(tab, wrong)
        tab.get_by_text("wrong.png: not a picture").wait_for()
        assert str(tmp_path) not in tab.content()


@in_browser
def test_two_visitors_at_once_get_their_own_pictures(browser, address, tmp_path):
    sizes = {"wide.png": (64, 24), "tall.png": (24, 64)}
    for name, size in sizes.items():
        smooth_picture(*size).save(tmp_path / name)
    with visit(browser, address) as first, visit(browser, address) as second:
        tabs = dict(zip(sizes, (first, second)))
        for name, tab in tabs.items():
            upload(tab, tmp_path / name)
            tab.get_by_text(f"{name}: ").wait_for()
        for tab in tabs.values():
            tab.locator("#start").click()
        for name, tab in tabs.items():
            tab.get_by_text(EXACT).wait_for()
            tab.wait_for_timeout(300)
            seen = tab.evaluate("(() => { const i = [...document.querySelectorAll('#slider img')].pop();"
                                " return [i.naturalWidth, i.naturalHeight]; })()")  # fmt: skip
            assert tuple(seen) == tuple(4 * side for side in sizes[name])


@in_browser
def test_cancel_ends_the_work(browser, address, page_of_pipeline, photo):
    evaluations = []

    def slow(*_):
        evaluations.append(1)
        time.sleep(0.5)

    hook = page_of_pipeline.pipe.unet.register_forward_hook(slow)
    try:
        with visit(browser, address) as tab:
            upload(tab, photo)
            tab.get_by_text("which becomes").wait_for()
            tab.locator("#start").click()
            tab.wait_for_function("document.body.innerText.includes('network evaluations')")
            tab.locator("#stop").click()
            tab.get_by_text("Cancelled.").first.wait_for()
            tab.wait_for_timeout(1200)
            assert len(evaluations) < 5
    finally:
        hook.remove()
    with visit(browser, address) as tab:  # the next one is served
        run(tab, photo)


@in_browser
def test_it_fits_on_a_phone(browser, address, photo):
    phone = {"viewport": {"width": 390, "height": 844}, "device_scale_factor": 2, "has_touch": True, "is_mobile": True}
    with visit(browser, address, **phone) as tab:
        run(tab, photo)
        assert tab.evaluate("document.documentElement.scrollWidth") <= 390
        slider = tab.locator("#slider").bounding_box()
        assert slider["x"] >= 0 and slider["x"] + slider["width"] <= 390


def test_the_api_upscales_a_file_in_one_call(address, photo):
    from gradio_client import Client, handle_file

    client = Client(address, verbose=False)
    assert list(client.view_api(return_format="dict")["named_endpoints"]) == ["/upscale"]
    answer = client.predict(handle_file(str(photo)), 0.5, 4, 7, "soft", "PNG", 2, api_name="/upscale")
    made = PIL.Image.open(answer)
    assert made.size == (120, 80) and made.format == "PNG" and 'flowsr:seed="7"' in made.info["xmp"].decode()
    with pytest.raises(Exception, match="greater than maximum"):
        client.predict(handle_file(str(photo)), 2, 4, 7, "soft", "PNG", 2, api_name="/upscale")


def test_strokes_are_told_by_their_colour():
    layer = np.zeros((2, 3, 4), np.uint8)
    assert read_strokes([]) is None and read_strokes([layer]) is None
    layer[0, 0], layer[1, 2] = (47, 107, 255, 255), (255, 138, 31, 255)
    strokes = read_strokes([layer])
    assert strokes[0, 0] == 1 and strokes[1, 2] == 0 and np.isnan(strokes).sum() == 4


def test_a_space_is_told_to_install_what_the_package_needs():
    root = Path(__file__).resolve().parents[1]
    listed = (root / "docs" / "page.md").read_text().rsplit("```\n", 2)[-2].split()
    setup = (root / "setup.py").read_text()
    needed = setup[setup.index("install_requires=[") : setup.index("extras_require")]
    assert listed == [line.split('"')[1] for line in needed.splitlines() if line.strip().startswith('"')]
