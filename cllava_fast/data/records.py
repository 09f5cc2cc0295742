"""From one record of a file, whatever its form, to a Sample."""

from __future__ import annotations

import functools
import math
import os
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from cllava_fast.data.images import ImageFolder, StoredImage
from cllava_fast.data.stream import ImageSource, Sample, check_texts
from cllava_fast.names import brief, check_names, nearest

IMAGE = "<image>"  # how LLaVA's files mark where the image stands
USERS, ASSISTANTS = ("human", "user"), ("gpt", "assistant")
QUESTIONS = ("instruction", "question", "text")
ANSWERS = ("answer", "answers", "references", "answer_bbox")  # the last one in CoIN's grounding
IDS = ("id", "question_id")
COLUMNS = ("conversations", *QUESTIONS, *ANSWERS, "image", *IDS, "history", "system")
# what a record may lack, so that nobody would notice that it was misspelt
SPELLED = ("conversations", "references", "answers", "history", "system")
NOT_IMAGE = ("images", "image_path", "image_paths", "image_file", "img", "img_path")  # others' names of an image
CHOICES = ("choices", "options")  # of multiple choice
VIDEOS = ("video", "videos", "video_path", "video_paths")


@dataclass
class RecordReader:
    """What the records of one source have in common.

    Args:
        source: what errors call it.
        images: the folder of the images; None where records bring none as paths.
        prompt: what is asked, with ``{question}`` where the record's own question stands.
        columns: our names to the source's.
    """

    source: str
    images: ImageFolder | None = None
    prompt: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    unseen: set[str] = field(init=False)  # names of columns that no record had so far

    def __post_init__(self) -> None:
        check_names(self.columns, COLUMNS, f"{self.source}: columns.")
        self.unseen = set(self.columns.values())
        if self.prompt is not None and (self.prompt.strip().startswith(IMAGE) or self.prompt.strip().endswith(IMAGE)):
            raise ValueError(
                f"{self.source}: prompt is {brief(self.prompt)}; leave {IMAGE} out, the chat template puts the image in"
            )
        if self.prompt is not None and "{question}" not in self.prompt:
            raise ValueError(
                f"{self.source}: prompt is {brief(self.prompt)}; expected a text with {{question}} in it, such as "
                "'{question}\\nAnswer the question using a single word or phrase.'"
            )

    def check_columns(self, known: Collection[str] = ()) -> None:
        """Raises ValueError where ``columns`` names what is not among ``known`` and was in no record."""
        self.unseen.difference_update(known)
        for ours, name in self.columns.items():
            if name in self.unseen:
                hint = nearest(name, known) if known else "check how it is spelled, or leave it out"
                raise ValueError(f"{self.source}: columns={{{ours!r}: {brief(name)}}} names what no record has; {hint}")

    def where(self, record: Any, place: str) -> str:
        name = self._first(record, IDS) if isinstance(record, Mapping) else None
        return f"{self.source}: {place}" + ("" if name is None else f" (id {brief(name)})")

    def sample(self, record: Any, place: str) -> Sample:
        """The sample of a record; ``place`` is its number, for errors and where it has no id.

        Raises:
            ValueError: it is in none of the forms that are known, and what was expected.
        """
        where = self.where(record, place)
        if not isinstance(record, Mapping):
            raise ValueError(f"{where} is {brief(record)}; expected an object with a question and an answer")
        if self.unseen:
            self.unseen.difference_update(record)
        image = self._image(record, where)
        self._check_spelling(record, where)
        turns, accepted = self._get(record, "conversations"), self._answers(record, where)
        if "conversations" not in self.columns and any(name in self.columns for name in QUESTIONS):
            turns = None if self._first(record, QUESTIONS) is not None else turns
        if turns is not None:
            said = _conversation(turns, where, image is not None)
            self._check_asked(record, [*(asked for asked, _ in said["history"]), said["instruction"]], where)
            self._check_learned(record, said["answer"], where)
            if not _is_empty(history := self._get(record, "history")):
                raise ValueError(f"{where}: history is {brief(history)}; expected earlier turns in conversations alone")
            if (system := self._system(record, where)) and said["system"] not in ("", system):
                raise ValueError(
                    f"{where}: system is {brief(system)}, and the system turn {brief(said['system'])}; expected one of "
                    "them"
                )
            said["system"] = said["system"] or system
        else:
            said = self._question_and_answer(record, accepted, where, image is not None)
        if accepted and accepted != [said["answer"]]:
            said["references"] = tuple(accepted)
        name = self._first(record, IDS)
        if isinstance(name, bool) or not isinstance(name, (str, int, float, type(None))):
            raise ValueError(f"{where}: the id is {brief(name)}; expected a text or a number")
        if self.prompt is not None:
            said["instruction"] = self.prompt.replace("{question}", said["instruction"])
        sample = Sample(image=image, id=f"{Path(self.source).stem}: {place}" if name is None else str(name), **said)
        check_texts(sample, where)
        return sample

    def _question_and_answer(
        self, record: Mapping[str, Any], answers: list[str], where: str, image: bool
    ) -> dict[str, Any]:
        question = self._first(record, QUESTIONS)
        if question is None or not answers:
            missing, names = ("question", QUESTIONS) if question is None else ("answer", ANSWERS)
            known = [self.columns.get(name, name) for name in self._looked_for(names)]
            raise ValueError(
                f"{where} has no {missing}; it has {', '.join(map(brief, list(record)[:8])) or 'nothing'}, expected "
                f"'conversations' or one of {', '.join(known)} (columns={{{missing!r}: its name}} for another name)"
            )
        choices, given = self._first(record, CHOICES), self._get(record, "answer")
        if isinstance(choices, (list, tuple)) and type(given) is int:
            raise ValueError(
                f"{where}: answer is {given}, a place in {brief(choices)}, which no prompt shows; expected the "
                "choices in the question, and the text or the letter of the right one as answer"
            )
        learned = self._learned(record, where) or answers
        answer = Counter(learned).most_common(1)[0][0]
        history = self._get(record, "history") or ()
        if not isinstance(history, (list, tuple)) or any(not _is_pair(turn) for turn in history):
            raise ValueError(f"{where}: history is {brief(history)}; expected pairs of texts, (user, assistant)")
        return {
            "instruction": _without_mark(question, where, image, first=not history),
            "answer": answer,
            "history": tuple(
                (_without_mark(user, where, image, first=number == 0), reply)
                for number, (user, reply) in enumerate(history)
            ),
            "system": self._system(record, where),
        }

    def _system(self, record: Mapping[str, Any], where: str) -> str:
        system = self._get(record, "system") or ""
        if not isinstance(system, str):
            raise ValueError(f"{where}: system is {brief(system)}; expected a text")
        return system.strip()

    def _check_asked(self, record: Mapping[str, Any], turns: Sequence[str], where: str) -> None:
        """Raises ValueError where a question beside a conversation, which is what is read, is in none of its turns."""
        if any(name in self.columns for name in ("conversations", *QUESTIONS)):
            return  # which says what is read
        for name in ("question", "instruction"):  # a text may be anything
            question = self._get(record, name)
            asked = isinstance(question, str) and any(_words(question) in _words(turn) for turn in turns)
            if not _is_empty(question) and not asked:
                raise ValueError(
                    f"{where}: {name} is {brief(question)}, and the last human turn of conversations "
                    f"{brief(turns[-1])}; expected one of its turns, or one of the two: columns={{'conversations': "
                    f"'conversations'}} or columns={{{name!r}: {name!r}}} says which"
                )

    def _check_learned(self, record: Mapping[str, Any], learned: str, where: str) -> None:
        """Raises ValueError where an ``answer`` beside a conversation is not the one that its last turn has learned."""
        answers = self._learned(record, where)
        if answers and learned not in map(str.strip, answers):
            given = brief(self._get(record, "answer"))
            raise ValueError(
                f"{where}: answer is {given}, and the last gpt turn, which is learned, is {brief(learned)}; "
                "expected the same: call it 'references' if it is what evaluation accepts, or leave it out"
            )

    def _check_spelling(self, record: Mapping[str, Any], where: str) -> None:
        """Raises ValueError where a record would be read without what it has under a misspelt name."""
        for given, value in record.items():
            name = _meant(given)
            if name is None or given in self.columns.values() or name in self.columns or _is_empty(_given(value)):
                continue
            if isinstance(value, (bool, int, float)):
                continue  # a count of them, say
            if _is_empty(self._get(record, name)):
                raise ValueError(
                    f"{where} has {given!r} and no {name}; read it by columns={{{name!r}: {given!r}}}, or remove it"
                )

    def _answers(self, record: Mapping[str, Any], where: str) -> list[str]:
        """All accepted answers."""
        names = self._looked_for(("references", "answers", "answer", "answer_bbox"))
        return next((texts for name in names if (texts := self._texts(record, name, where))), [])

    def _learned(self, record: Mapping[str, Any], where: str) -> list[str]:
        return self._texts(record, "answer", where) if "answer" in self._looked_for(ANSWERS) else []

    def _texts(self, record: Mapping[str, Any], name: str, where: str) -> list[str]:
        """Answers under one name; those of VQA's annotators are objects with an ``answer``."""
        value = self._get(record, name)
        if value in (None, [], ()):
            return []
        values = value if isinstance(value, (list, tuple)) else [value]
        values = [entry.get("answer") if isinstance(entry, Mapping) else entry for entry in values]
        if not all(_is_answer(entry) for entry in values):
            raise ValueError(f"{where}: {name} is {brief(value)}; expected a text or a list of texts")
        if name == "answer_bbox" and not all(isinstance(entry, str) for entry in values):
            if len(values) != 4 or any(isinstance(entry, str) for entry in values):
                raise ValueError(f"{where}: {name} is {brief(value)}; expected a text or a box of four numbers")
            return [f"[{', '.join(map(str, values))}]"]
        # 3.0 is what pandas makes of 3 in a column where another row lacks it
        return [str(int(entry) if isinstance(entry, float) and entry.is_integer() else entry) for entry in values]

    def _image(self, record: Mapping[str, Any], where: str) -> ImageSource | None:
        image = self._get(record, "image")
        if isinstance(image, (list, tuple)):
            if len(image) > 1:
                raise ValueError(f"{where} names {len(image)} images; expected at most one for each sample")
            image = image[0] if image else None
        if image is None or image == "":
            other = next((name for name in record if _means_image(name) and not _is_empty(_given(record[name]))), None)
            video = next((name for name in VIDEOS if not _is_empty(_given(record.get(name)))), None)
            if video is not None:
                raise ValueError(f"{where} has {video!r} and no image; streams hold images, not videos")
            if other is not None and "image" not in self.columns:
                raise ValueError(
                    f"{where} has {other!r} and no image; read it by columns={{'image': {other!r}}}, or remove it"
                )
            return None
        if isinstance(image, (Image.Image, StoredImage)):
            return image
        if self.images is None:
            raise ValueError(f"{where}: image is {brief(image)}, and no image folder is known; give images")
        return self.images.path(image, where)

    def _get(self, record: Mapping[str, Any], name: str) -> Any:
        return _given(record.get(self.columns.get(name, name)))

    def _looked_for(self, names: Sequence[str]) -> Sequence[str]:
        """Those of one meaning that are looked for: where ``columns`` has some, no others."""
        if not self.columns:
            return names
        mapped = [name for name in names if name in self.columns]
        if mapped == ["references"]:
            mapped.append("answer")  # references alone say what is accepted, not what is learned
        return mapped or names

    def _first(self, record: Mapping[str, Any], names: Sequence[str]) -> Any:
        return next((value for name in self._looked_for(names) if (value := self._get(record, name)) is not None), None)


