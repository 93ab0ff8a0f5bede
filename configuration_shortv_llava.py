"""Configurations of ShortV LLaVA models: LLaVA's own, and the layers in which visual tokens are frozen."""

import math

from transformers import LlavaConfig, LlavaNextConfig, LlavaNextVideoConfig, LlavaOnevisionConfig, VipLlavaConfig


def model_class_name(config_class):
    return config_class.__name__.removesuffix("Config") + "ForConditionalGeneration"


class ShortVConfigMixin:
    """What a ShortV configuration adds to LLaVA's.

    Args:
        replaced_layers (`list[int]`): layers in which visual tokens skip attention and FFN (ShortV, section 3.2), ids
            from 0, in order of replacement.
        replaced_attention_layers (`list[int]`): layers in which they skip attention alone.
        replaced_ffn_layers (`list[int]`): layers in which they skip the FFN alone.
        lc_scores (`list[float]`, *optional*): Layer Contribution score of every layer.
        calibration (`dict`, *optional*): the settings the scores were computed with.

    Raises:
        ValueError: if a layer id is no integer in range or stands in the lists twice, if `lc_scores` does not hold one
            finite number a layer, or if `calibration` is no dict.
    """

    def __init__(
        self,
        replaced_layers=(),
        replaced_attention_layers=(),
        replaced_ffn_layers=(),
        lc_scores=None,
        calibration=None,
        **kwargs,
    ):
        module = "modeling_shortv_llava"
        name = model_class_name(type(self))
        kwargs.pop("model_type", None)  # a plain LLaVA's would hide ours
        kwargs["auto_map"] = {
            "AutoConfig": f"configuration_shortv_llava.{type(self).__name__}",
            "AutoModel": f"{module}.{name}",
            "AutoModelForImageTextToText": f"{module}.{name}",
            "AutoModelForMultimodalLM": f"{module}.{name}",
        }
        super().__init__(**kwargs)
        self.set_replaced_layers(replaced_layers, replaced_attention_layers, replaced_ffn_layers)
        self.lc_scores = lc_scores
        self._check_scores()
        if calibration is not None and not isinstance(calibration, dict):
            raise ValueError(f"calibration must be a dict of settings or null, got {calibration!r}")
        self.calibration = calibration

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        # Lets `from_pretrained` extend a plain LLaVA's configuration, with the lists given as keyword arguments.
        try:
            config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        except TypeError as error:
            raise ValueError(f"{pretrained_model_name_or_path}: there is no configuration ({error})") from error
        if not isinstance(config_dict, dict):
            raise ValueError(f"{pretrained_model_name_or_path}: config.json must hold an object, got {config_dict!r}")
        if config_dict.get("model_type") == super(cls, cls).model_type:
            config_dict["model_type"] = cls.model_type
        own = ("replaced_layers", "replaced_attention_layers", "replaced_ffn_layers", "lc_scores", "calibration")
        config_dict.update({key: kwargs.pop(key) for key in own if key in kwargs})
        return config_dict, kwargs

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        try:
            return super().from_dict(config_dict, **kwargs)
        except ValueError:
            raise
        except Exception as error:  # stock LLaVA's are of many types, by the entry and the version of transformers
            raise ValueError(f"this is no configuration of a LLaVA model: {error}") from error

    def set_replaced_layers(self, replaced_layers=(), attention=(), ffn=()):
        """Set the three lists of layer ids: both blocks frozen, attention alone, FFN alone. Nothing is set on error."""
        lists = {
            "replaced_layers": replaced_layers,
            "replaced_attention_layers": attention,
            "replaced_ffn_layers": ffn,
        }
        self._check_layers(lists)
        for name, layers in lists.items():
            setattr(self, name, list(layers))

    def frozen_layers(self):
        """Ids of the layers whose attention, and of those whose FFN, visual tokens skip: two frozensets."""
        lists = {
            "replaced_layers": self.replaced_layers,
            "replaced_attention_layers": self.replaced_attention_layers,
            "replaced_ffn_layers": self.replaced_ffn_layers,
        }
        self._check_layers(lists)
        both, attention, ffn = (frozenset(layers) for layers in lists.values())
        return both | attention, both | ffn

    def _num_layers(self):
        num_layers = getattr(self.text_config, "num_hidden_layers", None)
        if type(num_layers) is not int:
            raise ValueError(f"text_config: num_hidden_layers must be an integer, got {num_layers!r}")
        return num_layers

    def _check_layers(self, lists):
        num_layers = self._num_layers()
        seen = {}
        for name, layers in lists.items():
            if not isinstance(layers, (list, tuple)):
                raise ValueError(f"{name} must be a list of layer ids, got {layers!r}")
            for layer in layers:
                if type(layer) is not int or not 0 <= layer < num_layers:
                    raise ValueError(f"{name}: {layer!r} is no layer id; ids are integers from 0 to {num_layers - 1}")
                if layer in seen:
                    where = "twice" if seen[layer] == name else f"and in {seen[layer]}"
                    raise ValueError(
                        f"{name}: layer {layer} is listed here {where}; ids 0 to {num_layers - 1} may stand once"
                    )
                seen[layer] = name

    def _check_scores(self):
        scores, num_layers = self.lc_scores, self._num_layers()
        if scores is None:
            return
        if not isinstance(scores, (list, tuple)) or len(scores) != num_layers:
            raise ValueError(f"lc_scores must hold one number for each of the {num_layers} layers, got {scores!r}")
        for layer, score in enumerate(scores):
            if type(score) not in (int, float) or not abs(score) <= math.nextafter(math.inf, 0):
                raise ValueError(f"lc_scores: {score!r} for layer {layer} of 0 to {num_layers - 1} is no finite number")
        self.lc_scores = list(scores)


