"""CIDEr: how alike a caption is to those that people wrote for the picture."""

import importlib.util
import math
import re
import shutil
from collections import Counter

import datasets
import evaluate

_DESCRIPTION = """\
CIDEr-D, as pycocoevalcap's Cider computes it: tf-idf vectors of 1- to 4-grams, document frequencies over the
references given, clipped cosine similarity with a Gaussian penalty on the difference in length, times ten. The score
depends on the whole set of references, and on a single picture it is 0, for no n-gram is then rarer than another.
Captions are tokenised by the Penn Treebank's rules, without punctuation. The official tokeniser is a Java program in
pycocoevalcap; where Java or that package is missing, a regular expression stands in. It gives the same tokens for
ordinary captions and differs in rare things, such as y'all, web addresses, emoji, other currencies than the dollar and
abbreviations other than the common ones.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions: list of captions (str).
    references: for each prediction the list of people's captions for that picture.
    tokenizer: "ptb" (pycocoevalcap and Java), "python", or None (default): the first if it can run, else the second.
Returns:
    cider: mean over the pictures, 0 to 10; papers print it times 100.
    tokenizer: the tokeniser that was used.
"""

_CITATION = """\
@inproceedings{vedantam2015cider,
  title = {{CIDEr}: Consensus-based Image Description Evaluation},
  author = {Vedantam, Ramakrishna and Zitnick, C. Lawrence and Parikh, Devi},
  booktitle = {Conference on Computer Vision and Pattern Recognition},
  year = {2015}
}
"""

# Our own implementation, because pycocoevalcap ships large Java programs; tests compare with it.
MAX_NGRAM = 4
SIGMA = 6.0

QUOTES = str.maketrans("‘’“”", "''\"\"")
SPLITS = (  # in the Penn Treebank these are two words
    (re.compile(r"(?<=\w)(n't|'(?:s|m|d|ll|re|ve))(?!\w)"), r" \1"),
    (re.compile(r"\b(can)(not)\b|\b(gon|wan)(na)\b|\b(got)(ta)\b|\b(gim|lem)(me)\b"), r"\1\3\5\7 \2\4\6\8"),
    (re.compile(r"'(t)(is|was)\b"), r"'\1 \2"),
)
TOKEN = re.compile(
    r"""
      (?:[a-z]\.)+(?!\w)                                            # u.s., a.m., initials
    | (?:mrs?|ms|dr|st|jr|sr|vs|ft|ave|etc)\. | no\.(?=\s*\d)       # common abbreviations
    | n't | '(?:s|m|d|ll|re|ve|n'|em|til|cause)(?!\w) | '\d\ds?\b  # what SPLITS cut off, 'n', '90s
    | 't(?=\ (?:is|was)\b)
    | (?:[-+](?=\d))? \w+ (?: (?:[-./&@] | (?<=\d)[,:](?=\d) | (?<=[a-z])'(?=[a-z])) \w+ )*
    | [?!]+ | [^\w\s]
    """,
    re.VERBOSE,
)
BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
PUNCTUATION = set("'\"`.?!,:-;–—…")  # pycocoevalcap drops these; it keeps "?!" and lower-case bracket names


def tokenize(caption: str) -> list[str]:
    """Penn Treebank tokens of an ordinary caption, lower-case, without punctuation."""
    caption = caption.lower().translate(QUOTES)
    for pattern, replacement in SPLITS:
        caption = pattern.sub(replacement, caption)
    return [BRACKETS.get(token, token) for token in TOKEN.findall(caption) if token not in PUNCTUATION]


def default_tokenizer() -> str:
    return "ptb" if has_ptb() else "python"


def has_ptb() -> bool:
    return shutil.which("java") is not None and importlib.util.find_spec("pycocoevalcap") is not None


def tokenize_ptb(captions: list[str]) -> list[list[str]]:
    """As [`tokenize`], by pycocoevalcap's Java program, in one run for all captions."""
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    # The program answers line by line, so a caption has to be one line, and not an empty one.
    lines = [" ".join(caption.split()) or "." for caption in captions]
    tokens = PTBTokenizer().tokenize({i: [{"caption": line}] for i, line in enumerate(lines)})
    return [tokens[i][0].split() for i in range(len(lines))]


def ngrams(tokens: list[str]) -> Counter:
    return Counter(tuple(tokens[i : i + n]) for n in range(1, MAX_NGRAM + 1) for i in range(len(tokens) - n + 1))


def length(grams: Counter) -> int:
    """The number of bigrams, which the official scorer uses as a caption's length."""
    return sum(count for gram, count in grams.items() if len(gram) == 2)


def similarity(caption: Counter, reference: Counter, idf) -> float:
    """Mean over n of the clipped cosine similarity of the tf-idf vectors, with the penalty on length."""
    total = 0.0
    for n in range(1, MAX_NGRAM + 1):
        ours, theirs = (
            {gram: count * idf(gram) for gram, count in grams.items() if len(gram) == n}
            for grams in (caption, reference)
        )
        norm = math.hypot(*ours.values()) * math.hypot(*theirs.values())
        dot = sum(min(weight, theirs.get(gram, 0.0)) * theirs.get(gram, 0.0) for gram, weight in ours.items())
        total += dot / norm if norm else 0.0
    difference = length(caption) - length(reference)
    return total / MAX_NGRAM * math.exp(-(difference**2) / (2 * SIGMA**2))


def picture_scores(predictions, references, tokenizer: str | None = None) -> list[float]:
    """Each picture's score, 0 to 10, with the document frequencies of all pictures. Arguments as for the metric."""
    captions = [*predictions, *(caption for group in references for caption in group)]
    official = (tokenizer or default_tokenizer()) == "ptb"
    tokens = iter(tokenize_ptb(captions) if official else map(tokenize, captions))
    ours = [ngrams(next(tokens)) for _ in predictions]
    theirs = [[ngrams(next(tokens)) for _ in group] for group in references]
    pictures_with = Counter(gram for group in theirs for gram in set().union(*group))

    def idf(gram):
        return math.log(len(theirs) / max(pictures_with[gram], 1))

    return [
        10 * sum(similarity(caption, reference, idf) for reference in group) / len(group)
        for caption, group in zip(ours, theirs)
    ]


class Cider(evaluate.Metric):
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
            reference_urls=["https://github.com/salaniz/pycocoevalcap"],
        )

    def _compute(self, predictions, references, tokenizer=None):
        if not len(predictions):
            raise ValueError("there are no predictions to score")
        for index, captions in enumerate(references):
            if not len(captions):
                raise ValueError(f"references[{index}] holds no caption")
        tokenizer = tokenizer or default_tokenizer()
        if tokenizer not in ("ptb", "python"):
            raise ValueError(f'tokenizer must be "ptb" or "python", not {tokenizer!r}')
        if tokenizer == "ptb" and not has_ptb():
            raise ValueError('the "ptb" tokenizer needs Java and pycocoevalcap (pip install pycocoevalcap)')

        scores = picture_scores(predictions, references, tokenizer)
        return {"cider": sum(scores) / len(scores), "tokenizer": tokenizer}
