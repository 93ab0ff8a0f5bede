"""Training against the hooked stock model: gradients, checkpointing, Trainer, accelerate's FSDP, LoRA."""

import copy

import pytest
import tiny
import torch
from peft import LNTuningConfig, get_peft_model
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

from processes import torchrun
from shortv_llava.examples import finetune_lora

LAYOUT = ["tttIttttt", "tIttItt", "tttttt"]
FROZEN = {
    "layers": {"layers": (3, 2)},
    "all layers": {"layers": (0, 1, 2, 3)},
    "mixed blocks": {"layers": (3,), "attention": (1,), "ffn": (0, 2)},
}
MODELS = [("llava", "llama", 4), ("llava", "qwen2", 2), ("llava_next", "mistral", 2)]


def models(model=("llava", "llama", 2), blocks=FROZEN["mixed blocks"]):
    """Copies of the pair, to be trained."""
    stock, ours = (copy.deepcopy(each).train() for each in tiny.pair(*model))
    tiny.freeze(ours, **blocks)
    return stock, ours


def labelled(inputs: dict) -> dict:
    padding = inputs["attention_mask"] == 0
    unlearnt = (inputs["input_ids"] == tiny.IMAGE_TOKEN) | padding
    unlearnt[:, 1:] |= padding[:, :-1]  # padding, whose states may differ, predicts nothing
    return inputs | {"labels": inputs["input_ids"].masked_fill(unlearnt, -100)}


def gradients(model, inputs: dict) -> dict:
    model.zero_grad()
    model(**inputs).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_same_gradients(ours: dict, expected: dict):
    assert ours.keys() == expected.keys()
    for name, gradient in expected.items():
        if gradient is None:  # the vision tower's last layer, which LLaVA does not read
            assert ours[name] is None, name
        else:
            assert torch.allclose(ours[name], gradient, **tiny.CLOSE), name


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("blocks", FROZEN.values(), ids=FROZEN)
@pytest.mark.parametrize("model", MODELS, ids=lambda model: "-".join(map(str, model)))
def test_gradients_equal_the_hooked_models(model, blocks, side):
    stock, ours = models(model, blocks)
    inputs = labelled(tiny.batch(stock, model[0], LAYOUT, side))
    with tiny.frozen(stock, inputs["input_ids"] == tiny.IMAGE_TOKEN, **blocks):
        expected = gradients(stock, inputs)
    assert_same_gradients(gradients(ours, inputs), expected)


# Stock eager attention has no numbers in float64 for padding on the left.
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
def test_gradient_checkpointing_changes_no_gradient(attn_implementation, use_reentrant):
    _, ours = models(("llava", "llama", 2, attn_implementation))
    inputs = labelled(tiny.batch(ours, "llava", LAYOUT, "right"))
    ours.enable_input_require_grads()  # reentrant checkpoints need it
    expected = gradients(ours, inputs)
    passes = {index: 0 for index in range(tiny.LAYERS)}

    def count(module, arguments):
        passes[module.layer_idx] += 1

    for layer in tiny.decoder(ours).layers:
        layer.self_attn.register_forward_pre_hook(count)
    ours.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    assert_same_gradients(gradients(ours, inputs), expected)
    assert set(passes.values()) == {2}  # forward, and once more for backward


def rows(model, number: int) -> list[dict]:
    """Samples of one layout, each with its own tokens and image."""
    samples = [labelled(tiny.batch(model, "llava", ["tttIttttt"], seed=seed)) for seed in range(number)]
    return [{name: tensor[0] for name, tensor in sample.items()} for sample in samples]


def train(model, folder, resume=None, **settings) -> list[float]:
    """The loss of each step that a Trainer logs."""
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        max_steps=4,
        save_steps=2,
        logging_steps=1,
        learning_rate=1e-3,
        use_cpu=True,
        report_to=[],
        seed=0,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **settings,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows(model, 8))
    trainer.train(resume_from_checkpoint=resume)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_trainer_trains_saves_and_resumes(tmp_path):
    blocks = FROZEN["mixed blocks"]
    stock, ours = models(blocks=blocks)
    _, resumed = models(blocks=blocks)
    visual = torch.stack([row["input_ids"] for row in rows(stock, 2)]) == tiny.IMAGE_TOKEN  # of any two rows
    with tiny.frozen(stock, visual, **blocks):
        expected = train(stock, tmp_path / "stock")
    losses = train(ours, tmp_path / "ours")
    assert losses == pytest.approx(expected, abs=1e-9)
    assert len(set(losses)) == 4
    for name, parameter in stock.named_parameters():
        assert torch.allclose(ours.get_parameter(name), parameter, **tiny.CLOSE), name
    assert train(resumed, tmp_path / "again", resume=str(tmp_path / "ours" / "checkpoint-2")) == losses
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter, resumed.get_parameter(name)), name
    saved = type(ours).from_pretrained(tmp_path / "ours" / "checkpoint-4", dtype=torch.float64)
    assert saved.config.frozen_layers() == ours.config.frozen_layers()
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter, saved.get_parameter(name)), name


