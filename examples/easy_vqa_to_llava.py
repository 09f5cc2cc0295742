"""Two tasks of easy-VQA (pip install easy-vqa) as LLaVA-format JSON and PNGs: questions about colors, and about shapes.

    python examples/easy_vqa_to_llava.py data/easy-vqa
    cllava-fast init stream.yaml --data data/easy-vqa

writes data/easy-vqa/color_train.json, color_test.json, shape_train.json, shape_test.json and images/.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from random import Random

import easy_vqa


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="folder for the files")
    parser.add_argument("--train", type=int, default=800, help="training samples of each task (default: %(default)s)")
    parser.add_argument("--test", type=int, default=100, help="test samples of each task (default: %(default)s)")
    arguments = parser.parse_args()
    (arguments.output / "images").mkdir(parents=True, exist_ok=True)
    for split, size in (("train", arguments.train), ("test", arguments.test)):
        asked = easy_vqa.get_train_questions() if split == "train" else easy_vqa.get_test_questions()
        paths = easy_vqa.get_train_image_paths() if split == "train" else easy_vqa.get_test_image_paths()
        questions = [entry for entry in zip(*asked, strict=True) if entry[0].startswith("what")]
        Random(0).shuffle(questions)
        for task in ("color", "shape"):
            chosen = [entry for entry in questions if ("color" in entry[0].split()) == (task == "color")][:size]
            records = []
            for number, (question, answer, image) in enumerate(chosen):
                name = f"{split}_{image}.png"
                shutil.copyfile(paths[image], arguments.output / "images" / name)
                human, gpt = {"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}
                records.append({"id": f"{task}-{split}-{number}", "image": name, "conversations": [human, gpt]})
            file = arguments.output / f"{task}_{split}.json"
            file.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
            print(f"{file}: {len(records)} samples, {chosen[0][0]!r} and the like")


if __name__ == "__main__":
    main()
