"""What a configuration accepts, refuses and keeps."""

import json

import pytest
import tiny
from transformers import LlavaConfig

from shortv_llava import ShortVLlavaConfig, ShortVLlavaNextConfig

CLASSES = [ShortVLlavaConfig, ShortVLlavaNextConfig]


def config(config_class=ShortVLlavaConfig, **settings):
    family = "llava_next" if config_class is ShortVLlavaNextConfig else "llava"
    return config_class(**tiny.config_dict(family), **settings)


@pytest.mark.parametrize("name", ["replaced_layers", "replaced_attention_layers", "replaced_ffn_layers"])
@pytest.mark.parametrize("bad", [4, -1, 10**30, True, 1.0, "1", None, [1], float("nan")])
def test_entries_that_are_no_layer_ids(name, bad):
    with pytest.raises(ValueError) as error:
        config(**{name: [2, bad]})
    assert name in str(error.value) and repr(bad) in str(error.value) and "0 to 3" in str(error.value)


@pytest.mark.parametrize("bad", [3, None, "31,29", {"a": 1}])
def test_lists_that_are_no_lists(bad):
    with pytest.raises(ValueError, match="replaced_layers must be a list"):
        config(replaced_layers=bad)


def test_a_layer_stands_once():
    with pytest.raises(ValueError, match="replaced_layers: layer 1 .*twice"):
        config(replaced_layers=[1, 2, 1])
    with pytest.raises(ValueError, match="replaced_ffn_layers: layer 2 .*replaced_attention_layers"):
        config(replaced_attention_layers=[2], replaced_ffn_layers=[2])


@pytest.mark.parametrize(
    "bad", [[1.0] * 3, [1.0] * 5, 3, "abcd", [1.0, 2.0, float("nan"), 1.0], [1.0, "a", 0, 0], [True] * 4]
)
def test_scores_must_be_one_finite_number_a_layer(bad):
    with pytest.raises(ValueError, match="lc_scores"):
        config(lc_scores=bad)


@pytest.mark.parametrize("config_class", CLASSES)
def test_saved_and_read_again(config_class, tmp_path):
    settings = {
        "replaced_layers": [3, 0],
        "replaced_attention_layers": [1],
        "replaced_ffn_layers": [2],
        "lc_scores": [0.5, 1e-9, 3, 0.0],
        "calibration": {"seed": 0},
    }
    config(config_class, **settings).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["model_type"] == config_class.model_type
    tasks = ("", "ForImageTextToText", "ForMultimodalLM", "ForVision2Seq", "ForPreTraining", "ForCausalLM")
    assert set(written["auto_map"]) == {"AutoConfig", *(f"AutoModel{task}" for task in tasks)}
    read = config_class.from_pretrained(tmp_path)
    assert {name: getattr(read, name) for name in settings} == settings
    assert read.frozen_layers() == ({0, 1, 3}, {0, 2, 3})


@pytest.mark.parametrize("config_class", CLASSES)
def test_a_plain_llava_is_extended_without_complaint(config_class, tmp_path, caplog):
    family = "llava_next" if config_class is ShortVLlavaNextConfig else "llava"
    tiny.CLASSES[family][0](**tiny.config_dict(family)).save_pretrained(tmp_path)
    extended = config_class.from_pretrained(tmp_path, replaced_layers=[3], lc_scores=[1, 2, 3, 4])
    assert (extended.replaced_layers, extended.lc_scores) == ([3], [1, 2, 3, 4])
    assert extended.model_type == extended.to_dict()["model_type"] == config_class.model_type
    assert "model of type" not in caplog.text
    with pytest.raises(ValueError, match="5 is no layer id"):
        config_class.from_pretrained(tmp_path, replaced_layers=[5])


@pytest.mark.parametrize("config_class", CLASSES)
def test_defaults_freeze_nothing(config_class):
    default = config_class()
    assert default.frozen_layers() == (frozenset(), frozenset())
    assert default.lc_scores is None and default.calibration is None


@pytest.mark.parametrize("settings", [{"calibration": "lc"}, {"lc_scores": [1.0, 2.0, 3.0, 10**400]}])
def test_values_that_nothing_could_use(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        config(**settings)


@pytest.mark.parametrize("text", ["[1]", "5", "null"])
def test_a_config_json_that_stock_cannot_read(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    for config_class in (LlavaConfig, ShortVLlavaConfig):
        with pytest.raises((ValueError, TypeError, AttributeError)):
            config_class.from_pretrained(tmp_path)


def test_an_entry_is_checked_whenever_it_is_set():
    changed = config(replaced_layers=[3, 1])
    with pytest.raises(ValueError, match="replaced_ffn_layers: layer 1 .*replaced_layers"):
        changed.replaced_ffn_layers = [1]
    with pytest.raises(ValueError, match="lc_scores"):
        changed.lc_scores = [1]
    with pytest.raises(ValueError, match="calibration"):
        changed.calibration = [1]
    with pytest.raises(ValueError, match="replaced_layers: 4 is no layer id"):
        changed.update({"replaced_layers": [4]})
    assert (changed.replaced_layers, changed.replaced_ffn_layers) == ([3, 1], [])
    changed.set_replaced_layers([2], ffn=[1])  # all three at once
    assert (changed.replaced_layers, changed.replaced_ffn_layers) == ([2], [1])


def test_subclasses_keep_or_inherit_their_own_init():
    class Noted(ShortVLlavaConfig):
        def __init__(self, note="none", **kwargs):
            super().__init__(**kwargs)
            self.note = note

    class Inherits(Noted):
        pass

    for config_class in (Noted, Inherits):
        made = config(config_class, note="mine", replaced_layers=[2])
        assert made.note == "mine" and made.replaced_layers == [2]
        assert config(config_class).note == "none"
