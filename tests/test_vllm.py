"""vLLM on packages, against our transformers model: the same tokens, and log-probabilities within 1e-4."""

import base64
import gc
import json
import os
import socket
from contextlib import contextmanager
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vLLM has an environment of its own: make test-vllm")

os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_CACHE_ROOT=os.environ["HF_HOME"],
    VLLM_NO_USAGE_STATS="1",
    TORCH_COMPILE_DISABLE="1",  # log-probabilities would be counted by a kernel that takes long to compile
)

import openai
import torch
import vllm
from PIL import Image
from safetensors.torch import load_file, save_file
from server import running
from tiny import CLASSES, config_dict, next_model
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory

from shortv_llava.calibrate.correction import Factors, correction_tensors
from shortv_llava.calibrate.samples import embedded_samples
from shortv_llava.chat.prompts import make_prompt
from shortv_llava.checkpoint.config import read_config
from shortv_llava.checkpoint.loading import load_model
from shortv_llava.checkpoint.package import write_package
from shortv_llava.checkpoint.processors import load_processor
from shortv_llava.errors import ShortVError
from shortv_llava.examples.shapes_llava import CHECKPOINT
from shortv_llava.serving import models, register
from shortv_llava.serving.command import serve

MAX_TOKENS = 6
SAMPLES = embedded_samples()
# (question, number of the first image, how many)
MIXED = [(SAMPLES[i % 60].question, i % 57, (1, 0, 2, 1)[i % 4]) for i in range(100)]


@contextmanager
def engine(folder: Path, **settings):
    llm = LLM(
        str(folder),
        **{
            "dtype": "float32",
            "enforce_eager": True,
            "max_model_len": 512,
            "max_num_seqs": 16,
            "block_size": 32,
            "enable_prefix_caching": False,
            "disable_log_stats": False,
            "limit_mm_per_prompt": {"image": 3},
        }
        | settings,
    )
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def images(first: int, number: int) -> list[Image.Image]:
    return [Image.open(SAMPLES[i].image).convert("RGB") for i in range(first, first + number)]


def asked(llm: LLM, folder: Path, requests, max_tokens: int = MAX_TOKENS):
    """Each answer's tokens, and for each token the log-probabilities of the likeliest, all requests at once."""
    processor = load_processor(folder)
    prompts = [
        {"prompt": make_prompt(processor, question, number)}
        | ({"multi_modal_data": {"image": images(first, number)}} if number else {})
        for question, first, number in requests
    ]
    settings = SamplingParams(temperature=0, max_tokens=max_tokens, logprobs=3, ignore_eos=True)
    outputs = [request.outputs[0] for request in llm.generate(prompts, settings, use_tqdm=False)]
    return [
        (list(answer.token_ids), [{token: p.logprob for token, p in step.items()} for step in answer.logprobs])
        for answer in outputs
    ]


