"""What is refused or chosen when an engine is configured, before any weights are read."""

from vllm.logger import init_logger
from vllm.model_executor.models.config import VerifyAndUpdateConfig

from shortv_llava.errors import ShortVError

logger = init_logger(__name__)

FORMAT = 1  # of packages; the config.json of a newer one says `shortv_format`
BACKBONES = ("llama", "mistral", "qwen2")


class EngineChecks(VerifyAndUpdateConfig):
    """vLLM's hook for the configuration of an architecture."""

    @staticmethod
    def verify_and_update_config(vllm_config) -> None:
        """Raises [`ShortVError`] for a package or an engine option that ShortV cannot run with."""
        config = vllm_config.model_config.hf_config
        package_format = getattr(config, "shortv_format", FORMAT)
        if package_format != FORMAT:
            raise ShortVError(
                f"the package is of format {package_format}, this shortv-llava reads format {FORMAT}: update it"
            )
        if config.text_config.model_type not in BACKBONES:
            raise ShortVError(
                f"text backbone {config.text_config.model_type!r} is not supported; those are: {', '.join(BACKBONES)}"
            )
        attention_layers, ffn_layers = config.frozen_layers()
        if not attention_layers | ffn_layers:
            return

        parallel, speculative = vllm_config.parallel_config, vllm_config.speculative_config
        refused = {
            "LoRA adapters": vllm_config.lora_config is not None,  # their kernels count on all rows of a step
            "speculation that reads hidden states between layers": speculative is not None
            and speculative.method in ("eagle3", "dflash", "dspark", "extract_hidden_states"),
            "prompt embeddings": vllm_config.model_config.enable_prompt_embeds,  # vLLM marks them as if visual
            "context parallelism": parallel.decode_context_parallel_size > 1
            or parallel.prefill_context_parallel_size > 1,
            "dual batch overlap": parallel.use_ubatching,
        }
        for feature, asked_for in refused.items():
            if asked_for:
                raise ShortVError(
                    f"frozen layers and {feature} do not go together: leave that out, or replace no layers"
                )
        logger.info(
            "ShortV: visual tokens are frozen in %d attention and %d FFN blocks. Steps with visual tokens run eagerly, "
            "other steps as compiled, in piecewise CUDA graphs.",
            len(attention_layers),
            len(ffn_layers),
        )
