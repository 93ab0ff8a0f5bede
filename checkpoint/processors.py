"""The processor of a checkpoint: correct its files, load it, and check its prompt for a picture.

Files of real checkpoints often lack settings that processors need, such as those of config.json or a chat template
with pictures. A package gets corrected files; a plain checkpoint is used as if its files were corrected.
"""

import copy
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from PIL import Image

from shortv_llava import LLAVA_FAMILIES
from shortv_llava.chat.prompts import make_prompt, picture_mark, process
from shortv_llava.checkpoint.chat_templates import FORMATS, format_of
from shortv_llava.errors import ShortVError, first_line, one_line
from shortv_llava.files.json_files import read_json, write_json

logger = logging.getLogger(__name__)

PROCESSOR_PATTERNS = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "video_processor/*",
    "tokenizer*",
    "*.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
    "additional_chat_templates/*",
)
PROCESSOR_CLASSES = {
    "gemma3": "Gemma3Processor",
    "idefics3": "Idefics3Processor",
    "internvl": "InternVLProcessor",
    "llava": "LlavaProcessor",
    "llava_next": "LlavaNextProcessor",
    "vipllava": "LlavaProcessor",
    "llava_onevision": "LlavaOnevisionProcessor",
    "llava_next_video": "LlavaNextVideoProcessor",
    "mistral3": "PixtralProcessor",
    "qwen2_5_vl": "Qwen2_5_VLProcessor",
    "qwen2_vl": "Qwen2VLProcessor",
    "qwen3_vl": "Qwen3VLProcessor",
    "smolvlm": "SmolVLMProcessor",
}
# For these model types transformers uses tokenizer.json unchanged, whatever class tokenizer_config.json names; see its
# MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS and TOKENIZER_MAPPING_NAMES. For model types that it does not know, it would
# rebuild the tokenizer.
TOKENIZERS_TAKEN_AS_THEY_STAND = ("llava", "llava_next", "mistral3", "smolvlm", "vipllava")
# Image processors that cut pictures into tiles; other families work with any image processor without tiles.
IMAGE_PROCESSORS_OF_TILES = {
    "llava_next": "LlavaNextImageProcessor",
    "llava_next_video": "LlavaNextImageProcessor",
    "llava_onevision": "LlavaOnevisionImageProcessor",
}
PADDED_FAMILIES = ("llava", "vipllava")  # LLaVA-1.5 and VipLLaVA; later families cut pictures into tiles
PROBE = "Is this \"a\" {test} of ['type': 1]\n& nothing else?"


def write_processor(
    base: Path, target: Path, config, chat_template: str | None = None, image_aspect_ratio: str = "base"
) -> tuple[Any, list[str]]:
    """Write the processor files of the checkpoint `base` into `target`, corrected, and check them.

    Args:
        target: a folder whose config.json is written already; may be `base`.
        config: the checkpoint's ShortV configuration.
        chat_template: a name of FORMATS or a file; by default the checkpoint's own, or if that has no pictures, the
            template that LLaVA tunes such a language model with.
        image_aspect_ratio: `pad` pads pictures to a square as LLaVA-1.5 does if the processor crops them; `crop` crops
            them if it pads them; `base` keeps the processor's setting.

    Returns:
        The processor, None if there is no tokenizer or a library is missing; and the corrections, a line each.

    Raises:
        ShortVError: if the processor cannot be loaded, or gives no prompt with a picture.
    """
    if base != target:
        copy_files(base, target, PROCESSOR_PATTERNS)
    if not (target / "tokenizer_config.json").is_file():
        return None, ["has no tokenizer, so its package has none and takes only token ids"]
    _check_files(base)
    notes = _correct_settings(target, config, image_aspect_ratio)
    template = None if chat_template is None else read_template(chat_template)
    if template is not None:
        _write_template(target, template)
    try:
        processor = _load(target, base)
    except ImportError as error:
        if chat_template is None:
            return None, [*notes, f"its processor could not be tried here: {first_line(error)}"]
        raise
    if config.model_type.removeprefix("shortv_") in LLAVA_FAMILIES:
        _find_image_token(processor, target, config)
    try:
        problem = problem_of(processor)
    except ShortVError as error:
        raise ShortVError(f"{base}: {error}; copy the files of the base model there") from error
    if problem and template is None:
        for name, candidate in _templates(processor, config):
            _write_template(target, candidate)
            processor = _load(target, base)
            if problem_of(processor) is None:
                notes.append(f"its chat template: {problem}; it gets {name}, --chat-template gives another")
                return processor, notes
    if problem:
        raise ShortVError(f"{base}: its chat template: {problem}; give one with --chat-template, a file or {_names()}")
    return processor, notes


