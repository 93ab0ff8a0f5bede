"""POPE: does the model see objects that are not there?"""

import datasets
import evaluate

_DESCRIPTION = """\
POPE asks whether an object is in the picture, and "yes" is the positive class. The answer is read as LLaVA's eval_pope
reads it: of the text before the first period, without commas, one of the words "No", "no" or "not" makes a no;
everything else, an empty answer too, is a yes.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions: list of answers (str).
    references: list of "yes" or "no".
    categories: optional, for each question its category, such as "random", "popular" or "adversarial".
Returns:
    accuracy, precision, recall, f1, yes_ratio: 0 to 1, over all questions; a ratio with nothing below it is 0.
    categories: the same five numbers for each category, if categories are given.
    mean_f1: of the categories' F1, the figure that papers compare, if categories are given.
"""

_CITATION = """\
@inproceedings{li2023pope,
  title = {Evaluating Object Hallucination in Large Vision-Language Models},
  author = {Li, Yifan and Du, Yifan and Zhou, Kun and Wang, Jinpeng and Zhao, Wayne Xin and Wen, Ji-Rong},
  booktitle = {Conference on Empirical Methods in Natural Language Processing},
  year = {2023}
}
"""


def says_yes(answer: str) -> bool:
    words = answer.split(".")[0].replace(",", "").split(" ")
    return not {"No", "no", "not"} & set(words)


def is_yes(label: str, index: int) -> bool:
    if label.strip().lower() not in ("yes", "no"):
        raise ValueError(f'references[{index}] is {label!r}, neither "yes" nor "no"')
    return label.strip().lower() == "yes"


def ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def scores(pairs: list[tuple[bool, bool]]) -> dict[str, float]:
    """The five numbers for (said yes, is yes) pairs."""
    true_positives = sum(said and true for said, true in pairs)
    said_yes, are_yes = sum(said for said, _ in pairs), sum(true for _, true in pairs)
    precision, recall = ratio(true_positives, said_yes), ratio(true_positives, are_yes)
    return {
        "accuracy": sum(said == true for said, true in pairs) / len(pairs),
        "precision": precision,
        "recall": recall,
        "f1": ratio(2 * precision * recall, precision + recall),
        "yes_ratio": said_yes / len(pairs),
    }


class Pope(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
            reference_urls=["https://github.com/haotian-liu/LLaVA/blob/main/llava/eval/eval_pope.py"],
        )

    def _compute(self, predictions, references, categories=None):
        if not len(predictions):
            raise ValueError("there are no predictions to score")
        pairs = [
            (says_yes(answer), is_yes(label, index))
            for index, (answer, label) in enumerate(zip(predictions, references))
        ]
        result = scores(pairs)
        if categories is not None:
            if len(categories) != len(pairs):
                raise ValueError(f"{len(categories)} categories for {len(pairs)} predictions")
            result["categories"] = {
                name: scores([pair for pair, category in zip(pairs, categories) if category == name])
                for name in dict.fromkeys(categories)
            }
            result["mean_f1"] = sum(each["f1"] for each in result["categories"].values()) / len(result["categories"])
        return result
