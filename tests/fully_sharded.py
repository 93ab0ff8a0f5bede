"""Run by torchrun: steps of training with each layer sharded by accelerate (FSDP2), saved and resumed.

Arguments: package folder, file of rows (one batch a process and step), folder for the state, file for what comes out.

accelerate refuses FSDP without accelerators, where torch itself (gloo) does not; so it is told here that it may.
"""

import sys

import tiny  # noqa: F401 - stock norms then keep float64 here too
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.fsdp import FSDPModule

from processes import leave
from shortv_llava import ShortVLlavaForConditionalGeneration

folder, rows_file, state_folder, output_file = sys.argv[1:]
plugin = FullyShardedDataParallelPlugin(
    fsdp_version=2,
    auto_wrap_policy="transformer_based_wrap",
    transformer_cls_names_to_wrap=["LlamaDecoderLayer"],  # as for stock LLaVA
    cpu_ram_efficient_loading=False,
)
accelerator = Accelerator(cpu=True, mixed_precision="no")  # whatever a Trainer before left in the environment
accelerator.state.fsdp_plugin = plugin
for state in (PartialState(), accelerator.state):
    state.distributed_type = DistributedType.FSDP


def prepared():
    model = ShortVLlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float64).train()
    model.model.vision_tower.requires_grad_(False)  # LLaVA reads none of its last layer: state for that is never made
    return accelerator.prepare(model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3))


def train(model, optimizer, batches) -> list[float]:
    """The loss of each step, mean over the processes."""
    losses = []
    for batch in batches:
        loss = model(**batch).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(accelerator.reduce(loss.detach(), "mean").item())
    return losses


batches = torch.load(rows_file)[accelerator.process_index]
model, optimizer = prepared()
result = {"sharded": sorted({type(module).__name__ for module in model.modules() if isinstance(module, FSDPModule)})}
result["losses"] = train(model, optimizer, batches[:2])
accelerator.save_state(state_folder)
result["losses"] += train(model, optimizer, batches[2:])
accelerator.free_memory()
model, optimizer = prepared()
accelerator.load_state(state_folder)
result["resumed"] = train(model, optimizer, batches[2:])
if accelerator.is_main_process:
    torch.save(result, output_file)
leave()
