"""vLLM on packages, against our transformers model: the same tokens, and log-probabilities within 1e-4."""

import gc
import os
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

import torch
from PIL import Image
from safetensors.torch import save_file
from tiny import CLASSES, config_dict, next_model
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory

from shortv_llava.calibrate.samples import embedded_samples
from shortv_llava.checkpoints import CHECKPOINT
from shortv_llava.package import load_model, load_processor, write_package
from shortv_llava.prompts import make_prompt

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
