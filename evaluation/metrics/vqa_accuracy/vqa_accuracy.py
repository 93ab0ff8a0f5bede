"""VQA accuracy: an answer counts by how many of ten people gave it, after the official normalisation."""

import re

import datasets
import evaluate

_DESCRIPTION = """\
VQA accuracy (VQAv2, OK-VQA, VizWiz, TextVQA). The ten human answers are left out one at a time; against the others an
answer scores min(matches / 3, 1), and the mean over these subsets is the question's accuracy. Fewer than four human
answers can therefore never give 1.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions: list of answers (str).
    references: for each prediction the list of human answers, ten as a rule, at least two.
    normalization: "vqa" (default), the rules of the VQA evaluation script, or "evalai", what LLaVA and Pythia do to
        TextVQA answers before those rules: commas and question marks go without leaving a space, and 's becomes a word.
    skip_unanimous: compare answers unnormalised where all human answers are equal, as the VQA script does (it keeps
        text read from the picture as it is). False by default, as the metric's web page has it: a "Yes." among ten
        "yes" is right.
Returns:
    accuracy: mean over the questions, 0 to 1.
"""

_CITATION = """\
@inproceedings{antol2015vqa,
  title = {{VQA}: Visual Question Answering},
  author = {Antol, Stanislaw and Agrawal, Aishwarya and Lu, Jiasen and Mitchell, Margaret and Batra, Dhruv and
            Zitnick, C. Lawrence and Parikh, Devi},
  booktitle = {International Conference on Computer Vision},
  year = {2015}
}
"""

NUMBERS = {"none": "0"} | {
    word: str(number) for number, word in enumerate("zero one two three four five six seven eight nine ten".split())
}
ARTICLES = {"a", "an", "the"}
# The official list without "I'm" and the like, because the text is lower-case when words are looked up.
CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're you've
""".split()
# Words that lack one apostrophe, with the word that replaces them. The official table has "somebody'd" reversed.
MISSING_APOSTROPHE = {
    word[:i] + word[i + 1 :]: word for word in CONTRACTIONS for i, character in enumerate(word) if character == "'"
} | {"somebody'd": "somebodyd"}
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
COMMA_IN_NUMBER = re.compile(r"\d,\d")
PERIOD = re.compile(r"\.(?!\d)")
MAX_PERIODS = 32  # the script passes re.UNICODE, which is 32, as the `count` of `sub`


def normalize_punctuation(text: str) -> str:
    """`processPunctuation` of the VQA script: a mark beside a space is removed, any other becomes a space. If the text
    has a number with a comma, all marks are removed. Periods are removed unless a digit follows. Apostrophes and colons
    are kept."""
    has_comma_number = COMMA_IN_NUMBER.search(text)
    result = text
    for mark in PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        result = result.replace(mark, "" if beside_space or has_comma_number else " ")
    return PERIOD.sub("", result, count=MAX_PERIODS)


def normalize_words(text: str) -> str:
    """`processDigitArticle` of the VQA script: lower case, numbers to ten as digits, no articles, then apostrophes."""
    words = (NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(MISSING_APOSTROPHE.get(word, word) for word in words if word not in ARTICLES)


def clean_whitespace(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def normalize(text: str, normalization: str = "vqa") -> str:
    if normalization == "evalai":  # `word_tokenize` of Pythia's EvalAIAnswerProcessor
        text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    return normalize_words(normalize_punctuation(clean_whitespace(text)))


def leave_one_out(prediction: str, answers: list[str]) -> float:
    """Mean of min(matches / 3, 1) over the subsets that leave out one answer."""
    matches = answers.count(prediction)
    return sum(min((matches - (answer == prediction)) / 3, 1) for answer in answers) / len(answers)


class VqaAccuracy(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {
                    "predictions": datasets.Value("string"),
                    "references": datasets.Sequence(datasets.Value("string")),
                }
            ),
            reference_urls=[
                "https://visualqa.org/evaluation.html",
                "https://github.com/GT-Vision-Lab/VQA/blob/master/PythonEvaluationTools/vqaEvaluation/vqaEval.py",
            ],
        )

    def _compute(self, predictions, references, normalization="vqa", skip_unanimous=False):
        if normalization not in ("vqa", "evalai"):
            raise ValueError(f'normalization must be "vqa" or "evalai", not {normalization!r}')
        if not len(predictions):
            raise ValueError("there are no predictions to score")
        scores = []
        for index, (prediction, answers) in enumerate(zip(predictions, references)):
            if len(answers) < 2:
                raise ValueError(
                    f"references[{index}] holds {len(answers)} answers; leaving one out needs at least two"
                )
            prediction, *answers = map(clean_whitespace, [prediction, *answers])
            if len(set(answers)) > 1 or not skip_unanimous:
                prediction, *answers = (normalize(text, normalization) for text in [prediction, *answers])
            scores.append(leave_one_out(prediction, answers))
        return {"accuracy": sum(scores) / len(scores)}
