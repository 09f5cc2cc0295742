"""Saved increments, encoders, results and names of strangers: no code, no network, nothing raw on a terminal."""

from __future__ import annotations

import ast
import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from rich.console import Console
from safetensors.torch import save_file

import cllava_fast as cf
from cllava_fast import cli
from cllava_fast.cli.base import load_processor, model_config
from cllava_fast.config import ModelConfig
from cllava_fast.evaluate.report import load_results, print_table, write_report
from cllava_fast.evaluate.results import MAX_TASKS
from cllava_fast.model import files, hub
from cllava_fast.model.card import is_repo_id
from cllava_fast.ops import tuned
from cllava_fast.surrogate import SentenceSurrogate, find_sentence_model
from cllava_fast.train.progress import stage
from tests.fuzz.readers import seeds

ROOT = Path(__file__).resolve().parents[1]
EVIL = "\x1b[2J\u202e<script>alert(1)</script>\"'&\x07"


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    text, _, weights = seeds()["adapter"][0].partition(b"\0")
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / files.CONFIG).write_bytes(text)
    (folder / files.WEIGHTS).write_bytes(weights)
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config": []}, r"config is \[\]; expected a mapping with a method"),
        ({"config": {"method": ["lora"]}}, "expected a mapping with a method"),
        ({"config": {"method": "continual_llava", "rank": "8"}}, "cannot be read"),
        ({"config": {"method": "continual_llava", "rank": True}}, "rank is True; expected a whole number"),
        ({"config": {"method": "continual_llava", "rank": 1 << 40}}, "expected 65536 at most"),
        ({"config": {"method": "continual_llava", "targets": [1]}}, "targets is .*each a text"),
        ({"config": {"method": "continual_llava", "scale": None}}, "scale is None; expected a number"),
        ({"config": {"method": "continual_llava", "surrogate": {"a": 1}}}, "surrogate is .*expected a text"),
        ({"config": {"method": "continual_llava", "scale": "1e2"}}, "scale is '1e2'; expected 100.0, if that is meant"),
        ({"config": {"method": "continual_llava", "targets": "mlp.*"}}, r"targets is 'mlp.\*'; expected \['mlp.\*'\]"),
        ({"weights_sha256": 5}, "weights_sha256 is 5; expected a text"),
        ({"base_fingerprint": None}, "base_fingerprint is None; expected a text"),
        ({"surrogate_fingerprint": []}, "surrogate_fingerprint is"),
        ({"base_quantization": 4}, "base_quantization is 4; expected a text"),
        ({"chat_template": {"default": "x"}}, "chat_template is .*expected a text"),
        ({"base_dtype": "__class__"}, "base_dtype is '__class__'; expected one of float64"),
        ({"base_model_name_or_path": ["a"]}, "base_model is"),
        ({"tasks": ["x" * 10_000, 1]}, "expected a list of names"),
        ({"tasks": ["a", " "]}, "expected names that are not blank"),
        ({"tasks": ["a", "\0"]}, "expected names that are not blank and hold no NUL"),
        ({"tasks": ["a", "\ud800"]}, "surrogates not allowed; expected a file written by"),
        ({"chat_template": "\udfff"}, "surrogates not allowed"),
        ({"evil": [1]}, "evil is unknown; expected one of base_dtype"),
        ({"base_dtypes": None}, "base_dtypes is unknown; did you mean base_dtype"),
        ({"format": [1]}, r"format is \[1\], not 1"),
        ({"format": True}, "format is True, not 1"),
        ({"format": 1.0}, "format is 1.0, not 1"),
        ({"format": 2, "new": 1}, "format is 2, newer than 1; upgrade cllava_fast"),
    ],
)
def test_a_hostile_adapter_config_is_refused(adapter: Path, change: dict[str, Any], message: str) -> None:
    values = json.loads((adapter / files.CONFIG).read_text())
    assert files.read_config(adapter).tasks == ["t"]
    (adapter / files.CONFIG).write_text(json.dumps({**values, **change}))
    with pytest.raises(ValueError, match=message) as raised:
        files.read_config(adapter)
    assert str(adapter) in str(raised.value) and len(str(raised.value)) < 1000


