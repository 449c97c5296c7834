"""Sharing: what one process pushes to a Hub, another pulls and gets the same numbers; and what goes wrong on the way.

The client of huggingface_hub reads its settings when it is imported, so each session is a process of its own: the
source of a function here, which imports what it needs, finds its files in the folder that it is given, and returns
something that JSON holds.
"""

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import Hub

ROOT = Path(__file__).resolve().parents[1]


def run(session, folder: Path, environment: dict[str, str], flowsr: bool = True):
    """Calls a function of this file in a fresh process, with flowsr importable or not."""
    script = inspect.getsource(session) + f"\nimport json\nprint(json.dumps({session.__name__}({str(folder)!r})))"
    paths = [str(ROOT), str(ROOT / "tests")] if flowsr else []
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, "-c", script if flowsr else f"import sys\nsys.modules['flowsr'] = None\n{script}"],
        cwd=folder,
        env={**inherited, "HF_HUB_OFFLINE": "0", **environment, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def push_everything(folder):
    from pathlib import Path

    import torch
    from conftest import make_ddpm, make_generator, make_pipeline

    pipes = {
        "sr": make_pipeline(),
        "other": make_pipeline(block_out_channels=(12,), scale_factor=2),
        "ddpm": make_ddpm(),
        "generator": make_generator(),
    }
    picture, expected = torch.rand(3, 4, 5, generator=torch.Generator().manual_seed(1)), {}
    for name, pipe in pipes.items():
        given = {"class_labels": [2]} if name == "generator" else {"image": picture}
        draw = torch.Generator().manual_seed(0)
        expected[name] = pipe(**given, num_inference_steps=2, generator=draw, output_type="pt").images
        pipe.push_to_hub(f"me/{name}")
    torch.save({"picture": picture, **expected}, f"{folder}/expected.pt")
    pipes["sr"].save_pretrained(
        Path(folder) / "shards",
        push_to_hub=True,
        repo_id="me/shards",
        max_shard_size="5KB",
        commit_message="In shards",
    )
    pipes["sr"].push_to_hub("me/sr")  # again: nothing has changed
    pipes["sr"].to(torch.bfloat16).push_to_hub("me/sr", variant="bf16")
    return sorted(pipes)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A Hub with pipelines of every kind, and the folder with what they gave where they were pushed."""
    hub, folder = Hub(), tmp_path_factory.mktemp("shared")
    run(push_everything, folder, hub.environment(folder / "home_of_the_sender"))
    yield hub, folder
    hub.close()


def with_other_code(files: dict[str, bytes]) -> dict[str, bytes]:
    """A repository as another version of this library would have pushed it: its pipelines give negatives."""
    index, files = json.loads(files["model_index.json"]), dict(files)
    old = index["_class_name"][0]
    new = index["_class_name"][0] = old[:-8] + "0" * 8
    code = files.pop(f"{old}.py").decode()
    code += "\n\nbefore = write_images\n\n\ndef write_images(*given):\n    return [1 - x for x in before(*given)]\n"
    return {**files, f"{new}.py": code.encode(), "model_index.json": json.dumps(index).encode()}


def test_what_is_pushed_is_whole_and_pushing_again_changes_nothing(shared):
    hub, folder = shared
    first, last = hub.repos["me/sr"][1], hub.repos["me/sr"][-1]
    assert len(hub.repos["me/sr"]) == 3  # empty, the push, the variant: none of the second push
    assert set(last) - set(first) == {"unet/diffusion_pytorch_model.bf16.safetensors"}
    assert {name for name in last if last[name] != first.get(name)} == set(last) - set(first)
    assert {"README.md", "model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors"} < set(
        last
    )
    assert sum("safetensors" in name for name in hub.repos["me/shards"][-1]) > 2
    for commits in hub.repos.values():
        for name, content in commits[-1].items():
            assert str(folder).encode() not in content, name
            assert str(ROOT).encode() not in content, name
    card = last["README.md"].decode()
    assert 'FlowMatchSRPipeline.from_pretrained("me/sr")' in card
    assert 'DiffusionPipeline.from_pretrained("me/sr", trust_remote_code=True)' in card
    assert "More Information Needed" not in card


def pull_without_flowsr(folder):
    import sys

    import torch
    from diffusers import DiffusionPipeline
    from huggingface_hub import hf_hub_download

    expected = torch.load(f"{folder}/expected.pt")
    picture = expected.pop("picture")

    def upscale(pipe, **given):
        given = given or {"image": picture}
        draw = torch.Generator().manual_seed(0)
        return pipe(**given, num_inference_steps=2, generator=draw, output_type="pt").images

    said = {}
    try:
        DiffusionPipeline.from_pretrained("me/sr")
    except ValueError as error:
        said["untrusted"] = str(error)
    pipes = {
        name: DiffusionPipeline.from_pretrained(f"me/{name}", trust_remote_code=True, disable_mmap=True)
        for name in ("sr", "edited", "other", "ddpm", "generator", "shards")
    }  # all in one process, and used after all are loaded
    results = {name: upscale(pipe) for name, pipe in pipes.items() if name != "generator"}
    results["generator"] = upscale(pipes["generator"], class_labels=[2])
    expected["shards"], expected["edited"] = expected["sr"], 1 - expected["sr"]
    said["equal"] = {name: torch.equal(results[name], expected[name]) for name in expected}
    cached = hf_hub_download("me/sr", "model_index.json", local_files_only=True).removesuffix("model_index.json")
    from_folder = DiffusionPipeline.from_pretrained(cached, trust_remote_code=True, disable_mmap=True)
    said["equal"]["sr from the folder in the cache"] = torch.equal(upscale(from_folder), expected["sr"])
    pipes["sr"].save_pretrained(f"{folder}/saved_again")
    sys.modules["torchdiffeq"] = None
    try:
        pipes["sr"](picture, solver="heun")
    except ImportError as error:
        said["missing"] = str(error)
    return said


def test_a_stranger_with_diffusers_alone_gets_the_same_pictures(shared, tmp_path):
    hub, folder = shared
    hub.repos["me/edited"] = [with_other_code(hub.repos["me/sr"][-1])]
    said = run(pull_without_flowsr, folder, hub.environment(tmp_path), flowsr=False)
    assert all(said["equal"].values()), said
    assert len(said["equal"]) == 7
    assert "trust_remote_code=True" in said["untrusted"]
    assert said["missing"] == "The solver 'heun' needs torchdiffeq: pip install torchdiffeq"
    # What is saved there is what was loaded, code included.
    for path in (folder / "saved_again").rglob("*.*"):
        if path.name not in ("config.json", "scheduler_config.json"):
            assert path.read_bytes() == hub.repos["me/sr"][-1][path.relative_to(folder / "saved_again").as_posix()]


def pull_with_flowsr(folder):
    import torch
    from conftest import make_unet

    import flowsr

    expected = torch.load(f"{folder}/expected.pt")
    picture = expected.pop("picture")

    def upscale(pipe, **given):
        given = given or {"image": picture}
        draw = torch.Generator().manual_seed(0)
        return pipe(**given, num_inference_steps=2, generator=draw, output_type="pt").images

    load = flowsr.FlowMatchSRPipeline.from_pretrained
    results = {name: upscale(load(f"me/{name}", disable_mmap=True)) for name in ("sr", "other", "shards")}
    results["ddpm"] = upscale(flowsr.DDPMSRPipeline.from_pretrained("me/ddpm", disable_mmap=True))
    generator = flowsr.FlowMatchPipeline.from_pretrained("me/generator", disable_mmap=True)
    results["generator"] = upscale(generator, class_labels=[2])
    expected["shards"] = expected["sr"]
    variant = load("me/sr", variant="bf16", dtype=torch.bfloat16, disable_mmap=True)
    middle = flowsr.FlowMatchSREulerScheduler(evaluate_at="middle")
    other = load("me/sr", unet=make_unet(layers_per_block=2), scheduler=middle)
    return {
        "equal": {name: torch.equal(results[name], expected[name]) for name in expected},
        "variant": [str(variant.unet.dtype), float((upscale(variant.to(torch.float32)) - expected["sr"]).abs().max())],
        "replaced": [other.unet.config.layers_per_block, other.scheduler is middle],
        "module": type(other.unet).__module__,
    }


def test_who_has_flowsr_needs_no_trust_and_no_network_the_second_time(shared, tmp_path):
    hub, folder = shared
    environment = hub.environment(tmp_path)
    online = run(pull_with_flowsr, folder, environment)
    assert all(online["equal"].values()), online
    assert online["variant"][0] == "torch.bfloat16"
    assert online["variant"][1] < 0.05
    assert online["replaced"] == [2, True]
    assert online["module"] == "flowsr.models.unet_sr"
    nowhere = {**environment, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "1"}
    assert run(pull_with_flowsr, folder, nowhere) == online


def meet_trouble(folder):
    import contextlib
    import io
    import os
    import time

    from hub_server import Hub

    hub = Hub()
    os.environ.update(hub.environment(f"{folder}/home"))
    time.sleep = lambda seconds: None  # the client waits between its attempts

    from conftest import make_pipeline, random_picture

    from flowsr import FlowMatchSRPipeline
    from flowsr.cli import main

    pipe, second = make_pipeline(), make_pipeline(block_out_channels=(12,))
    load, said = FlowMatchSRPipeline.from_pretrained, {}

    def attempt(what, action, **trouble):
        hub.trouble = trouble
        before = {name: len(commits) for name, commits in hub.repos.items()}
        try:
            action()
            said[what] = "done"
        except (OSError, ValueError) as error:
            said[what] = str(error)
            assert before.items() <= {name: len(commits) for name, commits in hub.repos.items()}.items(), what
        hub.trouble = {}

    pipe.push_to_hub("me/a")
    before = dict(hub.repos["me/a"][-1])
    attempt("not allowed to create", lambda: pipe.push_to_hub("you/a"), create=403)
    attempt(
        "nor by saving", lambda: pipe.save_pretrained(f"{folder}/s", push_to_hub=True, repo_id="you/a"), create=403
    )
    attempt("upload breaks", lambda: second.push_to_hub("me/a"), put="hang up")
    attempt("not allowed to write", lambda: second.push_to_hub("me/a"), commit=403)
    attempt("commit breaks", lambda: second.push_to_hub("me/a"), commit="hang up")
    assert hub.repos["me/a"] == [{}, before]
    blobs = set(hub.blobs)
    hub.trouble = {"put": 500}  # the large file has arrived by now, and is not sent again
    second.push_to_hub("me/a")
    hub.trouble = {}
    assert set(hub.blobs) == blobs
    assert load("me/a", cache_dir=f"{folder}/1").unet.config.block_out_channels == [12]

    hub.repos["me/mine"] = [{"README.md": b"My own words.", "notes.txt": b"My own file."}]
    pipe.push_to_hub("me/mine")
    said["mine"] = [hub.repos["me/mine"][-1][name].decode() for name in ("README.md", "notes.txt")]

    attempt("wrong name", lambda: load("me/nothing"))
    attempt("wrong name, not logged in", lambda: load("me/nothing", token=False))
    attempt("no name", lambda: load("nothing"))
    attempt("no revision", lambda: load("me/a", revision="v9"))
    attempt("no variant", lambda: load("me/a", variant="fp16"))
    attempt("not allowed to read", lambda: load("me/a", cache_dir=f"{folder}/2"), info=403, resolve=403)
    attempt("breaks amid a file", lambda: load("me/a", cache_dir=f"{folder}/3"), resolve="break off")
    attempt("the next time", lambda: load("me/a", cache_dir=f"{folder}/3"))
    cut = {"info": "hang up", "tree": "hang up", "resolve": "hang up"}
    attempt("cached, and no connection", lambda: load("me/a", cache_dir=f"{folder}/1"), **cut)
    hub.repos["me/empty"] = [{}]
    attempt("empty repository", lambda: load("me/empty"))

    random_picture(4, 4).save(f"{folder}/a.png")
    err = io.StringIO()
    with contextlib.redirect_stderr(err):
        said["status"] = main(["upscale", f"{folder}/a.png", "-o", f"{folder}/out", "--checkpoint", "me/nothing"])
    said["command line"] = err.getvalue()

    hub.close()
    attempt("no network", lambda: load("me/a", cache_dir=f"{folder}/4"))
    attempt("no network to push", lambda: pipe.push_to_hub("me/a"))
    return said


def test_trouble_on_the_way_is_named_and_loses_nothing(tmp_path):
    said = run(meet_trouble, tmp_path, {})
    refused = "was not changed on the Hub: the Hub refuses it (403). `hf auth login` takes a token that may do this."
    assert said["not allowed to create"] == said["nor by saving"] == f"you/a {refused}"
    assert said["not allowed to write"] == f"me/a {refused}"
    for what in ("upload breaks", "commit breaks", "no network to push"):
        assert said[what].startswith("me/a was not changed on the Hub: the connection to the Hub failed ("), said[what]
        assert said[what].endswith("Try again: what has arrived is not sent twice.")
    assert said["mine"][0].endswith("My own words.")
    assert said["mine"][1] == "My own file."
    missing = (
        "me/nothing cannot be loaded: the Hub has no such repository, or a private one that needs `hf auth login`. "
        "Is the name right?"
    )
    assert said["wrong name"] == said["wrong name, not logged in"] == missing
    assert said["no name"].startswith("There is no checkpoint folder nothing, and a repository of the Hub is named")
    assert "no such revision" in said["no revision"]
    assert "`variant=fp16`" in said["no variant"]
    assert said["not allowed to read"].startswith("me/a cannot be loaded: the Hub refuses it (403).")
    for what in ("breaks amid a file", "no network"):
        assert said[what].startswith("me/a cannot be loaded: the connection to the Hub failed ("), said[what]
    assert said["the next time"] == said["cached, and no connection"] == "done"
    assert said["empty repository"].endswith("the repository has no model_index.json: it is no saved pipeline.")
    assert said["status"] == 1
    assert said["command line"].splitlines()[-1] == f"flowsr: {missing}"  # above it at most a library's warning
    assert "Traceback" not in said["command line"]
    assert not any("\n" in message for name, message in said.items() if name not in ("status", "command line", "mine"))


def push_from_the_commands(folder):
    import contextlib
    import io
    import json
    import os
    from pathlib import Path

    from hub_server import Hub

    hub = Hub()
    os.environ.update(hub.environment(f"{folder}/home"))
    from conftest import make_pipeline
    from original_checkpoints import write_original

    import convert_checkpoint
    from flowsr import DDPMSRPipeline
    from flowsr.cli import main

    def call(command, *arguments):
        out = io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            return command([str(argument) for argument in arguments]), out.getvalue()

    folder, said = Path(folder), {}
    write_original(folder, (16,), 1)  # x_best.pth
    said["converted"] = call(convert_checkpoint.main, folder / "x_best.pth", folder / "new", "--push_to_hub", "me/new")
    said["loaded"] = type(DDPMSRPipeline.from_pretrained("me/new").unet).__name__
    hub.trouble = {"commit": 403}
    said["refused"] = call(convert_checkpoint.main, folder / "x_best.pth", folder / "too", "--push_to_hub", "me/too")
    said["kept"] = DDPMSRPipeline.from_pretrained(folder / "too").unet.num_parameters()
    hub.trouble = {}

    made = folder / "trained"
    make_pipeline().save_pretrained(made)
    (made / "settings.yaml").write_text(f"train_data_dir: {folder}/photos\nlearning_rate: 0.001\n")
    (made / "log.jsonl").write_text("{}\n")
    (made / "checkpoint-10").mkdir()
    rows = [{"method": "flowsr, 1 step", "psnr_y": 31.25, "ssim_y": 0.9, "lr_psnr": 50.0}]
    result = {"scale": 4, "fidelity": 0.0, "consistency": None, "lpips": "no LPIPS", "rows": rows}
    (folder / "a.json").write_text(json.dumps(result))
    card = [main, "card", made, "--license", "cc0-1.0", "--push_to_hub", "me/trained"]
    said["described"] = call(*card, "--results", f"Set5={folder}/a.json")
    said["again"] = call(*card)
    said["commits"] = len(hub.repos["me/trained"])
    files = hub.repos["me/trained"][-1]
    hub.repos["me/trained"].append({**files, "README.md": files["README.md"] + b"\n## Written on the Hub\n"})
    call(*card)
    said["files"] = sorted(hub.repos["me/trained"][-1])
    said["card"] = hub.repos["me/trained"][-1]["README.md"].decode()
    hub.repos["me/written"] = [{"README.md": b"My own words."}]
    said["by hand"] = call(main, "card", made, "--push_to_hub", "me/written")
    said["words"] = hub.repos["me/written"][-1]["README.md"].decode()
    return said


def test_the_commands_push_too(tmp_path):
    said = run(push_from_the_commands, tmp_path, {})
    status, text = said["converted"]
    assert status == 0, text
    assert "/me/new/commit/" in text
    assert said["loaded"] == "ContextUNetSRModel"
    status, text = said["refused"]
    assert status == 1
    assert "convert_checkpoint.py: me/too was not changed on the Hub: the Hub refuses it (403)." in text
    assert "Traceback" not in text
    assert said["kept"] > 0
    assert said["described"][0] == said["again"][0] == 0, said
    assert said["commits"] == 2  # the second time nothing had changed
    assert [name for name in said["files"] if not name.endswith(".py")] == [
        "README.md", "evaluation.json", "model_index.json", "scheduler/scheduler_config.json", "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
    ]  # fmt: skip
    assert sum(name.endswith(".py") for name in said["files"]) == 4
    assert "license: cc0-1.0" in said["card"]
    assert "31.25" in said["card"]
    assert said["card"].endswith("## Written on the Hub\n")
    assert "learning_rate: 0.001" in said["card"]
    assert str(tmp_path) not in said["card"]
    status, text = said["by hand"]
    assert status == 1
    assert "README.md of me/written on the Hub was written by hand" in text
    assert said["words"] == "My own words."


def test_a_finished_training_run_is_pushed_and_a_refusal_comes_before_the_work(photo_folder, tmp_path):
    hub = Hub()
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}

    def train(repo: str) -> subprocess.CompletedProcess:
        arguments = ["--config", "configs/tiny.yaml", "--train_data_dir", photo_folder, "--max_train_steps", 2]
        arguments += ["--output_dir", tmp_path / repo, "--push_to_hub", f"me/{repo}", "--num_validation_images", 0]
        return subprocess.run(
            [sys.executable, "train_sr.py", *map(str, arguments)], cwd=ROOT, capture_output=True, text=True,
            env={**inherited, "HF_HUB_OFFLINE": "0", **hub.environment(tmp_path / "home")},
        )  # fmt: skip

    try:
        done = train("run")
        assert done.returncode == 0, done.stderr
        files = hub.repos["me/run"][-1]
        weights = "unet/diffusion_pytorch_model.safetensors"
        assert files[weights] == (tmp_path / "run" / weights).read_bytes()
        assert not [name for name in files if "checkpoint" in name]
        hub.trouble = {"create": 403}
        done = train("refused")
        assert done.returncode == 1
        assert "me/refused" in done.stderr
        assert "403" in done.stderr
        assert "Traceback" not in done.stderr
        assert not (tmp_path / "refused").exists()
    finally:
        hub.close()
