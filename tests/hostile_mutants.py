"""Ways to trust a stranger's file that the tests must notice; ``tests/mutants.py`` runs them."""

# ruff: noqa: E501

from __future__ import annotations

UNTRUSTED, PIXELS, STREAM = "cllava_fast/untrusted.py", "cllava_fast/data/pixels.py", "cllava_fast/data/stream.py"
TEXT, READER, REPORT = (
    "cllava_fast/model/text.py",
    "cllava_fast/model/instructions.py",
    "cllava_fast/evaluate/report.py",
)
DATA, IMAGES, FILES = "tests/test_hostile_data.py", "tests/test_hostile_images.py", "tests/test_hostile_files.py"

HOSTILE_MUTANTS = [
    # name, file, old, new, test
    ("a name twice in JSON", UNTRUSTED, "if len(result) < len(pairs):", "if False:", DATA),
    ("NaN in JSON", UNTRUSTED, ", parse_constant=_no_number", "", DATA),
    ("aliases grow", UNTRUSTED, "            _size(node, {})\n", "", DATA),
    ("a terminal is controlled", UNTRUSTED, 'not in ("Cc", "Cf", "Cs", "Zl", "Zp")', 'not in ("Cs",)', FILES),
    ("texts of any length", STREAM, "if size > MAX_CHARACTERS:", "if False:", DATA),
    ("half a surrogate pair", STREAM, "or not _is_unicode(value)", "", DATA),
    ("a control token enters by a text", TEXT, "if written and overlapping(said, start, end) >= 0:", "if False:", DATA),
    ("a text may pass for a role marker", READER, "parts += [MARK + self._plain.control[i] for i in run]", "parts += [self._plain.control[i] for i in run]", DATA),
    ("any decoder", PIXELS, "image = Image.open(file, formats=FORMATS)", "image = Image.open(file)", IMAGES),
    ("any number of pixels", PIXELS, "width * height > Image.MAX_IMAGE_PIXELS", "False", IMAGES),
    ("any shape", PIXELS, "max(width, height) > MAX_ASPECT * min(width, height)", "False", IMAGES),
    ("images lie on their side", PIXELS, "turn = TURNS.get(_orientation(image))", "turn = None", IMAGES),
    ("a picture turns when it is read", PIXELS, "    turn = TURNS.get(_orientation(image))  # as read_size: loading finds more, behind a PNG's pixels\n    image.load()\n", "    image.load()\n    turn = TURNS.get(_orientation(image))\n", IMAGES),
    ("16 bits are cut off", PIXELS, 'value * (1 / 257) + 0.5', "value", IMAGES),
    ("what is transparent is black", PIXELS, 'image.size, "white"', 'image.size, "black"', IMAGES),
    ("a pipe is opened", UNTRUSTED, "if not stat.S_ISREG(status.st_mode):", "if False:", DATA),
    ("an encoder's own code", "cllava_fast/surrogate.py", "        _check_no_code(folder)\n", "", FILES),
    ("a mistyped run is asked of the hub", "cllava_fast/model/hub.py", "if beside and os.path.isdir(beside):", "if False:", FILES),
    ("results of any shape", REPORT, "    check_results(results, str(file))\n", "", FILES),
    ("a method's name is raw", REPORT, "_markdown_examples(_md(title_of(name)), result)", "_markdown_examples(title_of(name), result)", FILES),
    ("increments of any type", "cllava_fast/model/files.py", "config=_method_config(values[\"config\"])", "config=config_from_dict(values[\"config\"])", FILES),
    ("a run's folder by a stranger's name", "cllava_fast/config.py", 'if name in (".", "..") or any(', "if False and any(", DATA),
]  # fmt: skip