@pytest.mark.parametrize("text", ['{"format": 1, "format": 1}', '{"format": NaN}', '{"a": "\xff"}', "\x00"])
def test_an_adapter_config_is_strict_json(adapter: Path, text: str) -> None:
    (adapter / files.CONFIG).write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match="adapter_config.json cannot be read"):
        files.read_config(adapter)


@pytest.mark.parametrize("name", [files.CONFIG, files.WEIGHTS])
def test_a_pipe_in_an_adapter_is_not_waited_for(adapter: Path, name: str, llava: Any) -> None:
    (adapter / name).unlink()
    os.mkfifo(adapter / name)
    with pytest.raises(FileNotFoundError, match=f"{name} does not exist"):
        cf.load_pretrained(llava, adapter)


def test_code_beside_a_base_is_not_run(new_llava: Any, processor: Any, tmp_path: Path) -> None:
    """``auto_map`` of a config and of a processor, and what they name."""
    base, saved = tmp_path / "base", tmp_path / "saved"
    model = new_llava()
    model.save_pretrained(base)
    processor.save_pretrained(base)
    cf.patch(model, processor=processor)
    cf.save_pretrained(model, saved, base_model=str(base))
    (base / "evil.py").write_text(f"open({str(tmp_path / 'hacked')!r}, 'w')\nclass Evil: pass\n")
    values = json.loads((base / "config.json").read_text())
    auto = {"AutoConfig": "evil.Evil", "AutoModelForImageTextToText": "evil.Evil", "AutoProcessor": "evil.Evil"}
    (base / "config.json").write_text(json.dumps({**values, "auto_map": auto}))
    for name in ("processor_config.json", "tokenizer_config.json"):
        file = base / name
        known = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(
            json.dumps({**known, "auto_map": {"AutoProcessor": "evil.Evil", "AutoTokenizer": ["evil.Evil"] * 2}})
        )
    assert cf.from_pretrained(saved).increments.pool.num_tasks == 0
    (base / "config.json").write_text(json.dumps({**values, "model_type": "evil", "auto_map": auto}))
    with pytest.raises(ValueError, match="base model .* brings code of its own, and code of others is never run"):
        cf.from_pretrained(saved)
    for name in ("processor_config.json", "tokenizer_config.json"):
        file = base / name
        file.write_text(json.dumps({**json.loads(file.read_text()), "processor_class": "Evil"}))
    for load in (model_config, load_processor):
        with pytest.raises(ValueError, match=r"model.path is '.*base', which brings code of its own \(auto_map\), and"):
            load(ModelConfig(path=str(base)))
    assert not (tmp_path / "hacked").exists()


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ([{"idx": 0, "name": "0", "path": "", "type": "evil.Evil"}], "names the module 'evil.Evil'; expected"),
        ([{"idx": 0, "name": "0", "path": "", "type": "os.system"}], "code of others is never run"),
        ([1], "names the module None"),
        ({"a": 1}, "expected a list of modules"),
    ],
)
def test_an_encoder_that_brings_code_is_refused(tmp_path: Path, modules: Any, message: str) -> None:
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'hacked')!r}, 'w')\nclass Evil: pass\n")
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ValueError, match=message):
        SentenceSurrogate(str(tmp_path))
    assert not (tmp_path / "hacked").exists()
    with pytest.raises(FileNotFoundError, match="was not found"):
        find_sentence_model("x" * 5000)


