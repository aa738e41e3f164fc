"""Images and sounds in conversations: tokens, weights and log-probabilities against transformers' own; gradients; errors."""

from __future__ import annotations

import base64
import io
import json
import math
import os
import wave
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.multimodal import SEEING, save_model
from tests.product.test_product import equal_bits, final_state, losses
from tunesmith.config import DataConfig, ModelConfig, RunConfig
from tunesmith.config_file import config_from_dict
from tunesmith.data.dataset import Dataset, evaluation_batches
from tunesmith.data.pack import collate
from tunesmith.data.prepare import load_samples
from tunesmith.data.render import Renderer
from tunesmith.data.samples import Samples
from tunesmith.errors import DataError, UserError
from tunesmith.models.load import blocks, load_model, load_tokenizer
from tunesmith.models.media import _join
from tunesmith.models.probe import find_head
from tunesmith.models.processor import Processor, load_processor
from tunesmith.models.score import score
from tunesmith.run import build, train
from tunesmith.run_data import build_renderer
from tunesmith.types import Batch

ModelAt = Callable[..., Path]
NEEDS_AV = pytest.mark.skipif(not find_spec("av"), reason="sounds are read by the optional PyAV")


@pytest.fixture(scope="module")
def model_at(tmp_path_factory: pytest.TempPathFactory) -> ModelAt:
    made: dict[tuple[str, torch.dtype], Path] = {}

    def at(family: str, dtype: torch.dtype = torch.float32) -> Path:
        if (family, dtype) not in made:
            made[family, dtype] = save_model(family, tmp_path_factory.mktemp(family), dtype)
        return made[family, dtype]

    return at


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))


def draw(path: Path, width: int = 28, height: int = 28, light: int = 128, seed: int = 0) -> str:
    """A picture of noise about a lightness."""
    from PIL import Image

    noise = np.random.default_rng(seed).integers(-40, 40, (height, width, 3))
    Image.fromarray((noise + light).clip(0, 255).astype(np.uint8)).save(path)
    return path.name


def hum(path: Path, hertz: float, seconds: float = 0.4, rate: int = 8000) -> str:
    """A tone."""
    sound = np.sin(np.arange(int(seconds * rate)) * 2 * math.pi * hertz / rate) * 20000
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(sound.astype("<i2").tobytes())
    return path.name


def film(path: Path, seconds: int, seed: int, rate: int = 8) -> None:
    """Noise that gets lighter."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        random = np.random.default_rng(seed)
        for n in range(seconds * rate):
            picture = random.integers(0, 60, (32, 32, 3)) + 10 * n
            frame = av.VideoFrame.from_ndarray(picture.clip(0, 255).astype(np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def decode(path: Path) -> np.ndarray:
    import av

    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def write(folder: Path, records: list[dict[str, Any]]) -> Path:
    file = folder / "data.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


def mixed(folder: Path) -> list[dict[str, Any]]:
    """Two images in two turns; no image; one image of another size; two images in one turn."""
    first, second = draw(folder / "a.png"), draw(folder / "b.png", 56, 28, seed=1)
    user, bot = (lambda text: {"role": "user", "content": text}), (lambda text: {"role": "assistant", "content": text})
    return [
        {
            "messages": [user("<image>What?"), bot("After 3."), user("And <image> this?"), bot("comes 4")],
            "images": [first, second],
        },
        {"messages": [user("What follows 3?"), bot("After 3 comes 4.")]},
        {"messages": [user("Which\n<image>\nis it?"), bot("so on.")], "images": [second]},
        {"messages": [user("<image><image>"), bot("And so.")], "images": [second, first]},
    ]


def config_for(folder: Path, file: Path, **sections: Any) -> RunConfig:
    tree: dict[str, Any] = {
        "model": {"path": str(folder), "precision": "fp32"},
        "data": {"path": str(file), "eval_fraction": 0.0, "max_tokens": 200},
        "engine": {"name": "single", "device": "cpu"},
        "optimizer": {"name": "adamw", "lr": 1e-2},
        "train": {"batch_size": 4, "steps": 3, "foresee": False},
        "output": str(file.parent / "run"),
    }
    for name, value in sections.items():
        tree[name] = {**tree.get(name, {}), **value} if isinstance(value, dict) else value
    return config_from_dict(tree)


def prepare(model: Path, data: Path, **settings: Any) -> tuple[Samples, Renderer]:
    config, renderer = build_renderer(config_for(model, data, data=settings))
    return load_samples(config.data, renderer)[0], renderer


def inner(renderer: Renderer) -> Any:
    assert isinstance(renderer.processor, Processor)
    return renderer.processor.inner


def conversation(record: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    """The record as transformers' processors read it."""
    files = iter(record.get("images", []))
    turns = []
    for message in record["messages"]:
        parts: list[dict[str, Any]] = []
        for n, text in enumerate(message["content"].split("<image>")):
            if n:
                parts.append({"type": "image", "path": str(folder / next(files))})
            if text:
                parts.append({"type": "text", "text": text})
        turns.append({"role": message["role"], "content": parts})
    return turns


