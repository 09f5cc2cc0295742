"""Samples from the datasets library: objects, files, formats, and what is refused about each."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from cllava_fast.data import read_samples
from cllava_fast.data.encode import Collator, Encoder, ImageFeatures
from cllava_fast.data.stream import fingerprint
from tests.test_data_readers import GOOD


class TestDatasets:
    @pytest.fixture
    def dataset(self, folder: Path) -> Any:
        datasets = pytest.importorskip("datasets")
        datasets.disable_progress_bars()
        data = {
            "query": ["What is it?", "Which color?", "Hi?"],
            "label": [1, 0, 1],
            "picture": [{"bytes": (folder / "images" / "a.png").read_bytes(), "path": None}, None, None],
        }
        data["picture"][1] = {"bytes": (folder / "images" / "coco" / "b.png").read_bytes(), "path": "b.png"}
        features = datasets.Features(
            query=datasets.Value("string"), label=datasets.ClassLabel(names=["no", "yes"]), picture=datasets.Image()
        )
        return datasets.Dataset.from_dict(data, features=features)

    NAMES = {"question": "query", "answer": "label", "image": "picture"}

    def check(self, samples: Any) -> None:
        assert [(s.instruction, s.answer) for s in samples] == [
            ("What is it?", "yes"), ("Which color?", "no"), ("Hi?", "yes"),
        ]  # fmt: skip
        assert samples[0].open_image().getpixel((0, 0)) == (255, 0, 0) and samples[2].image is None
        assert samples[1].open_image().getpixel((0, 0)) == (0, 0, 255)
        assert ImageFeatures.key(samples[0].image) == ImageFeatures.key(samples[0].image)
        assert ImageFeatures.key(samples[0].image) != ImageFeatures.key(samples[1].image)

    def test_an_object(self, dataset: Any, processor: Any) -> None:
        samples = read_samples(dataset, columns=self.NAMES)
        self.check(samples)
        self.check(read_samples(dataset.select([0, 1, 2]).select([0, 1, 2]), columns=self.NAMES))
        assert fingerprint(samples) == fingerprint(read_samples(dataset, columns=self.NAMES))
        assert fingerprint(samples) != fingerprint(read_samples(dataset.select([1, 0, 2]), columns=self.NAMES))
        encoder = Encoder(processor)
        assert Collator(encoder, None, training=True)(encoder.encode(samples)[:])["pixel_values"].shape[0] == 2

    def test_files(self, dataset: Any, tmp_path: Path, monkeypatch: Any) -> None:
        import datasets

        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        (tmp_path / "hub" / "data").mkdir(parents=True)
        dataset.to_parquet(tmp_path / "one.parquet")
        dataset.save_to_disk(str(tmp_path / "saved"))
        datasets.DatasetDict(train=dataset, test=dataset).save_to_disk(str(tmp_path / "splits"))
        dataset.to_parquet(tmp_path / "hub" / "data" / "train-00000-of-00001.parquet")
        self.check(read_samples(tmp_path / "one.parquet", columns=self.NAMES))
        self.check(read_samples(tmp_path / "saved", columns=self.NAMES))
        self.check(read_samples(tmp_path / "splits", split="test", columns=self.NAMES))
        self.check(read_samples(tmp_path / "hub", columns=self.NAMES))
        dataset.select([0]).to_parquet(tmp_path / "hub" / "data" / "test-00000-of-00001.parquet")
        assert len(read_samples(tmp_path / "hub", split="test", columns=self.NAMES)) == 1
        self.check(read_samples(tmp_path / "hub", split="train", columns=self.NAMES))
        for name, split, message in [
            ("splits", None, "split is None; expected one of train, test"),
            ("hub", None, "split is None; expected one of test, train"),
            ("hub", "val", "split is 'val'; expected one of test, train"),
            ("saved", "train", "has no splits"),
            ("one.parquet", "train", "has no splits"),
        ]:
            with pytest.raises(ValueError, match=message):
                read_samples(tmp_path / name, split=split, columns=self.NAMES)

    def test_images_of_whole_columns_are_not_looked_at(self, dataset: Any) -> None:
        reads: list[Any] = []
        samples = read_samples(dataset.select([0, 1]).flatten_indices(), columns=self.NAMES)
        original = type(samples._images).__getitem__
        try:
            type(samples._images).__getitem__ = lambda self, key: reads.append(self.column_names) or original(self, key)
            assert [s.image.column for s in samples] == ["picture", "picture"]
            assert reads and not any("picture" in names for names in reads)
        finally:
            type(samples._images).__getitem__ = original

    @pytest.mark.parametrize("kind", ["List", "LargeList", "one"])
    def test_a_list_of_one_image(self, dataset: Any, kind: str) -> None:
        import datasets

        image = datasets.Image()
        lists = {"List": [image], "LargeList": datasets.LargeList(image), "one": datasets.Sequence(image, length=1)}
        stored = dataset.with_format("arrow")[:].column("picture").to_pylist()
        rows = [[picture] for picture in stored] if kind == "one" else [*([p] for p in stored[:2]), []]
        features = datasets.Features({**dataset.features, "picture": lists[kind]})
        columns = {"query": dataset["query"], "label": dataset["label"], "picture": rows}
        lists = datasets.Dataset.from_dict(columns, features=features)
        self.check(read_samples(lists, columns=self.NAMES))
        both = read_samples(lists.select([0, 1]).flatten_indices(), columns=self.NAMES)
        assert both._whole == ["picture"] and [s.open_image().getpixel((0, 0))[0] for s in both] == [255, 0]
        if kind != "one":
            columns["picture"] = [rows[0], rows[0] + rows[1], []]
            with pytest.raises(ValueError, match="record 1 names 2 images; expected at most one"):
                read_samples(datasets.Dataset.from_dict(columns, features=features), columns=self.NAMES)

    def test_class_labels(self) -> None:
        datasets = pytest.importorskip("datasets")
        names = datasets.ClassLabel(names=["cat", "dog"])

        def read(answers: Any, feature: Any, **columns: Any) -> Any:
            data = {"question": ["Q?"], "answers": [answers], **columns}
            features = datasets.Features(question=datasets.Value("string"), answers=feature)
            features |= dict.fromkeys(columns, names)
            return read_samples(datasets.Dataset.from_dict(data, features=datasets.Features(features)))

        for feature in ([names], datasets.Sequence(names), datasets.LargeList(names)):
            (sample,) = read([1, 1, 0], feature)
            assert (sample.answer, sample.references) == ("dog", ("dog", "dog", "cat"))
        (sample,) = read(1, names, unread=[-1])
        assert (sample.answer, sample.references) == ("dog", ())
        for wrong, feature in ((-1, names), ([0, -1], [names])):
            with pytest.raises(
                ValueError, match=r"dataset: record 0: answers is .*-1\]?; expected class labels from 0 to 1"
            ):
                read(wrong, feature)

    @pytest.mark.parametrize("kind", ["numpy", "torch", "arrow", "pandas"])
    def test_a_format_changes_nothing(self, dataset: Any, kind: str) -> None:
        if kind == "pandas":
            pytest.importorskip("pandas")
        self.check(read_samples(dataset.with_format(kind), columns=self.NAMES))
        lists = dataset.remove_columns("picture").add_column("references", [["a", "b"], ["a"], ["b"]])
        for source in (lists, lists.with_format(kind)):
            assert read_samples(source, columns={"question": "query"})[0].references == ("a", "b")

    def test_a_transform_is_refused(self, dataset: Any) -> None:
        with pytest.raises(ValueError, match=r"dataset has a transform \(set_transform\), which is not applied"):
            read_samples(dataset.with_transform(lambda rows: rows), columns=self.NAMES)

    def test_a_row_that_points_out_of_the_folder(self, folder: Path) -> None:
        datasets = pytest.importorskip("datasets")
        data = {"question": ["Q?"], "answer": ["A"], "image": [{"bytes": None, "path": "/etc/hostname"}]}
        features = datasets.Features(
            question=datasets.Value("string"), answer=datasets.Value("string"), image=datasets.Image()
        )
        dataset = datasets.Dataset.from_dict(data, features=features)
        with pytest.raises(ValueError, match="no image folder is known"):
            read_samples(dataset)
        with pytest.raises(ValueError, match="record 0: image is '/etc/hostname'; expected a path inside"):
            read_samples(dataset, folder / "images")

    def test_wrong_objects(self, dataset: Any) -> None:
        import datasets

        for wrong in (dataset.to_iterable_dataset(), datasets.DatasetDict(train=dataset)):
            with pytest.raises(ValueError, match=f"is a {type(wrong).__name__}; expected a datasets.Dataset"):
                read_samples(wrong)
        with pytest.raises(ValueError, match=r"record 0 has no question; it has 'query', 'label', expected"):
            read_samples(dataset.remove_columns("picture"))

    def test_images_that_nobody_reads(self, dataset: Any) -> None:
        names = {"question": "query", "answer": "label"}
        with pytest.raises(
            ValueError, match=r"column 'picture' are not read; read them by columns=\{'image': 'picture'\}"
        ):
            read_samples(dataset, columns=names)
        with pytest.raises(ValueError, match=r"columns=\{'image': 'pictur'\} names .*; did you mean picture\?"):
            read_samples(dataset, columns={**names, "image": "pictur"})
        assert read_samples(dataset.remove_columns("picture"), columns=names)[0].image is None

    def test_not_installed(self, tmp_path: Path, monkeypatch: Any) -> None:
        monkeypatch.setitem(sys.modules, "datasets", None)
        (tmp_path / "a.parquet").write_bytes(b"")
        with pytest.raises(ModuleNotFoundError, match=r"a.parquet: .*needs datasets.*pip install datasets"):
            read_samples(tmp_path / "a.parquet")
        assert read_samples([GOOD])
