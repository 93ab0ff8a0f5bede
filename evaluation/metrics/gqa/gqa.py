"""GQA accuracy: exact match of the answer without trailing periods, lower-case."""

import datasets
import evaluate

_DESCRIPTION = """\
GQA accuracy: the share of questions whose answer equals the reference. GQA's own script compares strings as they are;
LLaVA takes trailing periods off the prediction and lower-cases it first, as is done here. References are lower-cased,
as GQA's are.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions: list of answers (str).
    references: list of right answers (str).
Returns:
    accuracy: 0 to 1.
"""

_CITATION = """\
@inproceedings{hudson2019gqa,
  title = {{GQA}: A New Dataset for Real-World Visual Reasoning and Compositional Question Answering},
  author = {Hudson, Drew A. and Manning, Christopher D.},
  booktitle = {Conference on Computer Vision and Pattern Recognition},
  year = {2019}
}
"""


class Gqa(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
            reference_urls=[
                "https://cs.stanford.edu/people/dorarad/gqa/evaluate.html",
                "https://github.com/haotian-liu/LLaVA/blob/main/scripts/convert_gqa_for_eval.py",
            ],
        )

    def _compute(self, predictions, references):
        if not len(predictions):
            raise ValueError("there are no predictions to score")
        pairs = zip(predictions, references)
        right = [prediction.rstrip(".").lower() == answer.lower() for prediction, answer in pairs]
        return {"accuracy": sum(right) / len(right)}