def load_processor(folder: Path, chat_template: str | None = None, image_aspect_ratio: str = "base"):
    """The processor of a checkpoint or package folder, from corrected files, see [`write_processor`].

    Raises:
        ShortVError: if there is no processor, it gives no prompt with a picture, or no pixels that the model accepts.
        ImportError: if it needs a missing library, such as torchvision.
    """
    from shortv_llava.checkpoint.checks import check_pictures, model_without_weights
    from shortv_llava.checkpoint.config import config_object, read_config

    with _put_right(folder, chat_template, image_aspect_ratio) as (_, processor, notes):
        check_pictures(folder, model_without_weights(folder, config_object(read_config(folder))), processor)
        for note in notes:
            logger.warning(f"{folder}: {note}")
        return processor


def outdated_files(folder: Path) -> list[str]:
    """Names of a package's processor files that [`write_processor`] would correct.

    Raises:
        ShortVError, ImportError: as for [`load_processor`].
    """
    with _put_right(folder) as (target, _, _):
        wanted = {path: folder / path.relative_to(target) for path in files_like(target, PROCESSOR_PATTERNS)}
        return [path.name for path, own in wanted.items() if not own.is_file() or own.read_bytes() != path.read_bytes()]


@contextmanager
def _put_right(
    folder: Path, chat_template: str | None = None, image_aspect_ratio: str = "base"
) -> Iterator[tuple[Path, Any, list[str]]]:
    """A temporary folder with the corrected processor files of a checkpoint; also the processor and notes."""
    from shortv_llava.checkpoint.config import config_object, read_config

    if not (folder / "tokenizer_config.json").is_file():
        raise ShortVError(f"{folder}: has no tokenizer; copy the processor files of the base model there")
    config = config_object(read_config(folder))
    with tempfile.TemporaryDirectory() as temporary:
        target = Path(temporary)
        shutil.copyfile(folder / "config.json", target / "config.json")
        processor, notes = write_processor(folder, target, config, chat_template, image_aspect_ratio)
        # If there is no processor, loading it raises an error that names the missing library.
        yield target, _load(target, folder) if processor is None else processor, notes


def pads(processor) -> bool:
    """Whether pictures are padded to squares before they are resized."""
    image_processor = processor.image_processor
    return type(image_processor).__name__.startswith("LlavaImageProcessor") and bool(image_processor.do_pad)


def problem_of(processor) -> str | None:
    """Why the chat template gives no proper prompt for a picture and a question; None if it does."""
    if not processor.chat_template:
        return "there is none"
    try:
        prompt = make_prompt(processor, PROBE)
    except (TemplateError, ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        return f"it fails ({first_line(error)})"
    if (number := prompt.count(picture_mark(processor))) != 1:
        return f"it gives {number} image tokens for one picture"
    if PROBE not in prompt:
        return "it changes the question's text"
    tokenizer = processor.tokenizer
    ids = process_probe(processor)["input_ids"][0].tolist()
    start = tokenizer.bos_token_id
    if start is not None and start not in (tokenizer.eos_token_id, tokenizer.pad_token_id):
        number = next((place for place, token in enumerate(ids) if token != start), len(ids))  # turns may each have one
        if number > 1 or (number == 0 and tokenizer("a")["input_ids"][:1] == [start]):
            return f"its prompt starts with {number} beginning-of-sequence tokens"
    return None


def process_probe(processor):
    """Model inputs for a question about a picture.

    Raises:
        ShortVError: if the processor fails.
    """
    try:
        return process(processor, [make_prompt(processor, PROBE)], [Image.new("RGB", (64, 48))])
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:  # differ by version
        raise ShortVError(f"its processor fails on a picture ({first_line(error)})") from error


def files_like(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    """The files in `folder` that match one of the patterns."""
    return sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})