@pytest.mark.parametrize("learn", ["assistant", "last", "all"])
@pytest.mark.parametrize("family", SEEING)
def test_tokens_and_weights_are_those_of_the_processors_own_chat_template(
    model_at: ModelAt, tmp_path: Path, family: str, learn: str
) -> None:
    records = mixed(tmp_path)
    samples, renderer = prepare(model_at(family), write(tmp_path, records), learn=learn)
    processor, tokenizer = inner(renderer), renderer.tokenizer
    template = tokenizer.chat_template
    # the same template, which also says what the assistant writes
    before, after = "{{ m.role }}\n", "<|im_end|>"
    start, end = template.index(before) + len(before), template.index(after) + len(after)
    body = template[start:end]
    both = (
        f"{{% if m.role == 'assistant' %}}{{% generation %}}{body}{{% endgeneration %}}{{% else %}}{body}{{% endif %}}"
    )
    marked = template[:start] + both + "{{ '\\n' }}" + template[end + 1 :]  # Jinja drops a newline behind a tag
    silent = {getattr(processor, name) for name in ("image_token_id", "video_token_id") if hasattr(processor, name)}
    for index, record in enumerate(records):
        expected = processor.apply_chat_template(
            conversation(record, tmp_path), chat_template=marked, tokenize=True, return_dict=True,
            return_assistant_tokens_mask=True,
        )  # fmt: skip
        ((tokens, weights),) = samples.sequences(index)
        assert tokens.tolist() == expected["input_ids"][0]
        mask = list(expected["assistant_masks"][0])
        if learn == "last":
            last = max(n for n, flag in enumerate(mask) if flag and not (n and mask[n - 1]))
            mask = [0] * last + mask[last:]
        if learn == "all":
            assert not any(weight for token, weight in zip(tokens, weights, strict=True) if token in silent)
            assert weights[0] == 0
            if not record.get("images"):
                assert set(weights[1:].tolist()) == {1.0}
            continue
        assert weights.tolist() == [float(flag) for flag in mask]


@pytest.mark.parametrize("family", SEEING)
def test_log_probabilities_are_those_of_the_models_own_forward(model_at: ModelAt, tmp_path: Path, family: str) -> None:
    samples, renderer = prepare(model_at(family), write(tmp_path, mixed(tmp_path)))
    model = load_model(ModelConfig(path=str(model_at(family))), torch.float64)
    batch = collate(samples, range(4), 200, pack=True)
    assert batch.tokens_BT.shape[0] == 4  # not packed
    scored = score(model, find_head(model), batch).logprobs_BT
    processor = inner(renderer)
    own = []
    for record in mixed(tmp_path):
        inputs = processor.apply_chat_template(
            conversation(record, tmp_path), chat_template=renderer.tokenizer.chat_template, tokenize=True,
            return_dict=True, return_tensors="pt",
        )  # fmt: skip
        floats = {name: x.double() for name, x in inputs.items() if x.is_floating_point()}
        with torch.no_grad():
            logprobs = model(**{**inputs, **floats}).logits[0, :-1].log_softmax(-1)
        own.append(logprobs.gather(-1, inputs["input_ids"][0, 1:, None])[:, 0])
    for row, sequence in enumerate(batch.sequence_BT[:, 0].tolist()):
        sample = int(batch.sample_N[sequence])
        targets = batch.weights_BT[row, 1 : len(own[sample]) + 1] != 0
        assert targets.any()
        torch.testing.assert_close(
            scored[row, 1 : len(own[sample]) + 1][targets], own[sample][targets], rtol=0, atol=1e-9
        )
    assert not scored[batch.weights_BT == 0].any()