@torch.no_grad()
def expected(folder: Path, requests, max_tokens: int = MAX_TOKENS):
    """Each answer's tokens and log-probabilities (tokens, vocabulary) from the transformers model, one by one."""
    model, processor = load_model(folder, dtype="float32"), load_processor(folder)
    model.generation_config.eos_token_id = None
    answers = []
    for question, first, number in requests:
        prompt = make_prompt(processor, question, number)
        inputs = processor(text=prompt, images=images(first, number) or None, return_tensors="pt")
        made = model.generate(
            **inputs, max_new_tokens=max_tokens, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        tokens = made.sequences[0, inputs["input_ids"].shape[1] :].tolist()
        answers.append((tokens, torch.cat(made.logits).log_softmax(-1)))
    return answers


def assert_same(answers, reference) -> None:
    assert [tokens for tokens, _ in answers] == [tokens for tokens, _ in reference]
    assert distance(answers, reference) < 1e-4


def distance(answers, reference) -> float:
    """Largest difference of a log-probability, up to where the tokens part."""
    worst = 0.0
    for (tokens, likeliest), (right, log_probabilities) in zip(answers, reference):
        for token, correct, step, row in zip(tokens, right, likeliest, log_probabilities):
            worst = max(worst, *(abs(value - row[candidate].item()) for candidate, value in step.items()))
            if token != correct:
                break
    return worst


def metric(llm: LLM, name: str) -> int:
    return sum(metric.value for metric in llm.get_metrics() if metric.name == f"vllm:{name}")


def random_package(folder: Path, family: str, backbone: str, **layers) -> Path:
    """A package of random weights that speaks the embedded checkpoint's tokens, tensors named as on the Hub."""
    config_class, model_class, _, _ = CLASSES[family]
    vocabulary = len(load_processor(CHECKPOINT).tokenizer)
    window = {"sliding_window": 24} if backbone == "mistral" else {}
    settings = config_dict(family, backbone, vocab_size=vocabulary, hidden_size=128, intermediate_size=96, **window)
    torch.manual_seed(0)
    if family == "llava":
        processor = load_processor(CHECKPOINT)
        processor.patch_size = 14
        processor.image_processor.size = {"shortest_edge": 28}
        processor.image_processor.crop_size = {"height": 28, "width": 28}
    else:
        _, processor = next_model()
    settings["image_token_index"] = processor.image_token_id
    model = model_class(config_class(**settings, architectures=[model_class.__name__]))
    names = {
        "model.vision_tower.": "vision_tower.vision_model.",
        "model.language_model.": "language_model.model.",
        "lm_head.": "language_model.lm_head.",
        "model.": "",
    }
    tensors = {}
    for name, tensor in model.state_dict().items():
        start = next(start for start in names if name.startswith(start))
        tensors[names[start] + name.removeprefix(start).removeprefix("vision_model.")] = tensor
    base = folder / "base"
    processor.save_pretrained(base)
    model.config.save_pretrained(base)
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    write_package(base, folder / "package", **layers)
    return folder / "package"


@pytest.fixture(scope="module")
def mixed(package_folder):
    return expected(package_folder, MIXED)


@pytest.mark.slow
def test_a_hundred_mixed_requests_at_once(package_folder, mixed):
    with engine(package_folder) as llm:
        assert_same(asked(llm, package_folder, MIXED), mixed)


@pytest.mark.slow
@pytest.mark.parametrize(
    "layers", [{"replaced_layers": [11, 3, 0]}, {"replaced_layers": [2], "replaced_ffn_layers": [0, 5]}]
)
def test_corrected_layers(layers, tmp_path):
    torch.manual_seed(0)
    size = read_config(CHECKPOINT)["text_config"]["hidden_size"]
    factors = {
        layer: Factors(torch.randn(7, size), torch.randn(size, 7) / size, torch.randn(size)) for layer in (0, 2, 3, 5)
    }
    tensors = correction_tensors(factors, torch.float32)
    settings = {"correction_rank": 7, "corrected_layers": list(factors), "corrections": tensors}
    requests = MIXED[:24]
    for name, each in (("plain", {}), ("corrected", settings)):
        write_package(CHECKPOINT, tmp_path / name, **layers, **each)
    with engine(tmp_path / "corrected", max_num_batched_tokens=48) as llm:
        answers = asked(llm, tmp_path / "corrected", requests)
    assert_same(answers, expected(tmp_path / "corrected", requests))
    assert distance(answers, expected(tmp_path / "plain", requests)) > 0.01


@pytest.mark.slow
def test_prefill_in_chunks_of_sixteen_tokens(package_folder, mixed):
    with engine(package_folder, max_num_batched_tokens=16) as llm:
        assert_same(asked(llm, package_folder, MIXED), mixed)


@pytest.mark.slow
def test_prefix_caching_of_a_shared_image(package_folder):
    requests = [(sample.question, 7, 1) for sample in SAMPLES[:24]]
    with engine(package_folder, enable_prefix_caching=True) as llm:
        asked(llm, package_folder, requests[:1])
        assert_same(asked(llm, package_folder, requests), expected(package_folder, requests))
        assert metric(llm, "prefix_cache_hits") >= 24 * 64  # two blocks of 32 each: the second ends within the image


@pytest.mark.slow
def test_preemption_by_a_small_cache(package_folder):
    requests = MIXED[:16]
    small = {"num_gpu_blocks_override": 12, "max_model_len": 256, "max_num_batched_tokens": 48}
    with engine(package_folder, **small) as llm:
        assert_same(asked(llm, package_folder, requests, 40), expected(package_folder, requests, 40))
        assert metric(llm, "num_preemptions") > 0


@pytest.mark.slow
def test_dense_package_is_stock_llava_to_the_bit(tmp_path):
    write_package(CHECKPOINT, tmp_path / "dense", replaced_layers=[])
    answers = []
    for folder in (CHECKPOINT, tmp_path / "dense"):
        with engine(folder) as llm:
            answers.append(asked(llm, folder, MIXED[:24]))
    assert answers[0] == answers[1]


@pytest.mark.slow
def test_a_dense_model_would_be_noticed(package_folder, tmp_path, mixed):
    write_package(CHECKPOINT, tmp_path / "dense", replaced_layers=[])
    with engine(tmp_path / "dense") as llm:
        assert distance(asked(llm, package_folder, MIXED), mixed) > 0.01


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["llama", "mistral", "qwen2"])
@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_families_and_backbones(tmp_path, family, backbone):
    package = random_package(tmp_path, family, backbone, replaced_layers=[3, 1])
    requests = MIXED[:12]
    with engine(package, max_num_batched_tokens=64) as llm:
        assert_same(asked(llm, package, requests), expected(package, requests))


