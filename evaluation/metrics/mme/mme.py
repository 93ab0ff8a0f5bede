"""MME: fourteen yes-or-no tasks, two questions an image."""

from collections import defaultdict

import datasets
import evaluate

_DESCRIPTION = """\
MME score. Every image has two questions, one with the answer yes and one with no. A task's score is its accuracy over
the questions plus its accuracy+ over the images (both questions right), each in per cent, so 200 at most; perception
is the sum over ten tasks (2000 at most) and cognition over four (800 at most). As in the official calculation, a
lower-cased answer is a yes if its first four characters hold "yes", else a no if they hold "no", else neither.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions: list of answers (str).
    references: list of "yes" or "no".
    tasks: for each question the name of its task, such as "existence" or "OCR".
    images: for each question the name of its image; within a task every image has two questions.
Returns:
    perception, cognition: sums of the scores of those of their tasks that are given.
    tasks: for each task given its accuracy, accuracy_plus (both 0 to 100) and score (their sum).
"""

_CITATION = """\
@article{fu2023mme,
  title = {{MME}: A Comprehensive Evaluation Benchmark for Multimodal Large Language Models},
  author = {Fu, Chaoyou and Chen, Peixian and Shen, Yunhang and Qin, Yulei and Zhang, Mengdan and Lin, Xu and
            Yang, Jinrui and Zheng, Xiawu and Li, Ke and Sun, Xing and Wu, Yunsheng and Ji, Rongrong},
  journal = {arXiv preprint arXiv:2306.13394},
  year = {2023}
}
"""

PERCEPTION = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
)  # fmt: skip
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")


def parse(answer: str) -> str:
    start = answer.lower()[:4]
    return "yes" if "yes" in start else "no" if "no" in start else "other"


class Mme(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {name: datasets.Value("string") for name in ("predictions", "references", "tasks", "images")}
            ),
            reference_urls=["https://github.com/BradyFU/Awesome-Multimodal-Large-Language-Models/tree/Evaluation"],
        )

    def _compute(self, predictions, references, tasks, images):
        if not len(predictions):
            raise ValueError("there are no predictions to score")
        right = defaultdict(lambda: defaultdict(list))  # task -> image -> whether each of its two answers is right
        for index, (prediction, label, task, image) in enumerate(zip(predictions, references, tasks, images)):
            label = label.strip().lower()
            if label not in ("yes", "no"):
                raise ValueError(f'references[{index}] is {label!r}, neither "yes" nor "no"')
            if task not in PERCEPTION + COGNITION:
                raise ValueError(f"tasks[{index}] is {task!r}, not one of {', '.join(PERCEPTION + COGNITION)}")
            right[task][image].append(parse(prediction) == label)
        result = {}
        for task, pairs in right.items():
            for image, pair in pairs.items():
                if len(pair) != 2:
                    raise ValueError(f"image {image!r} of task {task!r} has {len(pair)} questions instead of two")
            accuracy = 100 * (sum(map(sum, pairs.values())) / (2 * len(pairs)))
            accuracy_plus = 100 * (sum(map(all, pairs.values())) / len(pairs))
            result[task] = {
                "accuracy": accuracy,
                "accuracy_plus": accuracy_plus,
                "score": accuracy + accuracy_plus,
            }
        return {
            "perception": sum((result[task]["score"] for task in PERCEPTION if task in result), 0.0),
            "cognition": sum((result[task]["score"] for task in COGNITION if task in result), 0.0),
            "tasks": result,
        }