def _conversation(turns: Any, where: str, image: bool) -> dict[str, Any]:
    """LLaVA's form: ``[{"from": "human", "value": ...}, {"from": "gpt", "value": ...}, ...]``."""
    if not isinstance(turns, (list, tuple)) or not turns:
        raise ValueError(f"{where}: conversations is {brief(turns)}; expected a list of turns")
    said: list[tuple[str, str]] = []
    for number, turn in enumerate(turns):
        role = turn.get("from") if isinstance(turn, Mapping) else None
        text = turn.get("value") if isinstance(turn, Mapping) else None
        if role not in (*USERS, *ASSISTANTS, "system") or not isinstance(text, str):
            raise ValueError(
                f"{where}: turn {number} is {brief(turn)}; expected an object with 'from' (human, gpt or system) and "
                "'value', a text"
            )
        said.append(("user" if role in USERS else "assistant" if role in ASSISTANTS else "system", text))
    system = said.pop(0)[1].strip() if said[0][0] == "system" else ""
    if said and said[0][0] == "assistant":
        said.pop(0)  # as LLaVA does: what nobody asked for is not learned
    roles = [role for role, _ in said]
    if not said or roles != ["user", "assistant"] * (len(said) // 2):
        raise ValueError(
            f"{where}: the turns are {_few(roles) or 'none'}; expected human and gpt in turn, gpt at the end"
        )
    pairs = [
        (_without_mark(said[i][1], where, image, first=i == 0), said[i + 1][1].strip()) for i in range(0, len(said), 2)
    ]
    instruction, answer = pairs.pop()
    return {"instruction": instruction, "answer": answer, "history": tuple(pairs), "system": system}


def _without_mark(text: Any, where: str, image: bool, first: bool) -> str:
    """A user's text without the mark at its beginning or end that stands for the image.

    Elsewhere in the text, the same letters are the user's own words.
    """
    if not isinstance(text, str):
        raise ValueError(f"{where}: a question is {brief(text)}; expected a text")
    text, marks = text.strip(), 0
    while text.startswith(IMAGE) or text.endswith(IMAGE):
        text = (text.removeprefix(IMAGE) if text.startswith(IMAGE) else text.removesuffix(IMAGE)).strip()
        marks += 1
    if marks and not image:
        raise ValueError(f"{where}: the text has an {IMAGE} mark, but the record names no image")
    if marks > first:
        raise ValueError(f"{where}: {marks} {IMAGE} marks in one turn; expected one at most, in the first user turn")
    return text


@functools.lru_cache(maxsize=1024)
def _means_image(name: object) -> bool:
    """Whether a record without ``image`` has its image under this name: another's, or ``image`` misspelt."""
    return isinstance(name, str) and name != "image" and (name.lower() in NOT_IMAGE or _is_misspelt(name, "image"))


@functools.lru_cache(maxsize=1024)
def _meant(name: object) -> str | None:
    """The one of ``SPELLED`` that a name misspells."""
    if not isinstance(name, str) or name in COLUMNS:
        return None
    known = (name.lower(),) if name.lower() in COLUMNS else SPELLED  # Answer is no answers
    if known is SPELLED and name[:-1].lower() == "answer":
        return None  # answer1 is another answer
    return next((each for each in known if each in SPELLED and _is_misspelt(name, each)), None)


def _words(text: str) -> str:
    """A text without marks of the image, and whatever white space it has as one blank."""
    return " ".join(text.replace(IMAGE, " ").split())


def _is_misspelt(name: str, known: str) -> bool:
    """Whether ``known`` was meant: in other case, its letters turned, or one of them missing, added or another. Not the
    first one: preferences are no references."""
    name = name.lower()
    same = len(os.path.commonprefix((name, known)))
    a, b = name[same:], known[same:]
    return sorted(name) == sorted(known) or (same > 0 and (a[1:] == b[1:] or a[1:] == b or a == b[1:]))


def _given(value: Any) -> Any:
    """What a record holds; NaN is how pandas writes that it holds nothing."""
    return None if isinstance(value, float) and math.isnan(value) else value


def _is_empty(value: Any) -> bool:
    return value is None or (hasattr(value, "__len__") and len(value) == 0)


def _is_answer(entry: Any) -> bool:
    if isinstance(entry, float) and not math.isfinite(entry):
        return False  # 1e999
    return isinstance(entry, (str, int, float)) and not isinstance(entry, bool)


def _few(words: list[str]) -> str:
    return ", ".join(words[:20]) + (", ..." if len(words) > 20 else "")


def _is_pair(turn: Any) -> bool:
    return isinstance(turn, (list, tuple)) and len(turn) == 2 and all(isinstance(text, str) for text in turn)