def copy_files(folder: Path, target: Path, patterns: tuple[str, ...]) -> None:
    """Copy the files in `folder` that match one of the patterns into `target`, under the same names."""
    for path in files_like(folder, patterns):
        copied = target / path.relative_to(folder)
        copied.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, copied)


def _check_files(folder: Path) -> None:
    """Check that the processor's files exist and hold JSON; transformers 4 replaces missing settings by defaults."""
    found = {path.name: read_json(path) for path in files_like(folder, PROCESSOR_PATTERNS) if path.suffix == ".json"}
    missing = None
    if not files_like(folder, ("tokenizer.json", "*.model", "vocab.json")):
        missing = "tokenizer (tokenizer.json, tokenizer.model or vocab.json)"
    elif "preprocessor_config.json" not in found and "image_processor" not in found.get("processor_config.json", {}):
        missing = "image processor (preprocessor_config.json)"
    if missing:
        raise ShortVError(f"{folder}: has no {missing}; copy the files of the base model there")


def _load(folder: Path, source: Path):
    """The processor in a folder whose files come from `source`."""
    from transformers import AutoConfig, AutoProcessor
    from transformers.utils import is_torchvision_available

    from shortv_llava.checkpoint.config import class_of, own_type

    model_type = own_type(read_json(folder / "config.json"))
    # Otherwise transformers would ask to run the package's own code.
    AutoConfig.register(model_type, class_of(model_type, "Config"), exist_ok=True)

    def why(error: Exception) -> str:
        reason = first_line(error).replace(str(folder), str(source)).split(". ")[0]
        return f"{source}: its processor cannot be loaded ({reason}); copy the files of the base model there"

    try:
        with one_line(why, ImportError):
            return AutoProcessor.from_pretrained(folder)
    except ShortVError as error:
        if (folder / "video_preprocessor_config.json").is_file() and not is_torchvision_available():
            raise ImportError("it needs torchvision: pip install torchvision") from error  # so only said by some
        raise


def _edit(path: Path, change: Callable[[dict], Any]) -> None:
    """Change the JSON object in a file; an empty object is not written."""
    before = read_json(path) if path.is_file() else {}
    after = copy.deepcopy(before)
    change(after)
    if after != before:
        write_json(path, after)


def _correct_settings(folder: Path, config, image_aspect_ratio: str) -> list[str]:
    """Correct the settings in a folder's files, see [`write_processor`]. Returns notes for the user."""
    family, notes = config.model_type.removeprefix("shortv_"), []
    _edit(folder / "tokenizer_config.json", lambda settings: _tokenizer_settings(settings, family, folder))
    _edit(folder / "processor_config.json", lambda settings: _processor_settings(settings, config, notes))
    for name in ("preprocessor_config.json", "processor_config.json"):
        if family in IMAGE_PROCESSORS_OF_TILES:
            _edit(folder / name, lambda settings: _cut_into_tiles(settings, config, notes))
        elif image_aspect_ratio == "pad" and family in PADDED_FAMILIES:
            _edit(folder / name, lambda settings: _pad(settings, notes))
        elif image_aspect_ratio == "crop" and family in PADDED_FAMILIES:
            _edit(folder / name, _crop)
    return notes


def _tokenizer_settings(settings: dict, family: str, folder: Path) -> None:
    settings.pop("auto_map", None)  # it names code of the base model, which packages do not use
    if family in TOKENIZERS_TAKEN_AS_THEY_STAND and (folder / "tokenizer.json").is_file():
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    if settings.get("tokenizer_class") == "PreTrainedTokenizerFast":  # else it returns token types, which LLaVA refuses
        settings.setdefault("model_input_names", ["input_ids", "attention_mask"])