@pytest.mark.parametrize("family", SEEING)
def test_micro_batches_give_the_same_gradient(model_at: ModelAt, tmp_path: Path, family: str) -> None:
    samples, _ = prepare(model_at(family), write(tmp_path, mixed(tmp_path)))
    model = load_model(ModelConfig(path=str(model_at(family))), torch.float64)
    batch = collate(samples, range(4), 200, pack=False)

    def gradient(pieces: list[Batch]) -> dict[str, torch.Tensor]:
        model.zero_grad()
        for piece in pieces:
            (score(model, find_head(model), piece).logprobs_BT * piece.weights_BT).sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    whole, pieces = gradient([batch]), batch.split(1)
    assert len(pieces) == 4
    apart = gradient(pieces)
    assert whole.keys() == apart.keys()
    assert any(x.abs().max() > 1e-6 for name, x in whole.items() if "vision" in name or "visual" in name)
    for name, expected in whole.items():
        torch.testing.assert_close(apart[name], expected, rtol=1e-6, atol=1e-7)


def test_a_batch_splits_and_moves_with_its_media(model_at: ModelAt, tmp_path: Path) -> None:
    samples, _ = prepare(model_at("qwen2_vl"), write(tmp_path, mixed(tmp_path)))
    batch = collate(samples, range(4), 200, pack=False)
    assert [bool(media) for media in batch.media_N] == [bool(samples.media_tensors(int(n))[0]) for n in batch.sample_N]
    for row, piece in enumerate(batch.split(1)):
        assert [n for n, media in enumerate(piece.media_N) if media] == [row] * bool(batch.media_N[row])
    moved = batch.to("meta")
    assert moved.tokens_BT.device.type == "meta"
    assert {x.device.type for media in moved.media_N for x in media.values()} == {"meta"}
    assert collate(samples, [1], 200, pack=False).media_N == ()


