"""A LLaVA on a pretrained language model, SmolLM2-135M: its pictures, training, builder and measurements."""
