"""Parts of a model captured as CUDA graphs, so that the host launches one graph in place of a thousand kernels."""

from contextlib import contextmanager

import torch


class Replay:
    """A module's method, captured at its second call. Later calls copy the one tensor that differs and replay the rest.

    Args:
        method: whose arguments are given by keyword. The host must not read from the device in it.
        changing (`str`): the argument that differs from call to call, a tensor of one shape and dtype.
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
        """Once more with what came last."""
        self.graph.replay()

    def _warm_up(self, kwargs):
        """What libraries make at their first calls is not for the graph; what a pass makes for its layers is, so the
        capture is another call's, whose arguments nobody has used."""
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
        if mask is not None and mask.all():  # which the host could not find out during the capture
            kwargs["attention_mask"] = None
        self.input = kwargs[self.changing].clone()
        self.kept = kwargs | {self.changing: self.input}  # the graph reads their tensors
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.output = self.method(**self.kept)


@contextmanager
def replayed(model, inputs: dict):
    """Within, `model` replays its vision tower and its language model for inputs of the shape and layout of `inputs`.

    Gives the language model's [`Replay`]. What is between the two, and the head, runs as ever.
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
