"""What the base could do before it learned anything: captions, listings and extractions of pictures it never saw."""

from __future__ import annotations

from random import Random
from typing import Any

import cllava_fast as cf
from cllava_fast.data.stream import Sample, Stream, Task
from cllava_fast.demo.mixture import describe, draw_picture
from cllava_fast.evaluate.evaluation import evaluate_tasks

SKILLS = "skills"  # no task of a stream is called so: a method that is told tasks takes it for a strange one
LONGEST = 24  # tokens of an answer


def build_skills(processor: Any, seed: int, size: int = 200) -> cf.PreparedStream:
    """Prompts as in pretraining, about pictures drawn anew."""
    rng = Random(f"{seed}/skills")
    samples = []
    for number in range(size):
        facts = draw_picture(rng)
        prompt, answer = describe(facts, rng)
        samples.append(Sample(prompt, answer, facts.image, f"{SKILLS}/{number}"))
    return cf.PreparedStream(Stream([Task(SKILLS, train=samples[:1], test=samples)], name=SKILLS), processor)


def base_ability(model: Any, skills: cf.PreparedStream) -> float:
    """Share of the prompts that a patched or plain model answers word for word as it was pretrained to."""
    found = evaluate_tasks(model, skills, [SKILLS], "test", batch_size=100, max_new_tokens=LONGEST, progress=False)
    return found[0].score