FOLDERS = (
    "./mine",
    "../mine",
    "/mine",
    "~/mine",
    "~",
    "a/b/c",
    "a//b",
    "runs\\mine",
    "a/../b",
    "",
    ".",
    "a\0b",
    "x" * 300,
    "a b",
)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a hub would be asked for."""
    names: list[str] = []

    def download(name: str, **options: Any) -> str:
        names.append(name)
        raise hub.LocalEntryNotFoundError("offline")

    monkeypatch.setattr(hub, "snapshot_download", download)
    return names


@pytest.mark.parametrize("name", FOLDERS)
def test_what_looks_like_a_folder_is_not_asked_of_the_hub(
    name: str, asked: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert not is_repo_id(name)
    if name != ".":  # which is a folder
        with pytest.raises(FileNotFoundError, match="there is no folder"):
            cf.from_pretrained(name)
    assert not asked


def test_a_mistyped_run_is_not_asked_of_the_hub(
    asked: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(FileNotFoundError, match="no folder 'runs/mnie', and the hub was not asked.*did you mean mine"):
        cf.from_pretrained("runs/mnie")
    with pytest.raises(FileNotFoundError, match="is a file; expected a folder"):
        cf.from_pretrained("file")
    assert cli.main(["ask", "runs/mnie", "is it?"]) == 1 and "did you mean mine?" in capsys.readouterr().err
    assert not asked
    with pytest.raises(FileNotFoundError, match="cannot be had from the hub"):
        cf.from_pretrained("lab/mine")
    assert asked == ["lab/mine"]


def test_no_other_file_of_a_repository_is_wanted() -> None:
    there = ["adapter_config.json", "../../adapter_config.json", "/etc/adapter_config.json", "sub/README.md", "a.py",
             "adapter_model.safetensors", "adapter_model.bin", "README.md", "..\\README.md"]  # fmt: skip
    assert set(filter_repo_objects(there, allow_patterns=list(files.FILES))) == set(files.FILES)


def results(**changes: Any) -> dict[str, Any]:
    return json.loads(seeds()["results"][0]) | changes


def method(**changes: Any) -> dict[str, Any]:
    return {"frozen": results()["methods"]["frozen"] | changes}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([], "has no 'stream'"),
        (results(stream="t"), "stream is 't'; expected a list of names"),
        (results(stream=["t", "t"]), "different names"),
        (results(stream=[f"t{i}" for i in range(MAX_TASKS + 1)]), "different names"),
        (results(seeds=[None]), "seeds is"),
        (results(methods=[1]), "methods is"),
        (results(methods={"a": 1}), "method 'a' is 1"),
        (results(methods={f"m{i}": {} for i in range(30)}), "20 methods at most"),
        (results(environment=["torch"]), "environment is"),
        (results(config=1), "config is 1"),
        (results(note={"a": 1}), "note is"),
        (results(metrics={"t": ["a"]}), "metrics is"),
        (results(metrics={}), "metrics are given for"),
        (results(methods=method(accuracy_matrix=[["x"]])), "accuracy_matrix of 'frozen' is not 1 x 1"),
        (results(methods=method(accuracy_matrix={"a": 1})), "accuracy_matrix of 'frozen' is not 1 x 1"),
        (results(methods=method(per_seed=[{"accuracy_matrix": [[1, 2]]}])), "is not 1 x 1"),
        (results(methods=method(per_seed=[3])), "per_seed of 'frozen' is"),
        (results(methods=method(average_accuracy="1")), "average_accuracy of 'frozen' is '1'"),
        (results(methods=method(seconds=None)), "seconds of 'frozen' is None"),
        (results(methods=method(seconds=10**400)), "seconds of 'frozen' is"),
        (results(methods=method(losses={"t": [None]})), "losses of 'frozen' is"),
        (results(methods=method(examples={"t": ["x"]})), "examples of 'frozen' is"),
        (results(methods=method(examples={"t": [{"question": "q"}]})), "lacks"),
        (
            results(config={"a": [[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]}),
            "nested more than 30 deep",
        ),
    ],
)
def test_results_that_no_run_wrote_are_refused(tmp_path: Path, values: Any, message: str) -> None:
    path = tmp_path / "results.json"
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=message) as raised:
        load_results(path)
    assert str(path) in str(raised.value) and len(str(raised.value)) < 1000
    assert cli.main(["report", str(tmp_path)]) == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["results.json"]


def test_nothing_of_a_stranger_is_raw_in_a_report(tmp_path: Path, capsys: Any) -> None:
    example = {"question": EVIL, "answers": [EVIL], "prediction": "\ud800" + EVIL, "score": 1.0, "image": EVIL}
    values = results(
        stream=[EVIL], metrics={EVIL: "anls" + EVIL}, environment={EVIL: EVIL}, config={EVIL: EVIL, "split": EVIL},
        note=EVIL, methods={EVIL: method(examples={EVIL: [example]}, losses={EVIL: [1.0]})["frozen"]},
    )  # fmt: skip
    (tmp_path / "results.json").write_text(json.dumps(values))
    read = load_results(tmp_path / "results.json")
    write_report(read, tmp_path)
    print_table(read)
    printed = capsys.readouterr().out
    assert cli.main(["report", str(tmp_path)]) == 0
    page, text = ((tmp_path / f"report.{kind}").read_text(encoding="utf-8") for kind in ("html", "md"))
    for shown in (page, text, printed, (tmp_path / "matrix.csv").read_text(), capsys.readouterr().out):
        assert not any(c in shown for c in "\x1b\u202e\x07") and r"\x1b" in shown
    assert "<script" not in page and "&lt;script&gt;" in page


def test_errors_and_warnings_do_not_control_the_terminal(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    path = tmp_path / "s.yaml"
    path.write_text('tasks: []\n"\\e[2J\\u202Eevil": 1\n')
    assert cli.main(["train", str(path), "--model", "m"]) == 1
    said = capsys.readouterr().err
    assert r"\x1b[2J\u202eevil is unknown" in said and "\x1b" not in said
    assert cli._warning(UserWarning("\x1b[2J")) == "cllava-fast: \\x1b[2J\n"


def test_a_question_that_no_model_reads_is_refused_before_weights(capsys: Any) -> None:
    assert cli.main(["ask", "no/such/run", "x" * (1 << 19)]) == 1
    assert "the question: its texts have 524289 characters; expected 262144 at most" in capsys.readouterr().err
    assert cli.main(["ask", "no/such/run", "what\0?"]) == 1
    assert "holds a NUL" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, '{"kind": 1, "kind": 1}', '{"kind": NaN}', "\xff", " " * (tuned.MAX_BYTES + 1)],
    ids=("deep", "twice", "nan", "encoding", "size"),
)
def test_a_hostile_table_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "sm_90.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(tuned.TableError, match="sm_90.json: is no JSON"):
        tuned.read(path)


def test_tensors_with_other_names_are_refused(adapter: Path) -> None:
    for name in ("pool", "pool.", "../pool.keys", "model.lm_head.weight"):
        save_file({name: torch.zeros(1)}, adapter / files.WEIGHTS)
        if name == "pool.":
            continue  # the pool itself refuses it
        with pytest.raises(ValueError, match="unexpected tensors"):
            files._check_header(adapter / files.WEIGHTS)


CALLS = {"torch.load", "pickle.load", "joblib.load", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "marshal.loads",
         "eval", "exec", "os.system", "Image.open"}  # fmt: skip
ALLOWED = {(f"cllava_fast/{name}.py", "Image.open") for name in ("data/pixels", "evaluate/page", "demo/stream")}


def test_the_package_calls_nothing_that_runs_what_it_reads() -> None:
    found = set()
    for path in (ROOT / "cllava_fast").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in CALLS:
                found.add((str(path.relative_to(ROOT)), ast.unparse(node.func)))
            if isinstance(node, ast.keyword) and node.arg in ("trust_remote_code", "allow_pickle", "shell"):
                assert ast.unparse(node.value) == "False", path
            if isinstance(node, ast.Import) and path.name != "distributed.py":  # errors between processes of one run
                assert "pickle" not in [alias.name for alias in node.names], path
    assert found == ALLOWED


@pytest.mark.parametrize("terminal", [False, True])
def test_a_task_name_is_shown_as_it_is_while_it_is_learned(terminal: bool) -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=100)
    with stage("[red]a[/red]\x1b[2J: tune", 1, console=console) as advance:
        advance("loss [1]")
    assert "[red]a[/red]\\x1b[2J: tune" in out.getvalue() and "loss [1]" in out.getvalue()
    assert ("1/1" in out.getvalue()) == terminal