@pytest.mark.slow
@pytest.mark.parametrize(
    "lists",
    [
        {"replaced_attention_layers": [0, 2, 3]},
        {"replaced_ffn_layers": [0, 1, 3]},
        {"replaced_layers": [2], "replaced_attention_layers": [3, 0], "replaced_ffn_layers": [1]},
        {"replaced_layers": [0, 1, 2, 3]},
    ],
)
def test_blocks(tmp_path, lists):
    package = random_package(tmp_path, "llava", "llama", **lists)
    requests = MIXED[:12]
    with engine(package, max_num_batched_tokens=32) as llm:
        assert_same(asked(llm, package, requests), expected(package, requests))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tensor", "pipeline"])
def test_two_processes(tmp_path, monkeypatch, kind):
    lists = {"replaced_layers": [2], "replaced_attention_layers": [3, 0], "replaced_ffn_layers": [1]}
    package = random_package(tmp_path, "llava", "qwen2", **lists)
    requests = MIXED[:12]
    settings = {f"{kind}_parallel_size": 2, "max_num_batched_tokens": 32}
    if kind == "pipeline":  # on CPUs vLLM makes what later stages receive in a warm-up that is for compiled models only
        monkeypatch.delenv("TORCH_COMPILE_DISABLE")
        settings |= {"enforce_eager": False, "compilation_config": {"mode": 2, "backend": "eager"}}
    with engine(package, **settings) as llm:
        assert_same(asked(llm, package, requests), expected(package, requests))


def quantised(package: Path) -> None:
    """Make the language model's projections 8-bit, as compressed-tensors stores them."""
    tensors = load_file(package / "model.safetensors")
    for name in [name for name in tensors if name.startswith("language_model") and "_proj.weight" in name]:
        weight = tensors[name]
        scale = weight.abs().amax(dim=1, keepdim=True) / 127
        tensors[name] = (weight / scale).round().to(torch.int8)
        tensors[name.replace(".weight", ".weight_scale")] = scale
    save_file(tensors, package / "model.safetensors", {"format": "pt"})
    bits = {"num_bits": 8, "type": "int", "symmetric": True}
    config = json.loads((package / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": ["re:.*vision_tower.*", "re:.*multi_modal_projector.*", "re:.*lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": bits | {"strategy": "channel", "dynamic": False},
                "input_activations": bits | {"strategy": "token", "dynamic": True},
            }
        },
    }
    (package / "config.json").write_text(json.dumps(config))


