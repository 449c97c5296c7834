"""Makes docs/numbers.md, its plots and the evaluation.json of the bundled x4 network.

    python benchmarks/published.py DATA --lpips_weights lpips_squeeze_v0.1.safetensors

DATA holds Set5 and Set14 as folders with `HR` and `LRx4` (MATLAB's bicubic). The LPIPS file is v0.1 of the SqueezeNet
variant: the weights of torchmetrics' `LearnedPerceptualImagePatchSimilarity(net_type="squeeze")`.
"""

import argparse
import json
from pathlib import Path

from flowsr import bundled
from flowsr.evaluation import load_pairs, markdown_table, measure_dial, measure_steps, plot_dial, read_others
from flowsr.loading import load_upscaler

ROOT = Path(__file__).resolve().parents[1]
SETS = ("Set5", "Set14")


INTRODUCTION = """# Numbers of the bundled x4 network

Made by `python benchmarks/published.py DATA --lpips_weights lpips_squeeze_v0.1.safetensors`, seed 0, float32. LR and
metrics follow MATLAB's conventions: PSNR and SSIM on Y (BT.601), border 4. LPIPS is v0.1 with SqueezeNet, which is
not comparable with published AlexNet numbers. **LPIPS with SqueezeNet was in the training of the head**, so it
flatters the vivid end. No training used HaarPSI (1 for the original) or `detail` (energy beyond the LR grid, 1 for the
original). Neither set influenced a choice. LR-PSNR says
how well the output downscales to its input. Seconds are those of the machine at that time.

**The dial is not even between its ends at eight steps.** At fidelity 0.25 to 0.75 all eight steps are taken above
that sigma, and errors add up over small steps at high sigma. Fewer steps, or a blend of the
two ends, give a better picture there.

The rows of other systems were measured on the same files with the same PSNR and LPIPS (`benchmarks/others_Set5.csv`,
`others_Set14.csv`). In the plots, grey lines are the straight blends of any two of them."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", type=Path, help="folder of Set5 and Set14")
    parser.add_argument("--lpips_weights", required=True)
    parser.add_argument("--checkpoints", nargs="+", default=["x4"], help="bundled names")
    options = parser.parse_args()

    page = INTRODUCTION.splitlines()
    for checkpoint in options.checkpoints:
        pipe, results = load_upscaler(checkpoint), {}
        for name in SETS:
            pairs = load_pairs(options.data / name / "HR", options.data / name / "LRx4", pipe.scale_factor)
            others, title = read_others(ROOT / f"benchmarks/others_{name}.csv"), f"{checkpoint}, {name}"
            plot = f"curve_{checkpoint}_{name}.png"
            results[name] = measure_dial(pipe, pairs, lpips_weights=options.lpips_weights)
            plot_dial(results[name], others, ROOT / "docs" / plot, title)
            exact = measure_steps(pipe, pairs, [1, 4], consistency="exact", lpips_weights=options.lpips_weights)
            results[f"{name}, consistency exact"] = exact
            beside = [{**other, "method": other["system"]} for other in others if other["system"] != "bicubic"]
            page += ["", f"## {title}", "", f"![the dial beside other systems]({plot})", ""]
            page += [markdown_table([*results[name]["rows"], *beside], title="")]
            page += ["", 'With `consistency="exact"`:', "", markdown_table(exact["rows"][1:], title="")]
        (Path(bundled(checkpoint)) / "evaluation.json").write_text(json.dumps(results, indent=1) + "\n")
    (ROOT / "docs/numbers.md").write_text("\n".join(page) + "\n")
    print("\n".join(page))


if __name__ == "__main__":
    main()