def test_a_batch_is_the_same_whenever_it_is_made(model_at: ModelAt, tmp_path: Path) -> None:
    samples, _ = prepare(model_at("qwen2_vl"), write(tmp_path, mixed(tmp_path)))
    data = Dataset(samples, DataConfig(path="a", max_tokens=200), 3, pack=False, seed=0)
    first, again = data(5), data(5)
    assert torch.equal(first.tokens_BT, again.tokens_BT)
    for one, other in zip(first.media_N, again.media_N, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
    lazy = evaluation_batches(samples, 3, 200, pack=False)
    assert [len(batch.sample_N) for batch in lazy] == [3, 1]


def dark_or_light(folder: Path, count: int = 8) -> Path:
    """Only the picture tells the answer."""
    records = []
    for n in range(count):
        file = draw(folder / f"{n}.png", light=30 if n % 2 else 220, seed=n)
        answer = "3" if n % 2 else "4"
        turns = [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": answer}]
        records.append({"messages": turns, "images": [file]})
    return write(folder, records)


@pytest.mark.parametrize(("family", "method"), [("qwen2_vl", "lora"), ("idefics3", "full"), ("gemma3", "full")])
def test_a_run_learns_from_images_and_its_model_loads_with_its_processor(
    model_at: ModelAt, tmp_path: Path, family: str, method: str
) -> None:
    from transformers import AutoModelForMultimodalLM

    data = dark_or_light(tmp_path)
    config = config_for(model_at(family), data, method=method, train={"steps": 30, "batch_size": 8})
    train(config)
    curve = losses(tmp_path / "run")
    assert all(map(math.isfinite, curve))
    # without sight the answer is a coin's throw: ln 2 over its two tokens, digit and end of turn
    assert curve[-1] < 0.15
    if method != "lora":
        AutoModelForMultimodalLM.from_pretrained(tmp_path / "run" / "model")
    before = load_processor(ModelConfig(path=str(model_at(family))))
    base = model_at(family) if method == "lora" else tmp_path / "run" / "model"
    for file in (tmp_path / "run" / "model").iterdir():
        if method == "lora" and file.name.endswith("processor_config.json"):
            (base / file.name).write_bytes(file.read_bytes())
    after = load_processor(ModelConfig(path=str(base)))
    assert before is not None
    assert after is not None
    assert before.settings == after.settings


def test_resuming_gives_the_same_bits(model_at: ModelAt, tmp_path: Path) -> None:
    data, steady = dark_or_light(tmp_path), {"name": "constant", "warmup_steps": 0}

    def run(name: str, steps: int, resume: bool = False) -> None:
        config = config_for(
            model_at("qwen2_vl"), data, schedule=steady, train={"steps": steps}, output=str(tmp_path / name)
        )
        train(config, resume=resume)

    run("undisturbed", 6)
    run("broken off", 3)
    run("broken off", 6, resume=True)
    assert losses(tmp_path / "broken off") == losses(tmp_path / "undisturbed")
    assert equal_bits(final_state(tmp_path / "undisturbed"), final_state(tmp_path / "broken off"))


def test_adapters_leave_the_tower_alone_unless_it_is_named(model_at: ModelAt, tmp_path: Path) -> None:
    data = dark_or_light(tmp_path, 2)

    def adapted(**how: Any) -> set[str]:
        run = build(config_for(model_at("llava"), data, method={"name": "lora", **how}))
        return {name.split(".lora_")[0] for name in run.learner.method.params}

    everything = adapted()
    assert everything
    assert all("language_model" in name for name in everything)
    assert {name.rpartition(".")[2] for name in everything} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip
    assert adapted(targets=["q_proj"]) == {name for name in everything if name.endswith("q_proj")}
    assert all("vision_tower" in name for name in adapted(targets=["fc1"]))


def test_blocks_are_those_of_the_language_model(model_at: ModelAt) -> None:
    for family in SEEING:  # whose towers have as many blocks
        model = load_model(ModelConfig(path=str(model_at(family))), torch.float32)
        assert [name.rpartition(".")[0] for name, _ in blocks(model)] == ["model.language_model.layers"] * 2 or (
            family == "idefics3" and all("text_model" in name for name, _ in blocks(model))
        )


def test_files_inside_of_records_give_the_same_samples(model_at: ModelAt, tmp_path: Path) -> None:
    records = mixed(tmp_path)
    inside = [
        {**r, "images": [{"base64": base64.b64encode((tmp_path / f).read_bytes()).decode()} for f in r["images"]]}
        if "images" in r else r
        for r in records
    ]  # fmt: skip
    named, _ = prepare(model_at("qwen2_vl"), write(tmp_path, records))
    held, _ = prepare(model_at("qwen2_vl"), write(tmp_path, inside))
    assert named.fingerprint() == held.fingerprint()
    assert held.parts[0].blobs is not None
    assert len(held.parts[0].blobs) == sum((tmp_path / name).stat().st_size for name in ("a.png", "b.png"))  # each once
    for index in range(len(records)):
        for one, other in zip(named.media_tensors(index), held.media_tensors(index), strict=True):
            assert one.keys() == other.keys()
            assert all(torch.equal(one[name], other[name]) for name in one)


def test_words_that_spell_a_placeholder_stay_words(model_at: ModelAt, tmp_path: Path) -> None:
    file = draw(tmp_path / "a.png")
    turns = [
        {"role": "user", "content": [{"type": "text", "text": "<|image_pad|> is no image, "}, {"type": "image", "path": file}]},
        {"role": "assistant", "content": "<|image_pad|>"},
    ]  # fmt: skip
    samples, renderer = prepare(model_at("qwen2_vl"), write(tmp_path, [{"messages": turns}]))
    ((tokens, weights),) = samples.sequences(0)
    placeholder = renderer.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    grid = samples.media_tensors(0)[0]["image_grid_thw"]
    assert (tokens == placeholder).sum() == int(grid.prod()) // 4
    assert renderer.tokenizer.decode(tokens[weights > 0]) == "<|image_pad|><|im_end|>"


def test_too_long_samples_with_images_are_dropped_not_cut(model_at: ModelAt, tmp_path: Path) -> None:
    samples, _ = prepare(model_at("qwen2_vl"), write(tmp_path, mixed(tmp_path)), max_tokens=40)
    assert samples.counts.dropped == 2
    assert samples.lengths().max() <= 40
    kept = [samples.find(index) for index in range(len(samples))]
    assert [len(files) for part, sample in kept for files in part.media_files(sample)] == [0, 1]


def test_the_cache_notices_a_changed_image(model_at: ModelAt, tmp_path: Path) -> None:
    data = dark_or_light(tmp_path, 3)
    first, _ = prepare(model_at("qwen2_vl"), data)
    part = next((tmp_path / "cache" / "data").iterdir()) / "part.json"
    made = part.stat().st_ino
    prepare(model_at("qwen2_vl"), data)
    assert part.stat().st_ino == made
    draw(tmp_path / "1.png", 16, 16, seed=9)
    with pytest.raises(
        DataError, match=r"data.jsonl:2.*: .*1.png has changed or gone since .*: put it back, or start anew"
    ):
        collate(first, range(3), 200, pack=False)
    second, _ = prepare(model_at("qwen2_vl"), data)
    assert part.stat().st_ino != made
    assert second.lengths()[1] < first.lengths()[1]
    assert second.fingerprint() != first.fingerprint()


def test_a_resumed_run_notices_a_changed_image(model_at: ModelAt, tmp_path: Path) -> None:
    data = dark_or_light(tmp_path, 4)
    config = config_for(model_at("qwen2_vl"), data, train={"steps": 1})
    train(config)
    draw(tmp_path / "1.png", seed=9)
    with pytest.raises(UserError, match="has changed since"):
        train(config, resume=True)


def one(content: str = "<image>What?", **lists: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "so on."}], **lists}