@pytest.mark.slow
def test_quantised_linears(tmp_path, monkeypatch):
    """Against vLLM's own layers on all tokens, with the visual rows put back behind each."""
    package = random_package(tmp_path, "llava", "qwen2", replaced_layers=[3, 1])
    quantised(package)
    with engine(package) as llm:
        answers = asked(llm, package, MIXED[:12])

        def put_back(step, layer, states, frozen_attention, frozen_ffn):
            before = sum(states) if states.residual is not None else states.update.clone()
            after = sum(layer(step.positions, *(part if part is None else part.clone() for part in states)))
            if frozen_attention:
                after[step.visual] = before[step.visual]
            return models.Stream(after, torch.zeros_like(after))

        monkeypatch.setattr(models.Step, "through", put_back)
        monkeypatch.setattr(models, "partial_query_context", lambda context, *args: context)
        right = asked(llm, package, MIXED[:12])
    assert [tokens for tokens, _ in answers] == [tokens for tokens, _ in right]
    for (_, steps), (_, right_steps) in zip(answers, right):
        for step, right_step in zip(steps, right_steps):
            assert step == pytest.approx(right_step, abs=1e-4)


class TestBadInput:
    def edited(self, package: Path, **entries) -> Path:
        config = json.loads((package / "config.json").read_text()) | entries
        (package / "config.json").write_text(json.dumps(config))
        (package / "model.safetensors").unlink()  # what is wrong must be found before weights are read
        return package

    @pytest.fixture
    def package(self, tmp_path):
        write_package(CHECKPOINT, tmp_path / "package", replaced_layers=[1])
        return tmp_path / "package"

    @pytest.mark.parametrize(
        "entries, message",
        [
            ({"replaced_layers": [12]}, "replaced_layers: 12 is no layer id"),
            ({"replaced_ffn_layers": [1]}, "replaced_ffn_layers: layer 1 .*replaced_layers"),
        ],
    )
    def test_package(self, package, entries, message):
        folder = self.edited(package, **entries)
        with pytest.raises((ShortVError, ValueError), match=message), engine(folder):
            pass
        with pytest.raises((ShortVError, ValueError), match=message):
            serve(str(folder), [])

    def test_a_family_that_the_plugin_does_not_run(self, tmp_path):
        folder = tmp_path / "package"
        folder.mkdir()
        (folder / "config.json").write_text('{"model_type": "shortv_qwen2_5_vl"}')
        with pytest.raises(ShortVError, match="LLaVA-NeXT, not of shortv_qwen2_5_vl"), engine(folder):
            pass

    def test_engine_options(self, package):
        with pytest.raises(ShortVError, match="LoRA adapters"), engine(self.edited(package), enable_lora=True):
            pass

    @pytest.mark.parametrize("version", ["0.31.2", "0.33.0", "1.0"])
    def test_vllm_outside_the_tested_range(self, package, monkeypatch, version):
        monkeypatch.setattr(vllm, "__version__", version)
        message = f"vLLM {version} is outside .*0.32 .*0.33"
        with pytest.raises(ShortVError, match=message):
            serve(str(package), [])
        try:
            register()  # must let vLLM serve other models
            with pytest.raises(ShortVError, match=message), engine(self.edited(package)):
                pass
        finally:
            monkeypatch.undo()
            register()

    def test_without_vllm(self, package, monkeypatch):
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(ShortVError, match="needs vLLM: .*'vllm>=0.32,<0.33'"):
            serve(str(package), [])

    def test_no_such_package(self, tmp_path):
        with pytest.raises(ShortVError, match="no such folder"):
            serve(str(tmp_path / "none"), [])


@pytest.mark.slow
def test_shortv_serve_answers_openai_clients(package_folder, tmp_path):
    image = base64.b64encode(SAMPLES[0].image.read_bytes()).decode()
    content = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{image}"}},
        {"type": "text", "text": SAMPLES[0].question},
    ]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with (
        running(
            "from shortv_llava.cli import main\nmain()",
            *("serve", package_folder, "--dtype", "float32", "--enforce-eager", "--host", "127.0.0.1", "--port", port),
            ready="startup (complete)",
            cwd=tmp_path,
            env=os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"},
        ),
        openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=300) as client,
    ):
        answer = client.chat.completions.create(
            model=package_folder.name, messages=[{"role": "user", "content": content}], temperature=0, max_tokens=4
        )
    assert answer.choices[0].message.content.strip() == SAMPLES[0].answer
