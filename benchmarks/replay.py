"""Capture parts of a model as CUDA graphs, so that the host launches one graph instead of a thousand kernels."""

from contextlib import contextmanager

import torch


class Replay:
    """A module's method, captured at its second call. Later calls copy the changing tensor and replay the graph.

    Args:
        method: method with keyword arguments. Its host code must not read from the device.
        changing (`str`): name of the argument that differs between calls, a tensor of fixed shape and dtype.
    """

    def __init__(self, method, changing: str):
        self.method, self.changing, self.warm, self.graph = method, changing, False, None

    def __call__(self, **kwargs):
        if not self.warm:
            return self._warm_up(kwargs)
        if self.graph is None:
            self._capture(kwargs)
        self.input.copy_(kwargs[self.changing])
        self.replay()
        return self.output

    def replay(self) -> None:
        """Replay the graph with the last input."""
        self.graph.replay()

    def _warm_up(self, kwargs):
        """Run the method before the capture, for set-up at libraries' first calls. Tensors that a pass makes for its
        layers must be captured, so the capture uses another call, with fresh arguments."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                output = self.method(**kwargs)
        torch.cuda.current_stream().wait_stream(side)
        self.warm = True
        return output

    def _capture(self, kwargs) -> None:
        mask = kwargs.get("attention_mask")
        if mask is not None and mask.all():  # the host cannot read this during the capture
            kwargs["attention_mask"] = None
        self.input = kwargs[self.changing].clone()
        self.kept = kwargs | {self.changing: self.input}  # keeps the tensors that the graph reads
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.output = self.method(**self.kept)


@contextmanager
def replayed(model, inputs: dict):
    """Make `model` replay its vision tower and its language model, for inputs with the shape and layout of `inputs`.

    Yields the language model's [`Replay`]. The code between the two, and the head, runs eagerly.
    """
    inner, language_model = model.model, model.model.language_model
    inner.get_image_features = Replay(inner.get_image_features, "pixel_values")
    language_model.forward = Replay(language_model.forward, "inputs_embeds")
    try:
        for _ in ("warm up", "capture"):
            model(**inputs, use_cache=True, logits_to_keep=1)
        yield language_model.forward
    finally:
        del inner.get_image_features, language_model.forward