@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_a_saved_file_is_a_state_dict(family, tmp_path):
    """Every tensor of it, by the name it has there."""
    _, ours = tiny.pair(family)
    ours.save_pretrained(tmp_path)
    again = type(ours)(ours.config).double()
    again.load_state_dict(load_file(tmp_path / "model.safetensors"))
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name)), name


def test_trainer_with_checkpointing_and_autocast(tmp_path):
    """The setting that most fine-tunes use: trained weights as near to those trained in float64 as stock's are."""
    blocks = FROZEN["layers"]
    exact, _ = models(blocks=blocks)
    stock, ours = (model.float() for model in models(blocks=blocks))  # autocast leaves float64 alone
    visual = torch.stack([row["input_ids"] for row in rows(stock, 2)]) == tiny.IMAGE_TOKEN
    with tiny.frozen(exact, visual, **blocks), tiny.frozen(stock, visual, **blocks):
        train(exact, tmp_path / "exact")
        train(stock, tmp_path / "stock", bf16=True, gradient_checkpointing=True)
    train(ours, tmp_path / "ours", bf16=True, gradient_checkpointing=True)

    def off(model):
        weights, exact_weights = (torch.cat([p.flatten() for p in each.parameters()]) for each in (model, exact))
        return tiny.root_mean_square(weights.detach() - exact_weights.detach())

    assert off(ours) <= 1.5 * off(stock)


@pytest.mark.slow
def test_layers_sharded_by_accelerate(tmp_path):
    """Two processes train the hooked stock model's steps, with the layers sharded that bear the stock layers' name."""
    blocks = FROZEN["mixed blocks"]
    stock, ours = models(blocks=blocks)
    ours.save_pretrained(tmp_path / "package")
    samples = rows(stock, 6)
    batches = [
        {name: torch.stack([row[name] for row in pair]) for name in pair[0]} for pair in zip(*[iter(samples)] * 2)
    ]
    torch.save(
        [[{n: t[rank : rank + 1] for n, t in b.items()} for b in batches] for rank in (0, 1)], tmp_path / "rows.pt"
    )
    names = ("package", "rows.pt", "state", "out.pt")
    torchrun("fully_sharded.py", *(tmp_path / name for name in names), home=tmp_path)
    found = torch.load(tmp_path / "out.pt")
    assert "FSDPLlamaDecoderLayer" in found["sharded"]
    stock.model.vision_tower.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in stock.parameters() if p.requires_grad], lr=1e-3)
    expected = []
    for batch in batches:
        losses = []
        for row in (0, 1):  # each alone, as in its process: the loss of two would be rounded otherwise, to float32
            inputs = {name: tensor[row : row + 1] for name, tensor in batch.items()}
            with tiny.frozen(stock, inputs["input_ids"] == tiny.IMAGE_TOKEN, **blocks):
                losses.append(stock(**inputs).loss)
        loss = torch.stack(losses).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        expected.append(loss.item())
    assert found["losses"] == pytest.approx(expected, abs=1e-9)
    assert found["resumed"] == found["losses"][2:]


def test_lora_trains_the_language_models_layers_alone():
    """What the recipe does, in small: gradients pass frozen blocks, the vision tower stays as it is."""
    torch.manual_seed(0)
    _, ours = models()
    inputs = labelled(tiny.batch(ours, "llava", LAYOUT))
    before = copy.deepcopy(ours.state_dict())
    model = finetune_lora.with_lora(ours, rank=4)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    losses = []
    for _ in range(5):
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    merged = model.merge_and_unload().state_dict()
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, merged[name])}
    projections = {name for name in before if "language_model" in name and "_proj" in name}
    assert changed == projections


def test_tuned_norms_are_the_ones_that_count():
    """PEFT wraps the norms that it tunes and keeps the checkpoint's beside: a layer must not read those."""
    _, ours = models()
    inputs = tiny.batch(ours, "llava", LAYOUT)
    norms = ["input_layernorm", "post_attention_layernorm"]
    model = get_peft_model(ours, LNTuningConfig(target_modules=norms)).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    with torch.no_grad():
        tuned = model(**inputs).logits
        torch.testing.assert_close(model.merge_and_unload()(**inputs).logits, tuned, **tiny.CLOSE)


@pytest.mark.slow
def test_lora_recipe_runs(capsys):
    finetune_lora.main(steps=2, questions=5, captions=2)
    lines = capsys.readouterr().out.splitlines()
    assert [line[:24].strip() for line in lines if "captions" in line] == ["dense", "ShortV", "ShortV, after LoRA"]
    finetune_lora.main(steps=2, questions=5, captions=2, only="corrections")
    lines = capsys.readouterr().out.splitlines()
    names = ["dense", "ShortV", "corrected, fitted", "corrected, trained"]
    assert [line[:24].strip() for line in lines if "captions" in line] == names
    assert "trainable params: " in "".join(lines)