class ShortVLlavaConfig(ShortVConfigMixin, LlavaConfig):
    """[`LlavaConfig`] with the layers in which visual tokens are frozen, see [`ShortVConfigMixin`]."""

    model_type = "shortv_llava"

    def __init__(self, **kwargs):  # transformers 5 would generate one that passes the mixin's by
        super().__init__(**kwargs)


class ShortVLlavaNextConfig(ShortVConfigMixin, LlavaNextConfig):
    """[`LlavaNextConfig`] with the layers in which visual tokens are frozen, see [`ShortVConfigMixin`]."""

    model_type = "shortv_llava_next"

    def __init__(self, **kwargs):  # transformers 5 would generate one that passes the mixin's by
        super().__init__(**kwargs)


class ShortVVipLlavaConfig(ShortVConfigMixin, VipLlavaConfig):
    """[`VipLlavaConfig`] with the layers in which visual tokens are frozen, see [`ShortVConfigMixin`]."""

    model_type = "shortv_vipllava"

    def __init__(self, **kwargs):
        super().__init__(**kwargs)


class ShortVLlavaOnevisionConfig(ShortVConfigMixin, LlavaOnevisionConfig):
    """[`LlavaOnevisionConfig`] with the layers in which visual tokens are frozen, see [`ShortVConfigMixin`]."""

    model_type = "shortv_llava_onevision"

    def __init__(self, **kwargs):
        super().__init__(**kwargs)


class ShortVLlavaNextVideoConfig(ShortVConfigMixin, LlavaNextVideoConfig):
    """[`LlavaNextVideoConfig`] with the layers in which visual tokens are frozen, see [`ShortVConfigMixin`]."""

    model_type = "shortv_llava_next_video"

    def __init__(self, **kwargs):
        super().__init__(**kwargs)


CONFIG_CLASSES = (
    ShortVLlavaConfig,
    ShortVLlavaNextConfig,
    ShortVVipLlavaConfig,
    ShortVLlavaOnevisionConfig,
    ShortVLlavaNextVideoConfig,
)
for config_class in CONFIG_CLASSES:
    config_class.register_for_auto_class()

try:  # `transformers serve` looks here which auto class loads a model, before any of the model's own code is imported
    from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES
except ImportError:  # transformers 4, whose server takes no custom classes
    pass
else:
    for config_class in CONFIG_CLASSES:
        MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES[config_class.model_type] = model_class_name(config_class)