def _processor_settings(settings: dict, config, notes: list[str]) -> None:
    """Name the family's processor, and copy the settings that LLaVA's processors need from config.json."""
    vision, family = config.vision_config, config.model_type.removeprefix("shortv_")
    pixtral = vision.model_type == "pixtral"
    wanted = "PixtralProcessor" if pixtral else PROCESSOR_CLASSES[family]
    named = settings.get("processor_class")
    if named != wanted:
        if named is not None:
            notes.append(f"processor_config.json: named {named}, which is another family's; it gets {wanted}")
        settings["processor_class"] = wanted
    if pixtral or family not in LLAVA_FAMILIES:
        return
    needed = {"vision_feature_select_strategy": getattr(config, "vision_feature_select_strategy", "default")}
    if wanted == "LlavaOnevisionProcessor":
        needed["num_image_tokens"] = (vision.image_size // vision.patch_size) ** 2
        needed["vision_aspect_ratio"] = config.vision_aspect_ratio
    else:
        needed["patch_size"] = vision.patch_size
        needed["num_additional_image_tokens"] = int(vision.model_type.startswith("clip"))  # its class token
    for key, value in needed.items():
        if settings.get(key) is None:
            settings[key] = value
        elif settings[key] != value:
            notes.append(f"processor_config.json: {key} was {settings[key]!r}, by config.json it is {value!r}")
            settings[key] = value


def _find_image_token(processor, folder: Path, config) -> None:
    """Check that the processor's image token is the configuration's."""
    tokenizer, wanted = processor.tokenizer, config.image_token_id
    if tokenizer.convert_tokens_to_ids(processor.image_token) == wanted:
        return
    token = tokenizer.convert_ids_to_tokens(wanted) if wanted < len(tokenizer) else None
    if token is None:
        raise ShortVError(f"{folder}: its tokenizer has no token {wanted}, which stands for images by config.json")
    processor.image_token, processor.image_token_id = token, wanted
    _edit(folder / "processor_config.json", lambda settings: settings.update(image_token=token))


def _image_processor(settings: dict) -> tuple[dict, str]:
    """The image processor's settings, which transformers 5 stores in the processor's, and the name of its class."""
    settings = settings.get("image_processor", settings)
    return settings, settings.get("image_processor_type", settings.get("feature_extractor_type", ""))


def _cut_into_tiles(settings: dict, config, notes: list[str]) -> None:
    settings, kind = _image_processor(settings)
    wanted = IMAGE_PROCESSORS_OF_TILES[config.model_type.removeprefix("shortv_")]
    if kind and not kind.startswith(wanted.removesuffix("ImageProcessor")):
        settings |= {"image_processor_type": wanted, "image_grid_pinpoints": config.image_grid_pinpoints}
        notes.append(f"pictures: the settings named {kind}, which cuts no tiles; they get {wanted}")


def _pad(settings: dict, notes: list[str]) -> None:
    settings, kind = _image_processor(settings)
    if kind.startswith("CLIP") and settings.get("do_center_crop", True):
        settings |= {"image_processor_type": "LlavaImageProcessor", "do_pad": True}
        notes.append("pictures are padded to squares, as LLaVA-1.5's are; --image-aspect-ratio base crops them")


def _crop(settings: dict) -> None:
    settings = settings.get("image_processor", settings)
    kind = settings.get("image_processor_type", "")
    if kind.startswith("LlavaImageProcessor") and settings.get("do_center_crop", True):
        settings["do_pad"] = False


def _templates(processor, config) -> list[tuple[str, str]]:
    """Chat templates to try in place of the checkpoint's, with their names."""
    tokenizer, found = processor.tokenizer, []
    if isinstance(tokenizer.chat_template, str) and tokenizer.chat_template != processor.chat_template:
        found.append(("its tokenizer's", tokenizer.chat_template))
    name = format_of(config.text_config.model_type, tokenizer.get_vocab())
    return found + ([(f"LLaVA's {name}", FORMATS[name].replace("<image>", processor.image_token))] if name else [])


def read_template(spec: str) -> str:
    """The template with a name of FORMATS, or in a file (Jinja, or JSON as `chat_template.json`).

    Raises:
        ShortVError: if there is no such template.
    """
    if spec in FORMATS:
        return FORMATS[spec]
    path = Path(spec)
    if not path.is_file():
        raise ShortVError(f"--chat-template {spec}: no such file, and none of {_names()}")
    if path.suffix != ".json":
        return path.read_text(encoding="utf-8")
    template = read_json(path).get("chat_template")
    if not isinstance(template, str):
        raise ShortVError(f"{path}: has no text 'chat_template'")
    return template


def _write_template(folder: Path, template: str) -> None:
    (folder / "chat_template.json").unlink(missing_ok=True)
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    _edit(folder / "tokenizer_config.json", lambda settings: settings.pop("chat_template", None))


def _names() -> str:
    return ", ".join(FORMATS)
