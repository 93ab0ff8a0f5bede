"""Multiple-choice accuracy by the rule of a benchmark's own script, plain and circular, and by a lenient one."""

import re
from string import ascii_uppercase

import datasets
import evaluate

_DESCRIPTION = """\
Accuracy on questions answered with an option's letter. Which answers give a letter is a benchmark's rule:
  letter     SEED-Bench, as LLaVA scores it: the answer is the bare letter, so "D." is wrong.
  scienceqa  ScienceQA, as LLaVA scores it: the answer is the bare letter, begins with the letter, a period and a space,
             or says "The answer is B." once. Letters end at E.
  mmbench    MMBench and Q-Bench, as VLMEvalKit scores both without asking another model: marks taken for spaces, one
             option's letter alone is a word of the answer, and among its last four; else "answer is B" stands in it;
             else the text of one option alone does, in an answer of at most twice the length of all options' texts. A
             lone Z means none of the options. (VLMEvalKit knows some refusals of paid services as well.)
  lenient    no benchmark's rule. The letter is looked for in this order, and an answer in which none of these finds
             exactly one is wrong:
        1. the whole answer is a letter: "B", "b", "B.", "(B)";
        2. the whole answer is the text of one option;
        3. the answer begins with a letter and a mark or the end of the line: "B. dog", "(B) dog", "B: dog";
        4. "answer", "option" or "choice", then "is" or ":" if anything, then a letter: "The answer is B", "答案是B";
        5. one letter alone stands in the answer: "It must be (B)"; an A or I before another word ("A dog") is none;
        6. the text of one option alone stands in the answer as whole words.
MMBench asks each question once for every rotation of its options: given the groups, circular_accuracy counts a
question as right only if it is right in all of them.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions: list of answers (str).
    references: list of the right options' letters (str).
    choices: optional, for each question the list of its options' texts, None for an option that is missing; without
        it any letter counts, and no text.
    groups: optional, for each question a key that its rotations share (MMBench: index % 1000000).
    rule: "lenient" (default), "letter", "scienceqa" or "mmbench".
Returns:
    accuracy: 0 to 1, over all predictions.
    answered: share of the predictions in which an option was found.
    circular_accuracy: 0 to 1, over the groups, if groups are given.
    lenient_accuracy, lenient_answered, lenient_circular_accuracy: the same by the lenient rule, beside another one.
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
SCIENCEQA_LETTERS = "ABCDE"
SCIENCEQA_SAID = re.compile(r"The answer is ([A-Z]).")  # then any character, as in LLaVA's script
MMBENCH_MARKS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
MMBENCH_SAID = re.compile(r"answer\s+is\s+\**([A-D])", re.IGNORECASE)  # or a word's first letter, as in VLMEvalKit
ARTICLE_OR_PRONOUN = re.compile(r"(?<!\S)[AI](?= +(?!(?:is|and|or)\b)\w)")


def simplify(text: str) -> str:
    return text.strip().rstrip(".。").strip().lower()


def contains(answer: str, option: str) -> bool:
    """Whether the answer contains the option as whole words; in scripts without spaces, as any substring."""
    return bool(option) and bool(re.search(rf"(?<![a-z0-9]){re.escape(option)}(?![a-z0-9])", answer))


def options(choices: list[str | None] | None) -> dict[str, str]:
    """The texts of the options that are not missing, by letter."""
    return {letter: text for letter, text in zip(ascii_uppercase, choices or ()) if text is not None}


def find_letter(answer: str, choices: list[str | None] | None = None) -> str | None:
    return answer if answer in (options(choices) or list(ascii_uppercase)) else None


def find_scienceqa(answer: str, choices: list[str | None] | None = None) -> str | None:
    if answer[:1] in list(SCIENCEQA_LETTERS) and (len(answer) == 1 or answer[1:3] == ". "):
        letter = answer[0]
    else:
        said = SCIENCEQA_SAID.findall(answer)
        letter = said[0] if len(said) == 1 else None
    return letter if letter in [known for known in options(choices) or ascii_uppercase if known <= "E"] else None


def find_mmbench(answer: str, choices: list[str | None] | None = None) -> str | None:
    texts = options(choices)
    letters, words = texts or ascii_uppercase, answer.translate(MMBENCH_MARKS).split()
    named = [letter for letter in letters if letter in words]
    if len(named) == 1 and words.index(named[0]) >= len(words) - 4:
        return named[0]
    if not named and "Z" in words:
        return None
    said = MMBENCH_SAID.search(answer)
    if said and said[1].upper() in letters:
        return said[1].upper()
    answer = answer.lower()
    if len(answer) > 2 * sum(map(len, texts.values())):
        return None
    inside = [letter for letter, text in texts.items() if text.lower() in answer]
    return inside[0] if len(inside) == 1 else None


def find_choice(answer: str, choices: list[str | None] | None = None) -> str | None:
    """The lenient rule; its steps are numbered in the metric's description."""
    answer = answer.strip()
    texts = {letter: simplify(text) for letter, text in options(choices).items()}
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


RULES = {"lenient": find_choice, "letter": find_letter, "scienceqa": find_scienceqa, "mmbench": find_mmbench}


def scores(found: list[str | None], references: list[str], groups: list | None) -> dict[str, float]:
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
                "https://github.com/haotian-liu/LLaVA/blob/main/scripts/convert_seed_for_submission.py",
                "https://github.com/open-compass/VLMEvalKit/blob/main/vlmeval/utils/matching_util.py",
            ],
        )

    def _compute(self, predictions, references, choices=None, groups=None, rule="lenient"):
        if rule not in RULES:
            raise ValueError(f"rule must be one of {', '.join(RULES)}, not {rule!r}")
        if not len(predictions):
            raise ValueError("there are no predictions to score")
        for name, values in (("choices", choices), ("groups", groups)):
            if values is not None and len(values) != len(predictions):
                raise ValueError(f"{len(values)} {name} for {len(predictions)} predictions")
        choices = [None] * len(predictions) if choices is None else choices
        for index, (letter, texts) in enumerate(zip(references, choices)):
            known = ascii_uppercase if texts is None else ascii_uppercase[: len(texts)]
            if len(letter) != 1 or letter not in known:
                raise ValueError(f"references[{index}] is {letter!r}, not the letter of one of its options")

        def by(find):
            found = [find(answer, texts) for answer, texts in zip(predictions, choices)]
            return scores(found, references, groups)

        beside = {} if rule == "lenient" else {f"lenient_{name}": value for name, value in by(find_choice).items()}
        return by(RULES[rule]) | beside
