"""Answer files in LLaVA's format. Answers are appended as they come; an interruption does not damage the file."""

import json
import uuid
from collections.abc import Sequence
from pathlib import Path

from shortv_llava.errors import ShortVError
from shortv_llava.evaluation.questions import Question
from shortv_llava.files.json_lines import add_to_record, read_record
from shortv_llava.files.outputs import replacing_file


class AnswersFile:
    """Answers by question id, a JSON object a line, as LLaVA's scoring scripts read them.

    Args:
        path: the file; answers of an interrupted run are kept.
        model_id: name of the model.
        metadata: settings that the answers depend on; saved with each answer.

    Raises:
        ShortVError: if the file holds answers of another model, with other settings or to other questions.
    """

    def __init__(self, path: Path, model_id: str, metadata: dict, questions: Sequence[Question]):
        self.path, self.model_id, self.metadata = path, model_id, json.loads(json.dumps(metadata))
        self.questions = {question.id: question for question in questions}
        self.ids: dict[tuple, list[int | str]] = {}  # question ids by a line's id and prompt
        for question in questions:
            line = self._line(question, "")
            self.ids.setdefault((line["question_id"], line["prompt"]), []).append(question.id)
        self.lines: dict[int | str, dict] = {}
        for number, entry in read_record(path):
            self.lines[self._id(entry, f"{path}, line {number}")] = entry

    def _id(self, entry: dict, where: str) -> int | str:
        """The id of the question that a line of the file answers."""
        metadata = entry.get("metadata")
        found = {"model_id": entry.get("model_id")} | (metadata if isinstance(metadata, dict) else {})
        expected = {"model_id": self.model_id} | self.metadata
        for key in expected | found:
            if found.get(key) != expected.get(key):
                raise ShortVError(
                    f"{where}: an answer with {key} {found.get(key)!r}, not {expected.get(key)!r}; repeat that "
                    "command, or give another --output"
                )
        ids = self.ids.get((entry.get("question_id"), entry.get("prompt")))
        if ids is None or not isinstance(entry.get("text"), str):
            raise ShortVError(f"{where}: no answer to one of these questions; give another --output")
        id = next((id for id in ids if id not in self.lines), None)
        if id is None:
            raise ShortVError(f"{where}: a second answer to question {entry['question_id']!r}; remove it, or the file")
        return id

    @property
    def answers(self) -> dict[int | str, str]:
        """Answers by question id, for all questions answered so far, in the order of the questions."""
        return {id: self.lines[id]["text"] for id in self.questions if id in self.lines}

    def add(self, questions: Sequence[Question], answers: Sequence[str], write: bool = True) -> None:
        """Add answers to questions not answered yet; with `write`, set in one process only, append them to the file."""
        new = {q.id: self._line(q, answer) for q, answer in zip(questions, answers) if q.id not in self.lines}
        self.lines |= new
        if write:
            add_to_record(self.path, new.values())

    def _line(self, question: Question, answer: str) -> dict:
        return {
            "question_id": question.details.get("question_id", question.id),
            "prompt": question.details.get("prompt", question.text),
            "text": answer,
            "answer_id": uuid.uuid5(uuid.NAMESPACE_URL, f"{self.model_id}/{question.id}").hex,
            "model_id": self.model_id,
            "metadata": self.metadata,
        }

    def finish(self) -> None:
        """Sort the lines into the order of the questions; they were answered in another order."""
        with replacing_file(self.path) as unfinished, open(unfinished, "w", encoding="utf-8") as file:
            for id in self.questions:
                file.write(json.dumps(self.lines[id], ensure_ascii=False) + "\n")