def refused(model: Path, folder: Path, record: dict[str, Any]) -> str:
    with pytest.raises(DataError) as caught:
        prepare(model, write(folder, [record]))
    return str(caught.value).replace(str(folder), "FOLDER")


def test_a_missing_file(model_at: ModelAt, tmp_path: Path) -> None:
    assert refused(model_at("llava"), tmp_path, one(images=["none.png"])) == (
        "FOLDER/data.jsonl:1:1: no such image file: 'none.png': correct the path; "
        "relative ones count from FOLDER or a folder above"
    )


def test_a_file_that_is_no_image(model_at: ModelAt, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("no")
    message = refused(model_at("llava"), tmp_path, one(images=["a.png"]))
    assert message.startswith("FOLDER/data.jsonl:1:1: FOLDER/a.png: not a whole image file: cannot identify image file")
    assert message.endswith(": replace it or remove the record")


def test_half_an_image(model_at: ModelAt, tmp_path: Path) -> None:
    draw(tmp_path / "a.png")
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(whole[: len(whole) // 2])
    assert "FOLDER/a.png: not a whole image file: " in refused(model_at("llava"), tmp_path, one(images=["a.png"]))


def test_a_web_address(model_at: ModelAt, tmp_path: Path) -> None:
    message = refused(model_at("llava"), tmp_path, one(images=["https://example.org/a.png"]))
    assert message.endswith("a web address, 'https://example.org/a.png': download the file and write its path here")


def test_counts_that_disagree(model_at: ModelAt, tmp_path: Path) -> None:
    draw(tmp_path / "a.png")
    message = refused(model_at("llava"), tmp_path, one(images=["a.png", "a.png"]))
    assert "1 × <image> in the text, but 2 files here" in message


def test_a_template_without_a_place_for_images(model_at: ModelAt, tmp_path: Path) -> None:
    draw(tmp_path / "a.png")
    file = write(tmp_path, [one(images=["a.png"])])
    config = config_for(model_at("llava"), file, model={"chat_template": "chatml"})
    config, renderer = build_renderer(config)
    with pytest.raises(DataError, match=r"cannot place the 1 files of this conversation: .*0 <image>"):
        load_samples(config.data, renderer)


def test_a_model_of_text_alone(model_folder: Callable[[str], Path], tmp_path: Path) -> None:
    draw(tmp_path / "a.png")
    message = refused(model_folder("llama"), tmp_path, one(images=["a.png"]))
    assert "holds images, but the model reads text alone" in message


def test_a_kind_that_the_model_does_not_take(model_at: ModelAt, tmp_path: Path) -> None:
    hum(tmp_path / "a.wav", 440)
    message = refused(model_at("llava"), tmp_path, one("<audio>What?", audios=["a.wav"]))
    assert "holds an audio, which the model's LlavaProcessor does not take: use a model that does" in message
    assert "a video, which the model's" in refused(model_at("llava"), tmp_path, one("<video>What?", videos=["a.wav"]))


@pytest.mark.skipif(bool(find_spec("torchvision")), reason="torchvision is here")
def test_videos_need_torchvision(model_at: ModelAt, tmp_path: Path) -> None:
    message = refused(model_at("qwen2_vl"), tmp_path, one("<video>What?", videos=["a.mp4"]))
    assert "whose frames the model's processor prepares with torchvision, which is not installed" in message
    assert message.endswith(": pip install torchvision, from the same index as torch")


@NEEDS_AV
@pytest.mark.skipif(not find_spec("torchvision"), reason="transformers prepares videos with torchvision")
def test_videos_train(model_at: ModelAt, tmp_path: Path) -> None:
    records = []
    for n in range(4):
        film(tmp_path / f"{n}.mp4", seconds=2 + n % 2, seed=n)
        records.append(one("<video>What?", videos=[f"{n}.mp4"]))
    data = write(tmp_path, records)
    samples, renderer = prepare(model_at("qwen2_vl"), data)
    processor, model = inner(renderer), load_model(ModelConfig(path=str(model_at("qwen2_vl"))), torch.float64)
    batch = collate(samples, range(4), 200, pack=False)
    scored = score(model, find_head(model), batch).logprobs_BT
    text = (
        "<|im_start|>user\n<|vision_start|><|video_pad|><|vision_end|>What?<|im_end|>\n"
        "<|im_start|>assistant\nso on.<|im_end|>\n"
    )
    for row, sequence in enumerate(batch.sequence_BT[:, 0].tolist()):
        sample = int(batch.sample_N[sequence])
        frames = decode(tmp_path / f"{sample}.mp4")[::4]  # 8 frames a second, of which the model sees two
        inputs = processor(text=[text], videos=[frames], do_sample_frames=False, return_tensors="pt")
        ids = inputs["input_ids"][0]
        assert batch.tokens_BT[row, : len(ids)].tolist() == ids.tolist()
        inputs["pixel_values_videos"] = inputs["pixel_values_videos"].double()
        with torch.no_grad():
            own = model(**inputs).logits[0, :-1].log_softmax(-1).gather(-1, ids[1:, None])[:, 0]
        targets = batch.weights_BT[row, 1 : len(ids)] != 0
        torch.testing.assert_close(scored[row, 1 : len(ids)][targets], own[targets], rtol=0, atol=1e-9)
    train(config_for(model_at("qwen2_vl"), data, train={"steps": 5, "batch_size": 4}))
    assert losses(tmp_path / "run")[-1] < losses(tmp_path / "run")[0]


def test_media_of_unequal_sizes_are_not_filled_up_in_silence() -> None:
    small, large = torch.ones(1, 2, 4), torch.ones(1, 3, 4)
    assert _join([small, large], says_sizes=True).sum() == 20
    with pytest.raises(UserError, match=r"train.micro_batch_tokens: .* set it to 1, and each sequence goes alone"):
        _join([small, large], says_sizes=False)


def test_a_bad_record_can_be_left_out(model_at: ModelAt, tmp_path: Path) -> None:
    draw(tmp_path / "a.png")
    file = write(tmp_path, [one(images=["a.png"]), one(images=["none.png"])])
    samples, _ = prepare(model_at("llava"), file, bad_records="skip")
    assert (len(samples), samples.counts.skipped) == (1, 1)


def test_text_alone_trains_on_a_multimodal_model(model_at: ModelAt, chat_file: Path, tmp_path: Path) -> None:
    config = config_for(model_at("qwen2_vl"), chat_file, data={"pack": True}, output=str(tmp_path / "run"))
    run = build(config)
    assert run.data(0).media_N == ()
    train(config)
    assert losses(tmp_path / "run")[-1] < losses(tmp_path / "run")[0]


def test_images_can_be_streamed(model_at: ModelAt, tmp_path: Path) -> None:
    data = dark_or_light(tmp_path)
    train(config_for(model_at("qwen2_vl"), data, data={"stream": True, "shuffle_window": 3}, train={"foresee": True}))
    assert len(losses(tmp_path / "run")) == 3


@NEEDS_AV
def test_sounds_train(model_at: ModelAt, tmp_path: Path) -> None:
    records = [one("<audio>What?", audios=[hum(tmp_path / f"{n}.wav", 300 + 300 * n, 0.2 + 0.1 * n)]) for n in range(4)]
    data = write(tmp_path, records)
    samples, renderer = prepare(model_at("qwen2_audio"), data)
    processor, model = inner(renderer), load_model(ModelConfig(path=str(model_at("qwen2_audio"))), torch.float64)
    batch = collate(samples, range(4), 200, pack=False)
    scored = score(model, find_head(model), batch).logprobs_BT
    from tunesmith.data.media import read

    for row, sequence in enumerate(batch.sequence_BT[:, 0].tolist()):
        part, sample = samples.find(int(batch.sample_N[sequence]))
        _, sound = read(part.media_files(sample)[0][0], renderer.processor, part.place(sample))  # type: ignore[arg-type]
        assert abs(len(sound) - (0.2 + 0.1 * sample) * 16000) < 200
        text = "<|im_start|>user\n<|audio_bos|><|AUDIO|><|audio_eos|>What?<|im_end|>\n<|im_start|>assistant\nso on.<|im_end|>\n"
        inputs = processor(text=[text], audio=[sound], sampling_rate=16000, return_tensors="pt")
        ids = inputs["input_ids"][0]
        assert batch.tokens_BT[row, : len(ids)].tolist() == ids.tolist()
        inputs["input_features"] = inputs["input_features"].double()
        with torch.no_grad():
            own = model(**inputs).logits[0, :-1].log_softmax(-1).gather(-1, ids[1:, None])[:, 0]
        targets = batch.weights_BT[row, 1 : len(ids)] != 0
        torch.testing.assert_close(scored[row, 1 : len(ids)][targets], own[targets], rtol=0, atol=1e-9)
    train(config_for(model_at("qwen2_audio"), data, train={"steps": 10, "batch_size": 4, "foresee": True}))
    assert losses(tmp_path / "run")[-1] < losses(tmp_path / "run")[0]


@NEEDS_AV
def test_a_file_without_sound(model_at: ModelAt, tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(os.urandom(100))
    message = refused(model_at("qwen2_audio"), tmp_path, one("<audio>What?", audios=["a.wav"]))
    assert "FOLDER/a.wav: not a whole audio file: " in message


def test_what_is_missing_is_named(model_at: ModelAt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tunesmith.data.media.find_spec", lambda name: None)
    hum(tmp_path / "a.wav", 440)
    message = refused(model_at("qwen2_audio"), tmp_path, one("<audio>What?", audios=["a.wav"]))
    assert message.endswith("needs av, which is not installed: pip install 'tunesmith[media]'")


def test_a_processor_without_files_is_none(model_at: ModelAt, tmp_path: Path) -> None:
    for file in model_at("llava").iterdir():
        if "processor" not in file.name:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    assert load_processor(ModelConfig(path=str(tmp_path))) is None
    assert load_tokenizer(ModelConfig(path=str(tmp_path))) is not None


def test_an_image_of_another_mode_is_read_as_colours(tmp_path: Path) -> None:
    from PIL import Image

    from tunesmith.data.media import _read_image

    for mode in ("L", "RGBA", "P", "CMYK"):
        data = io.BytesIO()
        Image.new(mode, (4, 4)).save(data, "TIFF")
        assert _read_image(data).mode == "RGB"
