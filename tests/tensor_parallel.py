"""Run by torchrun: a package, loaded with trust_remote_code and split by its tensor parallel plan, answers.

Arguments: package folder, file of inputs, file for what comes out.
"""

import sys

import tiny  # noqa: F401 - stock norms then keep float64 here too
import torch
from transformers import AutoModelForImageTextToText

from processes import leave

folder, inputs_file, output_file = sys.argv[1:]
model = AutoModelForImageTextToText.from_pretrained(
    folder, dtype=torch.float64, tp_plan="auto", trust_remote_code=True
).eval()
inputs = torch.load(inputs_file)
layer = model.model.language_model.layers[-1]
result = {"logits": [], "tokens": [], "shapes": {}}
for name in ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj"):
    weight = layer.get_submodule(name).weight
    result["shapes"][name] = tuple(getattr(weight, "to_local", lambda weight=weight: weight)().shape)
for blocks in inputs.pop("frozen"):
    model.set_replaced_layers(blocks.get("layers", ()), blocks.get("attention", ()), blocks.get("ffn", ()))
    with torch.no_grad():
        result["logits"].append(model(**inputs).logits)
    result["tokens"].append(model.generate(**inputs, max_new_tokens=4, do_sample=False))
if torch.distributed.get_rank() == 0:
    torch.save(result, output_file)
leave()
