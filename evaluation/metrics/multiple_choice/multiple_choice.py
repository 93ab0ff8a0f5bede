"""Multiple-choice accuracy: find the letter in the answer, plain and circular."""

import re
from string import ascii_uppercase

import datasets
import evaluate

_DESCRIPTION = """\
Accuracy on questions answered with an option's letter (ScienceQA, SEED-Bench, MMBench, MMStar). The letter is looked
for in this order, and an answer in which none of these finds exactly one is wrong:
  1. the whole answer is a letter: "B", "b", "B.", "(B)";
  2. the whole answer is the text of one option;
  3. the answer begins with a letter and a mark or the end of the line: "B. dog", "(B) dog", "B: dog";
  4. "answer", "option" or "choice", then "is" or ":" if anything, then a letter: "The answer is B", "答案是B";
  5. one letter alone stands in the answer: "It must be (B)"; an A or I before another word ("A dog") is no letter;
  6. the text of one option alone stands in the answer as whole words.
The first and third come from LLaVA's ScienceQA script (as does "The answer is"), the last two from MMBench's.
MMBench asks each question once for every rotation of its options: given the groups, circular_accuracy counts a
question as right only if it is right in all of them.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions: list of answers (str).
    references: list of the right options' letters (str).
    choices: optional, for each question the list of its options' texts; without it any letter counts, and no text.
    groups: optional, for each question a key that its rotations share (MMBench: index % 1000000).
Returns:
    accuracy: 0 to 1, over all predictions.
    answered: share of the predictions in which an option was found.
    circular_accuracy: 0 to 1, over the groups, if groups are given.
"""

_CITATION = """\
@inproceedings{liu2024mmbench,
  title = {{MMBench}: Is Your Multi-modal Model an All-around Player?},
  author = {Liu, Yuan and Duan, Haodong and Zhang, Yuanhan and Li, Bo and Zhang, Songyang and Zhao, Wangbo and
            Yuan, Yike and Wang, Jiaqi and He, Conghui and Liu, Ziwei and Chen, Kai and Lin, Dahua},
  booktitle = {European Conference on Computer Vision},
  year = {2024}
}
"""

WHOLE = re.compile(r"[(（]?([A-Za-z])[)）.:,。：，]*")
START = re.compile(r"[(（]?([A-Z])[)）.:：\n]")
PHRASE = re.compile(
    r"(?:(?i:answer|option|choice)(?i:\s+is)?|答案[是为]?|选项?)\s*[:：]?\s*[(（]?([A-Z])(?![A-Za-z'’])"
)
LETTER = re.compile(r"(?<![A-Za-z0-9'’])[A-Z](?![A-Za-z0-9'’])")
ARTICLE_OR_PRONOUN = re.compile(r"(?<!\S)[AI](?= +(?!(?:is|and|or)\b)\w)")


def simplify(text: str) -> str:
    return text.strip().rstrip(".。").strip().lower()


def contains(answer: str, option: str) -> bool:
    """Whether the option stands in the answer as whole words; scripts without spaces need no word ends."""
    return bool(option) and bool(re.search(rf"(?<![a-z0-9]){re.escape(option)}(?![a-z0-9])", answer))


def find_choice(answer: str, choices: list[str] | None = None) -> str | None:
    """The letter that the answer gives, or None. The rules are numbered in the metric's description."""
    answer = answer.strip()
    texts = dict(zip(ascii_uppercase, map(simplify, choices or [])))
    letters = texts or ascii_uppercase
    if (match := WHOLE.fullmatch(answer)) and match[1].upper() in letters:
        return match[1].upper()
    same = [letter for letter, text in texts.items() if text == simplify(answer)]
    if len(same) == 1:
        return same[0]
    for match in (START.match(answer), PHRASE.search(answer)):
        if match and match[1] in letters:
            return match[1]
    alone = {letter for letter in LETTER.findall(ARTICLE_OR_PRONOUN.sub("", answer)) if letter in letters}
    if len(alone) == 1:
        return alone.pop()
    inside = [letter for letter, text in texts.items() if contains(simplify(answer), text)]
    return inside[0] if len(inside) == 1 else None


class MultipleChoice(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
            reference_urls=[
                "https://github.com/haotian-liu/LLaVA/blob/main/llava/eval/eval_science_qa.py",
                "https://github.com/open-compass/MMBench",
            ],
        )

    def _compute(self, predictions, references, choices=None, groups=None):
        if not len(predictions):
            raise ValueError("there are no predictions to score")
        for name, values in (("choices", choices), ("groups", groups)):
            if values is not None and len(values) != len(predictions):
                raise ValueError(f"{len(values)} {name} for {len(predictions)} predictions")
        choices = [None] * len(predictions) if choices is None else choices
        for index, (letter, options) in enumerate(zip(references, choices)):
            known = ascii_uppercase if options is None else ascii_uppercase[: len(options)]
            if len(letter) != 1 or letter not in known:
                raise ValueError(f"references[{index}] is {letter!r}, not the letter of one of its options")
        found = [find_choice(answer, options) for answer, options in zip(predictions, choices)]
        right = [letter == answer for letter, answer in zip(references, found)]
        result = {
            "accuracy": sum(right) / len(right),
            "answered": sum(letter is not None for letter in found) / len(found),
        }
        if groups is not None:
            all_right = {}
            for group, is_right in zip(groups, right):
                all_right[group] = all_right.get(group, True) and is_right
            result["circular_accuracy"] = sum(all_right.values()) / len(all_right)
        return result
