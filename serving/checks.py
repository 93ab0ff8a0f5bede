"""Checks and settings when vLLM configures an engine, before any weights are read."""

import os

from vllm.compilation.breakable_cudagraph import is_breakable_cudagraph_enabled
from vllm.logger import init_logger
from vllm.model_executor.models.config import VerifyAndUpdateConfig

from shortv_llava.errors import ShortVError
from shortv_llava.serving import check_package

logger = init_logger("vllm.shortv")  # vLLM shows what is logged below its own name


class EngineChecks(VerifyAndUpdateConfig):
    """vLLM's hook for the configuration of an architecture."""

    @staticmethod
    def verify_and_update_config(vllm_config) -> None:
        """Raises [`ShortVError`] for a package or an engine option that ShortV cannot run with."""
        config = vllm_config.model_config.hf_config
        check_package(config)
        attention_layers, ffn_layers = config.frozen_layers()
        if not attention_layers | ffn_layers:
            return

        parallel, speculative = vllm_config.parallel_config, vllm_config.speculative_config
        refused = {
            "LoRA adapters": vllm_config.lora_config is not None,  # their kernels expect all rows of a step
            "speculation from hidden states between layers": speculative is not None
            and speculative.method in ("eagle3", "dflash", "dspark", "extract_hidden_states"),
            "prompt embeddings": vllm_config.model_config.enable_prompt_embeds,  # vLLM marks them like visual tokens
            "context parallelism": parallel.decode_context_parallel_size > 1
            or parallel.prefill_context_parallel_size > 1,
            "microbatches (--enable-dbo)": parallel.use_ubatching,
            "breakable CUDA graphs": is_breakable_cudagraph_enabled(),  # they replay steps without calling `forward`
        }
        for feature, asked_for in refused.items():
            if asked_for:
                raise ShortVError(
                    f"a package with replaced layers cannot be served with {feature}: leave that out, or make a "
                    "package with `--layers none`"
                )
        os.environ["VLLM_USE_BREAKABLE_CUDAGRAPH"] = "0"  # else vLLM may turn them on later
        logger.info(
            "ShortV freezes visual tokens in %d attention and %d FFN blocks. Steps with visual tokens run eagerly, all "
            "others as vLLM compiled them, in piecewise CUDA graphs at most.",
            len(attention_layers),
            len(ffn_layers),
        )
