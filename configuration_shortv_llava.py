"""Configurations of ShortV LLaVA models: LLaVA's own, the layers in which visual tokens are frozen, corrections."""

import math
from typing import Any

from transformers import LlavaConfig, LlavaNextConfig, LlavaNextVideoConfig, LlavaOnevisionConfig, VipLlavaConfig
from transformers.models.auto import modeling_auto

LAYER_LISTS = ("replaced_layers", "replaced_attention_layers", "replaced_ffn_layers")
SCORES = ("lc_scores", "calibration")
CORRECTION = ("correction_rank", "corrected_layers")  # in this order, for the second is checked against the first
LayerIds = list[int] | tuple[int, ...]
AUTO_CLASSES = ("", "ForImageTextToText", "ForMultimodalLM", "ForVision2Seq", "ForPreTraining", "ForCausalLM")


def model_class_name(config_class: type) -> str:
    return config_class.__name__.removesuffix("Config") + "ForConditionalGeneration"


class ShortVConfigMixin:
    """What a ShortV configuration adds to LLaVA's. An entry is checked whenever it is set.

    Args:
        replaced_layers (`list[int]`): layers in which visual tokens skip attention and FFN (ShortV, section 3.2), ids
            from 0, in order of replacement.
        replaced_attention_layers, replaced_ffn_layers (`list[int]`): layers in which they skip one of the two.
        correction_rank (`int`): of the linear maps that stand in for frozen updates; 0 if there are none.
        corrected_layers (`list[int]`): layers whose map is among the weights. It acts while visual tokens skip the
            layer's FFN, and rests otherwise; what it was fitted to stand in for, layer or FFN, the weights do not tell.
        lc_scores (`list[float]`, *optional*): Layer Contribution score of every layer, in nats.
        calibration (`dict`, *optional*): the settings the scores were computed with.

    Raises:
        ValueError: for a layer id that is no integer in range or stands in the lists twice, `lc_scores` that are not
            one finite number a layer, a `calibration` that is no dict, a rank beyond the hidden size, or none.
    """

    correction_rank, corrected_layers = 0, ()  # and not in the config.json of a model without

    def __init_subclass__(cls, **kwargs: Any):
        cls.__init__ = cls.__init__  # transformers 5 writes one for a class without, which would skip the inherited one
        super().__init_subclass__(**kwargs)

    def __init__(self, **kwargs: Any):
        own = dict.fromkeys(SCORES) | {name: kwargs.pop(name) for name in (*CORRECTION, *SCORES) if name in kwargs}
        lists = [kwargs.pop(name, ()) for name in LAYER_LISTS]
        kwargs.pop("model_type", None)  # a plain LLaVA's would hide ours
        file = type(self).__module__.rpartition(".")[2]  # of a family outside LLaVA's that of the model, too
        model = f"{file.replace('configuration', 'modeling')}.{model_class_name(type(self))}"
        kwargs["auto_map"] = {f"AutoModel{task}": model for task in AUTO_CLASSES}
        kwargs["auto_map"]["AutoConfig"] = f"{file}.{type(self).__name__}"
        super().__init__(**kwargs)
        self.set_replaced_layers(*lists)
        for name, value in own.items():
            setattr(self, name, value)

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path: str, **kwargs: Any) -> tuple[dict, dict]:
        # Lets `from_pretrained` extend a plain LLaVA's configuration, with our entries given as keyword arguments.
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        own = {name: kwargs.pop(name) for name in (*LAYER_LISTS, *CORRECTION, *SCORES) if name in kwargs}
        plain = config_dict.get("model_type") == super(cls, cls).model_type
        return config_dict | own | ({"model_type": cls.model_type} if plain else {}), kwargs

    def set_replaced_layers(self, replaced_layers: LayerIds = (), attention: LayerIds = (), ffn: LayerIds = ()) -> None:
        """Set the three lists of layer ids: both blocks frozen, attention alone, FFN alone. Nothing is set on error."""
        lists = dict(zip(LAYER_LISTS, (replaced_layers, attention, ffn)))
        self._check_layers(lists)
        for name, layers in lists.items():
            super().__setattr__(name, list(layers))

    def frozen_layers(self) -> tuple[frozenset[int], frozenset[int]]:
        """Ids of the layers whose attention, and of those whose FFN, visual tokens skip."""
        both, attention, ffn = (frozenset(getattr(self, name)) for name in LAYER_LISTS)
        return both | attention, both | ffn

    def __setattr__(self, name: str, value: Any) -> None:
        if name in LAYER_LISTS:
            self._check_layers({other: getattr(self, other, ()) for other in LAYER_LISTS} | {name: value})
        elif name == "corrected_layers":
            self._check_layers({name: value})
            if value and not self.correction_rank:
                raise ValueError(f"corrected_layers: {value!r} have no correction while correction_rank is 0")
        elif name == "correction_rank":
            size, least = self.text_config.hidden_size, 1 if self.corrected_layers else 0
            if type(value) is not int or not least <= value <= size:
                raise ValueError(f"correction_rank must be an integer from {least} to {size}, got {value!r}")
        elif name == "lc_scores" and value is not None:
            number = self.text_config.num_hidden_layers
            if not isinstance(value, (list, tuple)) or len(value) != number:
                raise ValueError(f"lc_scores must hold one number for each of the {number} layers, got {value!r}")
            for layer, score in enumerate(value):
                if type(score) not in (int, float) or not abs(score) <= math.nextafter(math.inf, 0):
                    raise ValueError(f"lc_scores: {score!r} for layer {layer} of 0 to {number - 1} is no finite number")
        elif name == "calibration" and not isinstance(value, dict | None):
            raise ValueError(f"calibration must be a dict of settings or null, got {value!r}")
        super().__setattr__(name, value)

    def _check_layers(self, lists: dict[str, LayerIds]) -> None:
        last, seen = self.text_config.num_hidden_layers - 1, {}
        for name, layers in lists.items():
            if not isinstance(layers, (list, tuple)):
                raise ValueError(f"{name} must be a list of layer ids, got {layers!r}")
            for layer in layers:
                if type(layer) is not int or not 0 <= layer <= last:
                    raise ValueError(f"{name}: {layer!r} is no layer id; ids are integers from 0 to {last}")
                if layer in seen:
                    where = "twice" if seen[layer] == name else f"and in {seen[layer]}"
                    raise ValueError(f"{name}: layer {layer} is listed here {where}; ids 0 to {last} may stand once")
                seen[layer] = name


class ShortVLlavaConfig(ShortVConfigMixin, LlavaConfig):
    model_type = "shortv_llava"


class ShortVLlavaNextConfig(ShortVConfigMixin, LlavaNextConfig):
    model_type = "shortv_llava_next"


class ShortVVipLlavaConfig(ShortVConfigMixin, VipLlavaConfig):
    model_type = "shortv_vipllava"


class ShortVLlavaOnevisionConfig(ShortVConfigMixin, LlavaOnevisionConfig):
    model_type = "shortv_llava_onevision"


class ShortVLlavaNextVideoConfig(ShortVConfigMixin, LlavaNextVideoConfig):
    model_type = "shortv_llava_next_video"


def register_config(config_class: type) -> None:
    config_class.register_for_auto_class()
    # `transformers serve` looks here, before it imports the model's own code; transformers 4 has no such table.
    serve_table = getattr(modeling_auto, "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES", {})
    serve_table[config_class.model_type] = model_class_name(config_class)


for llava in ShortVConfigMixin.__subclasses__():
    register_config(llava)
