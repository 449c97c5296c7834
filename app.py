"""The web page: its layout. What its parts do is in flowsr/page.py. `python app.py`, or `flowsr serve`."""

import os

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

import gradio as gr

from flowsr.loading import load_upscaler
from flowsr.page import AS_IT_CAME, FAITHFUL_PAINT, FORMATS, VIVID_PAINT, Page, picture_input

LAUNCH = {"show_error": True, "max_file_size": "64mb", "footer_links": ["api"]}
LIMITS = """
- Texture at low fidelity is **plausible, not evidence**: no number plates, no medical pictures, no faces to identify.
- The heat map says where both ends differ, not where the picture is wrong.
- Between the ends, the moving dial shows a pixel blend of both. It is the theoretical curve between distortion and
  perception (Freirich et al. 2021). Let go, and the flow itself is followed to that point.
- A painted map is always a blend; a blend by a map need not agree with its input as `consistency` asks.
- Another size than x{scale} is that result, resized (Lanczos, antialiased); beyond x{scale} no detail is added.
- At most {megapixels:.1f} megapixels come in, still pictures alone. The page shows a reduced one; the file is whole.
- The weights decide what suits them: `x4` is for clean downscaled photos, and enlarges noise and JPEG blocks.
"""


def build(page: Page) -> gr.Blocks:
    with gr.Blocks(title="flowsr", delete_cache=(3600, 7200)) as blocks:
        gr.Markdown(f"# flowsr\nSuper-resolution x{page.scale}, with a dial between *faithful* and *vivid*.")
        file, work = gr.State(), gr.State(time_to_live=3600)
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                picture = picture_input(sources=["upload", "clipboard"], label="Drop or paste a picture", height=240)
                fidelity = gr.Slider(0, 1, 0, step=0.01, label="Fidelity: 0 vivid, 1 faithful", elem_id="dial")
                with gr.Row():
                    start = gr.Button("Upscale", variant="primary", elem_id="start")
                    stop = gr.Button("Cancel", variant="stop", elem_id="stop")
                with gr.Accordion("More", open=False):
                    steps = gr.Slider(1, 16, 4, step=1, label="Steps of the flow")
                    seed = gr.Number(0, precision=0, minimum=0, label="Seed")
                    consistency = gr.Radio(
                        ["none", "soft", "exact"], value="none", label="Consistency with the input",
                        info="exact: for clean downscaled pictures; soft: colour and tone alone, for camera and JPEG",
                    )  # fmt: skip
                    outscale = gr.Number(
                        page.scale, minimum=0.1, step=0.5, label="Output size, times the input",
                        info=f"other than {page.scale}, the result is resized by Lanczos' kernel",
                    )  # fmt: skip
                    format = gr.Radio([AS_IT_CAME, *FORMATS], value=AS_IT_CAME, label="File format")
                save = gr.DownloadButton("Download", elem_id="save")
            with gr.Column(scale=3, min_width=300):
                words = gr.Markdown(elem_id="words")
                with gr.Tab("Before and after"):
                    slider = gr.ImageSlider(label="bicubic | flowsr", format="jpeg", elem_id="slider", max_height=800)
                with gr.Tab("Paint fidelity"):
                    gr.Markdown(
                        "Blue is faithful (faces, text), orange is vivid (foliage, fur); the dial holds elsewhere."
                    )
                    canvas = gr.ImageEditor(
                        label="Map of fidelity", elem_id="canvas", sources=None, transforms=None, layers=False,
                        brush=gr.Brush(40, [FAITHFUL_PAINT, VIVID_PAINT], FAITHFUL_PAINT, "fixed"),
                    )  # fmt: skip
                with gr.Tab("What was invented"):
                    heat = gr.Image(
                        label="|vivid - faithful|: black equal, white far apart",
                        elem_id="heat",
                        buttons=["download", "fullscreen"],
                    )
                with gr.Tab("Side by side"):
                    pair = gr.Image(label="bicubic, flowsr", elem_id="pair", buttons=["download", "fullscreen"])
        with gr.Accordion("Limits", open=False):
            gr.Markdown(LIMITS.format(scale=page.scale, megapixels=page.max_pixels / page.scale**2 / 1e6))

        hidden = {"api_visibility": "private"}
        network = {"concurrency_id": "network", "concurrency_limit": 1, **hidden}
        at_once = {"trigger_mode": "always_last", "show_progress": "hidden", "concurrency_limit": 4, **hidden}
        filed = ([work, format, outscale], save)
        picture.upload(page.open, picture, [file, picture, words], **hidden)
        picture.clear(lambda: (None, ""), None, [file, words], **hidden)
        started = start.click(page.begin, queue=False, **hidden).then(
            page.run, [file, fidelity, steps, seed, consistency], [work, slider, pair, heat, canvas, words],
            show_progress_on=slider, **network,
        )  # fmt: skip
        released = fidelity.release(page.begin, queue=False, **hidden).then(
            page.settle, [work, fidelity], [slider, pair, words], show_progress_on=slider, **network
        )
        fidelity.input(page.turn, [work, fidelity], [slider, words], **at_once)
        painted = canvas.input(page.paint, [work, canvas, fidelity], [slider, pair, words], **at_once)
        stop.click(page.cancel, None, words, queue=False, **hidden)
        for event in (started.success, released.success, painted.success, format.change, outscale.change):
            event(page.save, *filed, **hidden)

        with gr.Row(visible=False):
            image, answer, call = gr.File(label="image"), gr.File(label="upscaled"), gr.Button()
        call.click(
            page.upscale, [image, fidelity, steps, seed, consistency, format, outscale], answer, api_name="upscale",
            api_description="Upscales a picture file; the answer is a file with the metadata of the first.",
            concurrency_id="network", concurrency_limit=1,
        )  # fmt: skip
    return blocks


if __name__ == "__main__":
    build(Page(load_upscaler(device="auto"))).launch(**LAUNCH)
